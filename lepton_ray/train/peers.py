"""The other workers of a run, as the training code sees them: one protocol, and the case of being alone."""

from __future__ import annotations

from typing import Protocol

import torch


class Peers(Protocol):
    """The group of one generation. All calls are made by every member in the same order."""

    rank: int
    world: int

    def allreduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over the members, in place, to the same bits everywhere."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Set a contiguous tensor to that of rank 0, in place."""

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Make a 1-D CPU tensor of undefined values where `allreduce` is fastest. It serves this group only."""


class Alone:
    """A group of one."""

    rank = 0
    world = 1

    def allreduce(self, tensor: torch.Tensor) -> None:
        """The sum over one member is what it holds."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0 is the only member."""

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Make ordinary memory."""
        return torch.empty(count, dtype=dtype)
