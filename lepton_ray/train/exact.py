"""Sums that are rounded once, at their end: of the same numbers the same bits, in whatever order they came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lepton_ray.train.peers import Peers

_WHOLE = 2.0**32
"""Whole numbers below this are added as they are: a few million of them stay exact."""
_HUGE = 2.0**960
"""Larger numbers are added as they are, too: no exact sum of them is within reach."""


class ExactSum:
    """The sum of vectors of one length, over all that were added by all workers."""

    def __init__(self, length: int) -> None:
        self._whole = torch.zeros(length, dtype=torch.float64)
        """Of whole numbers, and of those that are huge or none."""
        self._parts: dict[int, list[float]] = {}
        """Of all others, by their place, numbers whose sum is theirs."""

    def add(self, vector: torch.Tensor) -> None:
        """Add a vector of float64 on the CPU."""
        is_plain = ~(vector.abs() < _HUGE) | ((vector == vector.trunc()) & (vector.abs() < _WHOLE))
        self._whole += torch.where(is_plain, vector, 0)
        for place in torch.nonzero(~is_plain).flatten().tolist():
            self._parts[place] = expand([*self._parts.get(place, ()), float(vector[place])])

    def over(self, peers: Peers) -> torch.Tensor:
        """Return the sum over all workers, each element rounded once; all take part."""
        rows = 1 + max(map(len, self._parts.values()), default=0)
        each = torch.zeros(peers.world, dtype=torch.float64)
        each[peers.rank] = rows
        peers.allreduce(each)
        table = torch.zeros(peers.world, int(each.max()), len(self._whole), dtype=torch.float64)
        table[peers.rank, 0] = self._whole
        for place, parts in self._parts.items():
            table[peers.rank, 1 : 1 + len(parts), place] = torch.tensor(parts, dtype=torch.float64)
        peers.allreduce(table.view(-1))
        return torch.tensor([_total(column) for column in table.flatten(0, 1).T.tolist()], dtype=torch.float64)


def expand(values: Iterable[float]) -> list[float]:
    """Return as few numbers as hold the sum of finite ones exactly: each is the rounded sum of what is left."""
    left, parts = list(values), []
    while total := math.fsum(left):
        parts.append(total)
        left.append(-total)
    return parts


def _total(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
