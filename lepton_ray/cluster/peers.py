"""The workers of a generation, joined through Ray's collective API on our backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray.util.collective as collective
import torch

from lepton_ray.collective import ray_group
from lepton_ray.collective.wire import Feedback
from lepton_ray.errors import PeerLost, WaitTimeout, blame, silent_peer


class RayPeers:
    """A group of worker actors; see `train.peers.Peers`."""

    def __init__(self, group: str, workers: Sequence[int], own: int, timeout_s: float, *, tls: bool) -> None:
        """Join `group`, which all workers do that are named, by number. Errors name workers, not ranks.

        own: this one. timeout_s: longest wait for a peer without progress. tls: whether to encrypt what leaves a
        process over TCP.
        """
        self.rank, self.world, self.group = workers.index(own), len(workers), group
        self._naming = _Naming(workers)
        if self.world > 1:
            ray_group.register(timeout_s=timeout_s, tls=tls)
            backend: Any = ray_group.BACKEND
            with self._naming:
                collective.init_collective_group(self.world, self.rank, backend=backend, group_name=group)

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        if self.world == 1:
            return
        with self._naming:
            if wire == "fp32":
                collective.allreduce(tensor, group_name=self.group)
            else:
                feedback = None if residual is None else Feedback(residual.numpy())
                ray_group.allreduce(self.group, tensor, wire, feedback)

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            with self._naming:
                collective.broadcast(tensor, src_rank=0, group_name=self.group)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        with self._naming:
            collective.send(tensor, to, group_name=self.group)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        with self._naming:
            collective.recv(tensor, source, group_name=self.group)

    @property
    def is_in_one_node(self) -> bool:
        return self.world == 1 or ray_group.is_in_one_node(self.group)

    def explain(self, size_bytes: int) -> str:
        return ray_group.explain(self.group, size_bytes) if self.world > 1 else "there is one worker"

    def abort(self) -> None:
        """Break what waits in this group, here and at the peers. May be called from any thread."""
        if self.world > 1:
            ray_group.abort(self.group)

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and collective.is_group_initialized(self.group):
            collective.destroy_collective_group(self.group)


class _Naming:
    """Has errors name the worker that is silent, not its rank in a group."""

    def __init__(self, workers: Sequence[int]) -> None:
        self._workers = workers

    def __enter__(self) -> None:
        """Nothing is to be done before."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (PeerLost, WaitTimeout)) and (rank := silent_peer(error)) is not None:
            blame(error, self._workers[rank])
