"""A model as the training loop sees it: named tensors, and a call. Here the protocol and its torch side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A tensor that a training forward changes by itself.

    keep: the part of the old value that one forward keeps, when the change has the form
    new = keep * old + (1 - keep) * observed (BatchNorm: 1 - momentum). None: a plain running mean over all forwards
    so far (BatchNorm with momentum=None). 0.0: the last forward decides (the vectors of a spectral norm). 1.0 for
    anything else: the changes of the microbatches are added up.
    count: for keep=None, the tensor that counts the forwards.
    owner: the dictionary that holds the tensor under `key`, when a forward may replace it by a new one
    (`self.mean = 0.9 * self.mean + ...`).
    """

    name: str
    tensor: torch.Tensor
    keep: float | None = 1.0
    count: torch.Tensor | None = None
    owner: dict[str, torch.Tensor | None] | None = None
    key: str = ""

    def reclaim(self) -> None:
        """Put a tensor that a forward put in this one's place back into this one."""
        if self.owner is None:
            return
        current = self.owner[self.key]
        if current is not self.tensor and current is not None:
            self.tensor.copy_(current.detach())
            self.owner[self.key] = self.tensor


class Model(Protocol):
    """What the loop, the optimizer and the checkpoint need to know of a model."""

    @property
    def user_module(self) -> Any:
        """The object that the user made; user code gets this."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward in the mode last set by `train`."""

    def train(self, mode: bool) -> None:
        """Choose training or evaluation behaviour of dropout, BatchNorm and the like."""

    def seed(self, seed: int) -> None:
        """Make the random numbers of the next forward depend on `seed` only (torch's own generator is set already)."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name the trainable parameters, in a fixed order, each once."""

    def buffers(self) -> list[Buffer]:
        """List the tensors that a training forward may change."""

    def state(self) -> dict[str, torch.Tensor]:
        """Name all live tensors that make the model (a tied tensor once), in a fixed order."""


class TorchModel:
    """A `torch.nn.Module`, moved to `device`."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device)

    @property
    def user_module(self) -> nn.Module:
        return self.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def seed(self, seed: int) -> None:
        """Nothing to do: torch modules draw from torch's global generator."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def buffers(self) -> list[Buffer]:
        return list(_changing_buffers(self.module))

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items()}


def _changing_buffers(module: nn.Module) -> Iterator[Buffer]:
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for key, tensor in child._buffers.items():  # the dictionary itself: a forward may replace its tensors
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(child, _NormBase) and tensor.is_floating_point():
                keep = None if child.momentum is None else 1 - child.momentum
                yield Buffer(name=name, tensor=tensor, keep=keep, count=child.num_batches_tracked)
            else:
                keep = 0.0 if _is_spectral(child, key) else 1.0
                yield Buffer(name=name, tensor=tensor, keep=keep, owner=child._buffers, key=key)


def _is_spectral(module: nn.Module, key: str) -> bool:
    """Tell the vectors of a spectral norm, which each forward improves a little, in its new and its old form."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return isinstance(module, _SpectralNorm) or any(key in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks)
