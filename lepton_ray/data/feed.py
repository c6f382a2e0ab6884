"""Give the microbatches of a step, and the blocks of an evaluation.

What a step holds is decided by `lepton_ray.plan.batch` from the step's number, so any worker can fetch any microbatch
of any step and gets the same samples. A feed runs in the training thread and prefetches nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.batch import Batch
from lepton_ray.data.order import order
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.plan.batch import Cursor, bounds, cursor, cut, steps_per_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What a step trains on."""

    epoch: int
    is_epoch_end: bool
    samples: int
    sizes: list[int]
    """Samples of each microbatch; the last ones of a short step may have none and are then not fetched."""


class Fetched:
    """What was fetched since somebody last asked: the testimony of a worker."""

    def __init__(self) -> None:
        self._rows: dict[int, NDArray[np.int64]] = {}

    def note(self, m: int, indices: NDArray[np.int64]) -> None:
        """Take down the sample ids of microbatch `m`."""
        self._rows[m] = indices

    def forget(self) -> None:
        """Start anew."""
        self._rows.clear()

    def work(self, microbatches: int) -> list[float]:
        """Return for each microbatch the samples fetched, and then for each their digest; zeros for the others.

        Digests of distinct microbatches add up over workers without rounding.
        """
        numbers = [0.0] * (2 * microbatches)
        for m, indices in self._rows.items():
            numbers[m], numbers[microbatches + m] = float(len(indices)), float(digest(indices))
        self.forget()
        return numbers


def digest(indices: NDArray[np.int64]) -> int:
    """Return 32 bits that tell one sequence of sample ids from another."""
    return zlib.crc32(np.ascontiguousarray(indices, dtype="<i8"))


class Feed:
    """The steps of a source, in a new order each epoch. Steps may be asked for in any order."""

    def __init__(self, source: Source, *, batch_samples: int, microbatches: int, seed: int) -> None:
        self.source, self.fetched = source, Fetched()
        self.steps_per_epoch: int | None = steps_per_epoch(len(source), batch_samples)
        self._batch_samples, self._seed = batch_samples, seed
        self._offsets = bounds(batch_samples, microbatches)
        self._order_epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._step = -1
        """The step that was asked for last; where it is, and its microbatches."""
        self._at = Cursor(epoch=0, start=0, stop=0, is_epoch_end=False)
        self._parts: list[range] = []

    def seek(self, step: int) -> None:
        """Do nothing: any step is as near as any other."""

    def plan(self, step: int) -> StepPlan:
        """Return what step `step` (0-based, over all epochs) trains on."""
        self._find(step)
        return _step_plan(self._at, self._parts)

    def indices(self, step: int, m: int) -> NDArray[np.int64]:
        """Return the sample ids of microbatch `m`."""
        self._find(step)
        part, epoch = self._parts[m], self._at.epoch
        if epoch != self._order_epoch:
            self._order, self._order_epoch = order(self._seed, epoch, len(self.source)), epoch
        return self._order[part.start : part.stop]

    def fetch(self, step: int, m: int) -> Batch:
        """Return microbatch `m`, which must have samples. Seed the random numbers first: this runs user code."""
        indices = self.indices(step, m)
        self.fetched.note(m, indices)
        return self.source.fetch(indices)

    def _find(self, step: int) -> None:
        if step != self._step:
            self._at = cursor(step, len(self.source), self._batch_samples)
            self._parts = cut(self._at.start, self._at.stop, self._offsets)
            self._step = step


class StreamFeed:
    """The steps of a stream. Rising steps cost one read; any other step reads the stream from its start.

    Holds the samples of one step and one more, which tells whether the stream goes on.
    """

    steps_per_epoch: int | None = None

    def __init__(self, stream: Stream, *, batch_samples: int, microbatches: int) -> None:
        self.stream, self.fetched = stream, Fetched()
        self._batch_samples = batch_samples
        self._offsets = bounds(batch_samples, microbatches)
        self._length: int | None = None
        """Samples of one pass, known once a pass has ended."""
        # Where the stream stands: before step `_next`, whose first sample is `_ahead`. No iterator: nowhere.
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        self._next = 0
        self._epoch = 0
        self._position = 0
        # The step that is held.
        self._step = -1
        self._plan = StepPlan(epoch=0, is_epoch_end=False, samples=0, sizes=[])
        self._start = 0
        self._samples: list[Any] = []

    def seek(self, step: int) -> None:
        """Stand before step `step`, reading what comes before it unless the stream stands there already."""
        if self._iterator is not None and step == self._next:
            return
        if self._length is None and self._open(0, step * self._batch_samples):
            self._next = step
            return
        assert self._length is not None  # the pass above has ended, or an earlier one has
        at = cursor(step, self._length, self._batch_samples)
        self._open(at.epoch, at.start)
        self._next = step

    def plan(self, step: int) -> StepPlan:
        """Read step `step` and say what it trains on. Raises ConfigError when two passes differ in length."""
        if step == self._step:
            return self._plan
        self.seek(step)
        assert self._iterator is not None
        self._samples = self._ahead + list(islice(self._iterator, self._batch_samples - 1))
        self._ahead = list(islice(self._iterator, 1))
        self._start, self._position = self._position, self._position + len(self._samples)
        at = Cursor(epoch=self._epoch, start=self._start, stop=self._position, is_epoch_end=not self._ahead)
        self._step, self._next = step, step + 1
        self._plan = _step_plan(at, self._parts())
        if at.is_epoch_end:
            self._end()
        return self._plan

    def indices(self, step: int, m: int) -> NDArray[np.int64]:
        """Return the positions in the stream of microbatch `m`."""
        self.plan(step)
        part = self._parts()[m]
        return np.arange(part.start, part.stop)

    def fetch(self, step: int, m: int) -> Batch:
        """Return microbatch `m`, which must have samples. Seed the random numbers first: this runs user code."""
        self.plan(step)
        part = self._parts()[m]
        self.fetched.note(m, np.arange(part.start, part.stop))
        return self.stream.collate(self._samples[part.start - self._start : part.stop - self._start])

    def _parts(self) -> list[range]:
        return cut(self._start, self._start + len(self._samples), self._offsets)

    def _open(self, epoch: int, position: int) -> bool:
        """Read from the start of the stream to `position`; tell whether a sample is there."""
        self._step, self._samples = -1, []
        self._iterator = iter(self.stream)
        self._epoch = epoch
        self._position = sum(1 for _ in islice(self._iterator, position))
        self._ahead = list(islice(self._iterator, 1))
        if not self._ahead:
            self._end()
        return bool(self._ahead)

    def _end(self) -> None:
        self._iterator = None
        if self._position == 0 and self._length is None:
            raise ConfigError("The data stream gave no sample. Check what it reads.")
        if self._length is not None and self._position != self._length:
            raise ConfigError(
                f"The data stream ended after {self._position} samples in epoch {self._epoch}; an earlier pass gave "
                f"{self._length}. It must give the same samples each time that it is read from the start."
            )
        self._length = self._position


def open_feed(source: Source | Stream, *, batch_samples: int, microbatches: int, seed: int) -> Feed | StreamFeed:
    """Return the feed that fits; a stream keeps its own order."""
    if isinstance(source, Source):
        return Feed(source, batch_samples=batch_samples, microbatches=microbatches, seed=seed)
    return StreamFeed(source, batch_samples=batch_samples, microbatches=microbatches)


def blocks(
    source: Source | Stream, block_samples: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Batch]]:
    """Yield (index, batch) of every block i of the data, in order, with i % world == rank; the last may be short."""
    if isinstance(source, Source):
        for index in range(rank, steps_per_epoch(len(source), block_samples), world):
            start = index * block_samples
            yield index, source.fetch(np.arange(start, min(start + block_samples, len(source))))
        return
    samples = iter(source)
    for index in count():
        block = list(islice(samples, block_samples))
        if not block:
            return
        if index % world == rank:
            yield index, source.collate(block)


def _step_plan(at: Cursor, parts: list[range]) -> StepPlan:
    return StepPlan(
        epoch=at.epoch, is_epoch_end=at.is_epoch_end, samples=at.stop - at.start, sizes=[len(part) for part in parts]
    )
