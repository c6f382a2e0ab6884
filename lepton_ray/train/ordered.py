"""Sum over the microbatches of a step in the order of `plan.tree`: the same bits for any number of workers.

Each worker adds its own microbatches along the tree, with the sums that must wait put aside. What it then holds, one
sum or a few, meets the sums of the others in one of three ways. Two sums in all have only one order, so the usual
all-reduce adds them, with everything that makes it fast. Small tensors travel side by side in one all-reduce, to which
each worker adds nothing where others stand, and everybody adds them up alike. Of large ones each worker gets a slice of
all sums, adds these, and one all-reduce brings the slices together. Adding zero changes no bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lepton_ray.plan.batch import own
from lepton_ray.plan.ring import chunk_bounds
from lepton_ray.plan.tree import Turn, merges, subtrees, turns
from lepton_ray.train.peers import Peers

TOGETHER_BYTES = 256 << 10
"""Sums of at most so many bytes in all travel side by side: a round of messages takes longer."""


class Aside:
    """Sums of earlier microbatches that are kept while later ones are summed in the same place."""

    def __init__(self) -> None:
        self._memory: list[torch.Tensor] = []
        self._depth = 0

    @property
    def kept(self) -> list[torch.Tensor]:
        """The sums, the oldest first; they live until the next `clear`."""
        return self._memory[: self._depth]

    def clear(self) -> None:
        self._depth = 0

    def put(self, tensor: torch.Tensor) -> None:
        """Put a sum aside, and begin a new one in its place."""
        if self._depth == len(self._memory):
            self._memory.append(torch.empty_like(tensor))
        self._memory[self._depth].copy_(tensor)
        self._depth += 1
        tensor.zero_()

    def merge(self, tensor: torch.Tensor, times: int) -> None:
        """Add the sums that were put aside last."""
        for _ in range(times):
            self._depth -= 1
            tensor.add_(self._memory[self._depth])


class Tree:
    """The order of one step after another, and the sums of all workers along it."""

    def __init__(self, peers: Peers, microbatches: int) -> None:
        self._peers = peers
        self._shares = own(microbatches, [1.0] * peers.world)
        self.begin(microbatches)

    def begin(self, filled: int) -> None:
        """Start a step whose first `filled` microbatches are not empty."""
        root = range(filled)
        self._turns = turns(self._shares[self._peers.rank], root)
        self._parts = [subtrees(share, root) for share in self._shares]
        self._merges = merges([part for parts in self._parts for part in parts], root)

    def turn(self, microbatch: int) -> Turn:
        """Say how this worker adds one of its microbatches."""
        return self._turns[microbatch]

    def total(self, kept: Sequence[torch.Tensor], last: torch.Tensor) -> None:
        """Set `last` to the sum of all workers. kept: this worker's sums before its last; all are used up.

        A worker that has none gives zeros. All are flat, and of one size and type on all workers.
        """
        world, count = self._peers.world, sum(map(len, self._parts))
        if world == 1 or not count:
            return
        mine = [*kept, last][: len(self._parts[self._peers.rank])]
        if count <= 2:
            self._peers.allreduce(last)
        elif count * last.numel() * last.itemsize <= TOGETHER_BYTES:
            self._side_by_side(mine, last, count)
        else:
            self._in_slices(mine, last)

    def _side_by_side(self, mine: Sequence[torch.Tensor], last: torch.Tensor, count: int) -> None:
        sums = last.new_zeros(count, last.numel())
        first = sum(len(parts) for parts in self._parts[: self._peers.rank])
        for row, part in zip(sums[first:], mine):
            row.copy_(part)
        self._peers.allreduce(sums.view(-1))
        last.copy_(self._added(list(sums)))

    def _in_slices(self, mine: Sequence[torch.Tensor], last: torch.Tensor) -> None:
        rank, world = self._peers.rank, self._peers.world
        bounds = chunk_bounds(last.numel(), world)
        slices = [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]
        sums: list[list[torch.Tensor]] = [[] for _ in range(world)]
        sums[rank] = [part[slices[rank]] for part in mine]
        for turn in range(world):  # in each one, pairs that nobody else waits for
            peer = (turn - rank) % world
            if peer == rank:
                continue
            sums[peer] = [last.new_empty(len(last[slices[rank]])) for _ in self._parts[peer]]
            if rank < peer:
                self._send([part[slices[peer]] for part in mine], peer)
            for each in sums[peer]:
                self._peers.recv(each, peer)
            if peer < rank:
                self._send([part[slices[peer]] for part in mine], peer)
        total = self._added([each for row in sums for each in row]).clone()
        last.zero_()
        last[slices[rank]] = total
        self._peers.allreduce(last)

    def _send(self, parts: Sequence[torch.Tensor], peer: int) -> None:
        for part in parts:
            self._peers.send(part, peer)

    def _added(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add up the sums of all workers, in place."""
        for left, right in self._merges:
            sums[left].add_(sums[right])
        return sums[0]
