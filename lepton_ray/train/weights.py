"""The trained weights of a run as one plain safetensors file, which any tool can read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load
from torch import Tensor

from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import file_pieces, plan_file

NAME = "model.safetensors"


def write_weights(folder: Folder, state: Mapping[str, Tensor]) -> None:
    """Write the tensors of a model, by name, one after the other from where they lie.

    Tensors may share memory, as folded buffers do. Raises CheckpointError for a type that the format does not have.
    """
    plan = plan_file(state)
    with folder.open(NAME, "wb") as file:
        for piece in file_pieces(plan.head, (state[span.name] for span in plan.spans)):
            file.write(piece)


def read_weights(folder: Folder) -> dict[str, Tensor]:
    """Read what `write_weights` wrote."""
    return load(folder.read(NAME))


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over names, shapes, types and bytes of a model's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
