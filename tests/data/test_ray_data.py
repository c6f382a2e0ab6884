"""Arrays are shared through Ray without a copy; ray.data is served by index or as a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lepton_ray.data.feed import StreamFeed, open_feed
from lepton_ray.data.sources import Source, Stream, describe, make_source, spare_cpus
from lepton_ray.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ray_cluster")

X = np.arange(40 * 6, dtype=np.float32).reshape(40, 2, 3)
Y = np.arange(40) % 4


def test_workers_map_the_arrays_without_a_copy() -> None:
    import ray

    @ray.remote(num_cpus=1)
    def look(source: Any) -> tuple[bool, bool, float]:
        array = source.columns[0].array
        batch = source.fetch(np.array([5]))[0]
        batch.zero_()  # the batch is the worker's own
        return array.flags.owndata, array.flags.writeable, float(array[5].sum())

    big = np.ones((1000, 100))
    shared = ray.put(make_source((big, np.arange(1000))))
    assert ray.get([look.remote(shared), look.remote(shared)], timeout=60) == [(False, False, 100.0)] * 2


def dataset() -> Any:
    import ray.data

    made = ray.data.from_numpy([X[:7], X[7:20], X[20:]]).add_column("y", lambda frame: frame["data"].map(_label))
    made.context.enable_progress_bars = False
    return made


def _label(row: Any) -> int:
    return int(np.asarray(row).reshape(-1)[0]) // 6 % 4


def test_a_materialised_dataset_is_served_by_index() -> None:
    import ray

    ordered = dataset()
    ordered.context.execution_options.preserve_order = True
    source = make_source(ordered.materialize())
    assert isinstance(source, Source)
    assert len(source) == 40
    indices = np.array([39, 0, 7, 6, 39, 20, 19])
    batch = source.fetch(indices)
    assert torch.equal(batch["data"], torch.from_numpy(X[indices]))
    assert batch["y"].tolist() == Y[indices].tolist()
    batch["data"].zero_()
    assert source.fetch(indices)["data"].any()
    assert describe(source)["columns"]["data"] == {"shape": [40, 2, 3], "dtype": "float32"}

    @ray.remote(num_cpus=1)
    def fetch(source: Source) -> list[int]:
        return source.fetch(np.array([38, 1]))["y"].tolist()

    assert ray.get(fetch.remote(ray.put(source)), timeout=60) == Y[[38, 1]].tolist()


def test_a_lazy_dataset_is_a_stream_in_order() -> None:
    import ray.data

    stream = make_source(dataset())
    assert isinstance(stream, Stream)
    assert spare_cpus(stream) == spare_cpus(make_source(dataset(), transform=dict)) == 1
    assert spare_cpus(make_source(X)) == 0
    feed = open_feed(stream, batch_samples=16, microbatches=2, seed=0)
    assert isinstance(feed, StreamFeed)
    for step, span in ((0, slice(0, 8)), (2, slice(32, 40)), (3, slice(0, 8))):
        batch = feed.plan(step) and feed.fetch(step, 0)
        assert torch.equal(batch["data"], torch.from_numpy(X[span])), step
        assert batch["y"].tolist() == Y[span].tolist()
    assert feed.stream.dataset.context.execution_options.preserve_order  # type: ignore[attr-defined]
    assert not ray.data.DataContext.get_current().execution_options.preserve_order
    collated = make_source(dataset(), collate=lambda rows: [row["y"] for row in rows])
    assert isinstance(collated, Stream)
    assert collated.collate([{"y": 1}, {"y": 2}]) == [1, 2]


def test_bad_ray_data_is_refused() -> None:
    import ray.data

    with pytest.raises(ConfigError, match="no rows"):
        make_source(ray.data.from_items([{"a": 1}]).limit(0).materialize())
    with pytest.raises(ConfigError, match="'a'"):
        make_source(ray.data.from_items([{"a": "text"}]).materialize())
    with pytest.raises(ConfigError, match="'a'"):
        make_source(ray.data.from_items([{"a": [1]}, {"a": [1, 2]}], override_num_blocks=1).materialize())
    with pytest.raises(ConfigError, match="collate= is for"):
        make_source(ray.data.range(3).materialize(), collate=list)
    two = ray.data.from_items([{"a": 1}]).materialize().union(ray.data.from_items([{"a": 1.5}]).materialize())
    source = make_source(two.materialize())
    assert isinstance(source, Source)
    with pytest.raises(ConfigError, match="block 1"):
        source.fetch(np.array([0, 1]))
