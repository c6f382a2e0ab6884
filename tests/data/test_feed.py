"""Each epoch gives every sample once, whoever asks for it, and a step is the same from wherever one starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from lepton_ray.data.feed import Feed, StreamFeed, blocks, open_feed
from lepton_ray.data.order import order
from lepton_ray.data.sources import make_source
from lepton_ray.errors import ConfigError

SHAPES = {"samples": st.integers(1, 60), "batch": st.integers(1, 25), "microbatches": st.integers(1, 7)}


class Counter(IterableDataset):
    """Samples 0..samples-1; notes how often it was read from the start and how many samples were taken."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.passes, self.taken = lengths, 0, 0

    def __iter__(self) -> Iterator[int]:
        length = self.lengths[min(self.passes, len(self.lengths) - 1)]
        self.passes += 1
        for sample in range(length):
            self.taken += 1
            yield sample


def indexed(samples: int, batch: int, microbatches: int, *, seed: int = 0) -> Feed:
    feed = open_feed(make_source(np.arange(samples)), batch_samples=batch, microbatches=microbatches, seed=seed)
    assert isinstance(feed, Feed)
    return feed


def streamed(data: Any, batch: int, microbatches: int) -> StreamFeed:
    feed = open_feed(make_source(data), batch_samples=batch, microbatches=microbatches, seed=0)
    assert isinstance(feed, StreamFeed)
    return feed


def fetched(feed: Feed | StreamFeed, step: int) -> list[list[int]]:
    """Return the values of each microbatch that has any, checked against the plan and the indices."""
    sizes = feed.plan(step).sizes
    parts = [feed.fetch(step, m).tolist() if size else [] for m, size in enumerate(sizes)]
    assert [len(part) for part in parts] == sizes
    assert parts == [feed.indices(step, m).tolist() for m in range(len(sizes))]
    return parts


@given(**SHAPES)
@settings(max_examples=50, deadline=None)
def test_each_epoch_gives_every_sample_once(samples: int, batch: int, microbatches: int) -> None:
    feed = indexed(samples, batch, microbatches)
    assert feed.steps_per_epoch is not None
    for epoch in range(2):
        steps = range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch)
        plans = [feed.plan(step) for step in steps]
        assert all(plan.epoch == epoch and plan.samples == sum(plan.sizes) for plan in plans)
        assert [plan.is_epoch_end for plan in plans] == [False] * (len(plans) - 1) + [True]
        seen = [sample for step in steps for part in fetched(feed, step) for sample in part]
        assert seen == order(0, epoch, samples).tolist()


@given(**SHAPES, seed=st.integers(0, 2**63 - 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_samples_depend_on_seed_step_and_microbatch_only(
    samples: int, batch: int, microbatches: int, seed: int, data: st.DataObject
) -> None:
    one, other = (indexed(samples, batch, microbatches, seed=seed) for _ in range(2))
    asked = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, microbatches - 1)), max_size=8))
    first = {place: one.indices(*place).tolist() for place in asked}
    assert first == {place: other.indices(*place).tolist() for place in reversed(asked)}


def test_order_is_reproducible_with_plain_numpy() -> None:
    for seed, epoch, samples in ((0, 0, 1), (2**63 - 1, 3, 1000)):
        keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(samples)
        assert order(seed, epoch, samples).tolist() == sorted(range(samples), key=lambda sample: keys[sample])
    assert order(1, 0, 50).tolist() != order(0, 0, 50).tolist() != order(0, 1, 50).tolist()
    # A golden value: another numpy must give the same order, or a resumed run trains on other samples.
    assert order(1, 2, 8).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


def assert_same_positions(stream: StreamFeed, reference: Feed, step: int) -> None:
    """Compare a stream of 0, 1, ... with a source, which gives what its order has at these positions."""
    plan = stream.plan(step)
    assert plan == reference.plan(step)
    ids = order(0, plan.epoch, len(reference.source)).tolist()
    assert [[ids[position] for position in part] for part in fetched(stream, step)] == fetched(reference, step)


@given(**SHAPES, steps=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_a_stream_is_cut_like_a_source(samples: int, batch: int, microbatches: int, steps: int) -> None:
    feed, reference = streamed(Counter(samples), batch, microbatches), indexed(samples, batch, microbatches)
    assert feed.steps_per_epoch is None
    for step in range(steps):
        assert_same_positions(feed, reference, step)


@given(**SHAPES, steps=st.lists(st.integers(0, 30), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_stream_resumes_at_any_step(samples: int, batch: int, microbatches: int, steps: list[int]) -> None:
    feed, reference = streamed(Counter(samples), batch, microbatches), indexed(samples, batch, microbatches)
    for step in steps:
        feed.seek(step)
        assert_same_positions(feed, reference, step)


def test_a_stream_is_read_one_sample_ahead_and_once_per_epoch() -> None:
    counter = Counter(10)
    feed = streamed(counter, 4, 2)
    feed.plan(0)
    assert (counter.passes, counter.taken) == (1, 5)
    fetched(feed, 0)
    feed.plan(1)
    assert (counter.passes, counter.taken) == (1, 9)
    assert feed.plan(2).is_epoch_end
    assert (counter.passes, counter.taken) == (1, 10)
    assert feed.plan(3).epoch == 1
    assert (counter.passes, counter.taken) == (2, 15)


def test_a_stream_that_changes_its_length_is_refused() -> None:
    feed = streamed(Counter(10, 7), 4, 2)
    for step in range(4):
        feed.plan(step)
    with pytest.raises(ConfigError, match="7 samples in epoch 1; an earlier pass gave 10"):
        feed.plan(4)


def test_an_empty_stream_is_refused() -> None:
    for step in (0, 3):
        with pytest.raises(ConfigError, match="no sample"):
            streamed(Counter(0), 4, 2).plan(step)


@pytest.mark.parametrize("world", [1, 3])
def test_blocks_cover_the_data_in_order(world: int) -> None:
    for data in (np.arange(10), Counter(10)):
        found = {
            i: b.tolist() for rank in range(world) for i, b in blocks(make_source(data), 4, rank=rank, world=world)
        }
        assert found == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}
