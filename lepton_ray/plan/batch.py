"""Decide which samples make a microbatch, which replica owns it, and which random numbers it draws.

Nothing here knows ranks, devices or clocks: the answers depend on (seed, step, microbatch) and on speeds only.
That is what makes resize, recovery and load balance a change of ownership between two steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Position of a step in the sample stream."""

    epoch: int
    start: int
    """First position of the step in its epoch's order."""
    stop: int
    """One past its last position."""
    is_epoch_end: bool


def steps_per_epoch(samples: int, batch_samples: int) -> int:
    """Count the steps of one pass over `samples`; the last one may be short."""
    return -(-samples // batch_samples)


def cursor(step: int, samples: int, batch_samples: int) -> Cursor:
    """Locate step `step` (0-based, over all epochs) in a stream of `samples` samples per epoch."""
    per_epoch = steps_per_epoch(samples, batch_samples)
    epoch, index = divmod(step, per_epoch)
    start = index * batch_samples
    return Cursor(
        epoch=epoch, start=start, stop=min(start + batch_samples, samples), is_epoch_end=index == per_epoch - 1
    )


def bounds(batch_samples: int, microbatches: int) -> list[int]:
    """Cut a full batch into `microbatches` parts as even as possible: microbatches + 1 offsets from 0."""
    small, larger = divmod(batch_samples, microbatches)
    return [0, *accumulate(small + (m < larger) for m in range(microbatches))]


def cut(start: int, stop: int, offsets: Sequence[int]) -> list[range]:
    """Share the positions start..stop of one step among its microbatches.

    offsets: of a full batch, from `bounds`. A short last batch takes no more microbatches than it needs, the first
    ones, and shares its samples evenly among them, so that none is smaller than it has to be (BatchNorm cannot learn
    from one sample); later ones are empty.
    """
    needed = bisect_left(offsets, stop - start)
    ends = [start + offset for offset in bounds(stop - start, needed)] + [stop] * (len(offsets) - 1 - needed)
    return [range(a, b) for a, b in zip(ends, ends[1:])]


def own(microbatches: int, speeds: Sequence[float]) -> list[range]:
    """Share the microbatches of a step among replicas in proportion to speed.

    speeds: samples per second of each replica, all > 0.
    Returns one contiguous range per replica, same order, together 0..microbatches; a replica may get an empty one.
    Source: largest-remainder apportionment, ties to the lower index.
    """
    total = sum(speeds)
    shares = [microbatches * speed / total for speed in speeds]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(speeds)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: microbatches - sum(counts)]:
        counts[i] += 1
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts)]


def seed_of(seed: int, *place: int) -> int:
    """Mix a seed with a place (such as step and microbatch) into a 63-bit seed.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once per number.
    """
    state = seed & _MASK
    for number in place:
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
