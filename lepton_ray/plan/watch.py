"""Tell which workers are silent because something is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

ALL_SLOW = 5.0
"""Where the others are slow to answer as well, the machine is; a worker then has so many times the limit."""


def silent(ages_s: Mapping[int, float], limit_s: float) -> list[int]:
    """List the workers that are to be taken for gone.

    ages_s: seconds for which each worker has owed an answer; those that owe none are not in it, or have a small age.
    A worker is given up after limit_s if the others answer meanwhile, and after five times that in any case. One that
    is alone has nobody to be compared with.
    """
    found = []
    for worker, age_s in ages_s.items():
        others = [other_s for other, other_s in ages_s.items() if other != worker]
        is_odd = bool(others) and median(others) < limit_s / 3
        if age_s > limit_s * (1.0 if is_odd else ALL_SLOW):
            found.append(worker)
    return found
