"""Decide which part of the weights is exchanged when, while workers train by themselves (local steps).

Local SGD and DiLoCo (Douillard et al., 2023) exchange all weights every so many steps. Streaming DiLoCo (Douillard et
al., 2025) cuts them into fragments, which take turns, and lets a few steps pass between the moment when the progress of
a fragment leaves a worker and the moment when the sum is used. Both moments are fixed steps, not whenever the network
is ready, so that a run gives the same result each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """When fragments leave and arrive."""

    steps: int
    """Between two exchanges of the same fragment."""
    fragments: int
    """At most `steps`."""
    delay: int
    """Steps from leaving to arriving, fewer than between two fragments that leave."""

    def leaving(self, done: int) -> int | None:
        """Return the fragment whose progress leaves when `done` steps are done.

        The turns are spread over the steps as evenly as whole steps allow; the last fragment's comes after all of them.
        """
        place = (done - 1) % self.steps + 1
        turn = place * self.fragments // self.steps
        is_first = turn > (place - 1) * self.fragments // self.steps
        return turn - 1 if done > 0 and is_first else None

    def arriving(self, done: int) -> int | None:
        """Return the fragment whose sum is used when `done` steps are done."""
        return self.leaving(done - self.delay)


def cut(sizes: Sequence[int], fragments: int) -> list[range]:
    """Cut parameters into consecutive fragments that are about as large as each other and hold at least one each.

    sizes: of each parameter, in bytes; at least as many as fragments. No fragment is larger than an even share by more
    than the largest parameter, unless there would be too few left for the others.
    """
    total = sum(sizes) or 1
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes))
    places = [min(int(middle * fragments / total), fragments - 1) for middle in middles]
    ends = [0]
    for fragment in range(fragments):
        most = len(sizes) - (fragments - 1 - fragment)
        ends.append(min(max(sum(place <= fragment for place in places), ends[-1] + 1), most))
    ends[-1] = len(sizes)
    return [range(start, stop) for start, stop in zip(ends, ends[1:])]
