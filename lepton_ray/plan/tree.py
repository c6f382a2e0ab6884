"""Decide in which order the microbatches of a step are summed, whoever computes them: along a tree over their numbers.

The sum over first..stop is that over first..middle plus that over middle..stop, where middle - first is the largest
power of two below their count. Floats that are added in another order give other bits; along the tree every addition
has the same two numbers, whatever the number of workers. A worker owns neighbours, so it sums most of them by itself:
what it must give away are the largest subtrees within its share, one where shares are equal powers of two, and never
more than twice the logarithm of the microbatches.

Rejected: sums of integers, which need no order. Before any worker could round to a scale, all would have to know the
largest number of each block; twice the bytes would travel; and each microbatch would cost passes over all gradients
that the tree does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What to do with a microbatch that is added to the sum of what came before it."""

    is_apart: bool = False
    """First put that sum aside: this microbatch begins a new one."""
    merges: int = 0
    """Afterwards add so many of the sums that were put aside, the last one first."""


PLAIN = Turn()
"""Add it, and no more."""


def subtrees(share: range, node: range) -> list[range]:
    """Return the largest parts of a tree that lie within a share of its leaves, in order; `node` is its root."""
    if share.start <= node.start and node.stop <= share.stop:
        return [node] if node else []
    if share.stop <= node.start or node.stop <= share.start:
        return []
    left, right = _halves(node)
    return subtrees(share, left) + subtrees(share, right)


def turns(share: range, root: range) -> dict[int, Turn]:
    """Return by its number what to do with each leaf of a share, taken in order; they leave the sums of `subtrees`.

    All but the last of these are put aside by then. A leaf that is the right half of something is added to the left
    half at once: that is the same addition.
    """
    closed = {leaf: 0 for leaf in root if leaf in share}
    for node in subtrees(share, root):
        _close(node, closed)
    return {leaf: Turn(not times and leaf > share.start, max(times - 1, 0)) for leaf, times in closed.items()}


def merges(parts: Sequence[range], root: range) -> list[tuple[int, int]]:
    """Return pairs of places in `parts`, in order: the second sum is added to the first. The total ends in place 0.

    parts: subtrees that make up the whole tree, in order.
    """
    place = {part: index for index, part in enumerate(parts)}
    found: list[tuple[int, int]] = []

    def total(node: range) -> int:
        if node in place:
            return place[node]
        left, right = map(total, _halves(node))
        found.append((left, right))
        return left

    if root:
        total(root)
    return found


def _halves(node: range) -> tuple[range, range]:
    middle = node.start + (1 << ((len(node) - 1).bit_length() - 1))
    return range(node.start, middle), range(middle, node.stop)


def _close(node: range, closed: dict[int, int]) -> None:
    """Count for each leaf the nodes that are complete with it."""
    if len(node) > 1:
        for half in _halves(node):
            _close(half, closed)
        closed[node.stop - 1] += 1
