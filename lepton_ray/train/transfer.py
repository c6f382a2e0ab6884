"""Copy the state of a training from one worker to others, over the collective: no file is read, none is written."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lepton_ray.train.peers import Peers
from lepton_ray.train.tree import flatten, unflatten

SMALL_BYTES = 1 << 16
"""Tensors below this size travel together."""


def give(peers: Peers, tensors: Mapping[str, torch.Tensor], state: Any) -> None:
    """Send tensors and a tree of tensors and JSON values to all others of a group, as its rank 0."""
    parts = dict(tensors)
    tree = flatten(state, "state", parts)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    head = torch.frombuffer(bytearray(pickle.dumps((tree, layout))), dtype=torch.uint8)
    peers.broadcast(torch.tensor([head.numel()]))
    peers.broadcast(head)
    small = [_bytes(tensor) for tensor in parts.values() if _is_small(tensor)]
    if small:
        peers.broadcast(torch.cat(small))
    for tensor in parts.values():
        if not _is_small(tensor):
            peers.broadcast(tensor.detach().contiguous().cpu())


def take(peers: Peers, room: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """Receive what rank 0 gives: the tensors by name, on the CPU, and the tree.

    room: tensors that are overwritten with those of the same name, where they fit: fresh memory costs as much time
    again as what is written into it.
    """
    size = torch.zeros(1, dtype=torch.int64)
    peers.broadcast(size)
    head = torch.empty(int(size), dtype=torch.uint8)
    peers.broadcast(head)
    tree, layout = pickle.loads(head.numpy().tobytes())  # made by another worker of this run
    parts = {name: _place(room.get(name), dtype, shape) for name, (dtype, shape) in layout.items()}
    small = {name: tensor for name, tensor in parts.items() if _is_small(tensor)}
    if small:
        joined = torch.empty(sum(tensor.nbytes for tensor in small.values()), dtype=torch.uint8)
        peers.broadcast(joined)
        for (name, tensor), part in zip(small.items(), joined.split([tensor.nbytes for tensor in small.values()])):
            parts[name] = part.clone().view(tensor.dtype).view(tensor.shape)
    for tensor in parts.values():
        if not _is_small(tensor):
            peers.broadcast(tensor)
    return parts, unflatten(tree, parts.pop)


def _place(room: torch.Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    fits = room is not None and (room.device.type, room.dtype, tuple(room.shape)) == ("cpu", dtype, tuple(shape))
    return room.detach() if room is not None and fits and room.is_contiguous() else torch.empty(shape, dtype=dtype)


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.nbytes < SMALL_BYTES


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
