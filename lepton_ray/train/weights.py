"""The trained weights of a run as one plain safetensors file, which any tool can read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save

from lepton_ray.storage import Folder

NAME = "model.safetensors"


def write_weights(folder: Folder, state: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of a model, by name."""
    # Copies: safetensors refuses tensors that are views of one memory, as folded buffers are.
    folder.write(NAME, save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}))


def read_weights(folder: Folder) -> dict[str, torch.Tensor]:
    """Read what `write_weights` wrote."""
    return load(folder.read(NAME))
