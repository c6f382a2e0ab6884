"""Agree on a few numbers: every transaction of a run ends with such a ballot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lepton_ray.train.peers import Peers


def vote(peers: Peers, values: Sequence[float]) -> list[float]:
    """Sum a few numbers over all workers (the ballot)."""
    if peers.world == 1:
        return [float(value) for value in values]
    ballot = torch.tensor(values, dtype=torch.float64)
    peers.allreduce(ballot)
    return ballot.tolist()


class Ballots:
    """Votes of all workers of all replicas, who agree as a whole, and on numbers of each part of the model."""

    HEAD = 4
    """Numbers at the head of a transaction's ballot: wishes to stop, for a callback, to pause; bytes to tell of."""

    def __init__(self, everybody: Peers, size: int, coordinate: int) -> None:
        """size, coordinate: workers of a replica, and which of them this one is."""
        self._everybody, self._size, self._coordinate = everybody, size, coordinate

    def hold(self, head: Sequence[float], numbers: Sequence[float]) -> list[float]:
        """Sum the head over all workers, and as many numbers for each part of the model over those that have it."""
        rows = [0.0] * (len(numbers) * self._size)
        rows[self._coordinate * len(numbers) : (self._coordinate + 1) * len(numbers)] = numbers
        return vote(self._everybody, [*head, *rows])

    def own(self, ballot: Sequence[float]) -> Sequence[float]:
        """Return the sums of this part of the model from the ballot of a transaction."""
        count = (len(ballot) - self.HEAD) // self._size
        start = self.HEAD + count * self._coordinate
        return ballot[start : start + count]

    def again(self, numbers: list[float], more: list[float] | None) -> list[float] | None:
        """Return the numbers for another ballot where one was not enough, for this part of the model or another.

        numbers: of this one. more: those that this part needs another for.
        """
        if self._size == 1:
            return more
        is_needed = vote(self._everybody, [more is not None])[0] > 0
        return (more or numbers) if is_needed else None
