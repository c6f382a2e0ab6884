"""Account for every sample of a run, from what the workers recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a run did, as its workers recorded it."""

    steps: int
    """Steps that made the model."""
    samples: int
    """Samples in those steps, each recorded microbatch counted once."""
    samples_lost: int
    """Samples of microbatches that no worker recorded."""
    samples_repeated: int
    """Samples of microbatches that more than one worker recorded."""
    weights_sha256: str | None
    """Digest of the trained weights; None while the run has not ended."""


_Rows = Mapping[int, Sequence[tuple[int, Sequence[int]]]]
"""step -> what workers recorded: (first microbatch, samples of it and of those that follow)."""


def receipt(records: Iterable[Mapping[str, Any]]) -> Receipt:
    """Build the receipt from a run's journal.

    Generations are told apart by number, not by the order of records. What a generation recorded for steps from which
    a later one started again is not part of the model, and does not count.
    """
    rows: list[tuple[int, int, int, list[int]]] = []
    starts: dict[int, int] = {}
    ends: dict[int, tuple[int, str]] = {}
    for record in records:
        match record["event"]:
            case "started" | "resumed":
                starts[record["generation"]] = record["step"]
            case "work":
                rows += [(record["generation"], *row) for row in record["rows"]]
            case "trained":
                ends[record["generation"]] = (record["step"], record["sha256"])
    work: dict[int, list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for generation, step, first, sizes in rows:
        if all(step < start for later, start in starts.items() if later > generation):
            work[step].append((first, sizes))
    done, digest = ends[max(ends)] if ends else (0, None)
    return _count(work, max((done, *(step + 1 for step in work))), digest)


def _count(work: _Rows, steps: int, digest: str | None) -> Receipt:
    full = _largest_sizes(work)
    samples = lost = repeated = 0
    for step in range(steps):
        counts = [0] * len(full)
        for first, sizes in work.get(step, ()):
            for m, size in enumerate(sizes, first):
                counts[m] += 1
                if counts[m] == 1:
                    samples += size
                else:
                    repeated += size
        lost += sum(size for size, count in zip(full, counts) if not count)
    return Receipt(steps=steps, samples=samples, samples_lost=lost, samples_repeated=repeated, weights_sha256=digest)


def _largest_sizes(work: _Rows) -> list[int]:
    """Return the size of each microbatch in a full step, which is what a missing one is taken to have had."""
    sizes: dict[int, int] = {}
    for rows in work.values():
        for first, found in rows:
            for m, size in enumerate(found, first):
                sizes[m] = max(sizes.get(m, 0), size)
    return [sizes.get(m, 0) for m in range(max(sizes, default=-1) + 1)]
