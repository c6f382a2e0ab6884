"""Decide how an array is cut among the ranks of a node, and which way it goes. Pure.

An operation has at most two phases over the same cut: in the first each rank reduces its part, in the second each rank
gets the parts of the others. What one rank has alone is the cut in which that rank's part is everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

LINE_BYTES = 64

Array = NDArray[Any]


class Way(Enum):
    """How ranks reach each other's arrays."""

    COPY = "all copy theirs into a slot, all read all slots"
    IN_PLACE = "all arrays lie in the group's memory"
    READ = "each reads the others' arrays, also in private memory"
    STAGED = "piece by piece through the slots"


def choose(size_bytes: int, copy_bytes: int, is_shared: Sequence[bool], can_read: bool) -> Way:
    """Choose the way of an array that is not small, from what all ranks know alike.

    is_shared: by rank, whether its array lies in the group's memory. copy_bytes: up to this size others are copied.
    can_read: whether all may read each other's private memory.
    """
    if all(is_shared):
        return Way.IN_PLACE
    if size_bytes <= copy_bytes:
        return Way.COPY
    return Way.READ if can_read else Way.STAGED


@lru_cache(maxsize=256)  # asked in every operation
def even_parts(count: int, world: int, itemsize: int) -> tuple[int, ...]:
    """Cut `count` elements into a part for each rank, none of which shares a cache line with another: offsets.

    Where an array does not begin on a line, the first line of a part is shared; that costs time, not correctness.
    """
    grain = max(1, LINE_BYTES // itemsize)
    lines = -(-count // grain)
    return tuple(min(count, lines * rank // world * grain) for rank in range(world + 1))


def whole_part(count: int, world: int, owner: int) -> tuple[int, ...]:
    """Give everything to one rank: offsets."""
    return (0,) * (owner + 1) + (count,) * (world - owner)


def cut(array: Array, bounds: Sequence[int]) -> list[Array]:
    """Show the parts between the bounds as arrays of their own."""
    return [array[start:stop] for start, stop in zip(bounds, bounds[1:])]


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """Cut a range into slices of at most `step`."""
    for lower in range(start, stop, step):
        yield slice(lower, min(lower + step, stop))


def turns(sizes: Sequence[int], room: int) -> list[list[tuple[slice, slice]]]:
    """Cut the parts of all ranks into pieces that go through a slot together, turn by turn.

    room: elements in a slot. Returns, for each turn and each rank, where its piece is in its part and in the slot.
    """
    width = max(1, room // max(1, sum(size > 0 for size in sizes)))
    cut = []
    for turn in range(-(-max(sizes, default=0) // width)):
        places, offset = [], 0
        for size in sizes:
            lower, upper = min(turn * width, size), min((turn + 1) * width, size)
            places.append((slice(lower, upper), slice(offset, offset + upper - lower)))
            offset += upper - lower
        cut.append(places)
    return cut
