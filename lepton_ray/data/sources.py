"""Decide how the user's data is served, and refuse what cannot work before any actor starts.

Two ways of serving exist. A `Source` has a length and gives any samples by index; a `Stream` can only be read from its
start. User code (a Dataset, `collate`, `transform`) runs in the training thread at the moment of the fetch, so that
its random draws follow the microbatch's seed and not a prefetcher's timing.

Rules of a stream
- The order is the stream's own; nothing is shuffled.
- Position k of an epoch belongs to step k // batch of that epoch; a step is cut into microbatches like any other.
- Every worker reads the whole stream and collates only the microbatches that it owns.
- An epoch ends where the stream ends; its last step may be short. The next epoch reads the stream again.
- The stream must give the same samples on each pass and on each worker; a pass of another length is an error. A
  ray.data.Dataset is executed with preserve_order; its random operations need a seed. Random draws belong in
  `transform=`, which runs under the microbatch's seed, and not in the stream.
- A resumed run reads from the start and skips to its position (at most one more whole pass to learn the length).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.arrays import ArraySource, array_source, is_a, is_array
from lepton_ray.data.batch import Batch
from lepton_ray.data.datasets import Collate, DatasetSource, IterableStream, qualified_name
from lepton_ray.data.parquet import read_parquet
from lepton_ray.data.ray_data import RayDataSource, RayDataStream
from lepton_ray.errors import ConfigError

Transform = Callable[[Batch], Batch]

_ACCEPTED = (
    "(x, y) of numpy or torch arrays, a dict of arrays, a torch Dataset or IterableDataset, a ray.data.Dataset, "
    "or a path or glob of Parquet files"
)


@runtime_checkable
class Source(Protocol):
    """Samples by index. Picklable; never changes."""

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the samples at `indices` (at least one, in that order) as CPU tensors that the caller may change."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Samples in one order. Picklable. The rules are in the module's docstring."""

    def __iter__(self) -> Iterator[Any]:
        """Return the samples from the first one on."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """Make one batch of consecutive samples."""
        ...


class TransformedSource:
    """A source whose batches go through a function of the user."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Fetch and transform."""
        return _transformed(self.transform, self.source.fetch(indices))

    def describe(self) -> dict[str, Any]:
        """Describe the source and name the function."""
        return {**describe(self.source), "transform": qualified_name(self.transform)}


class TransformedStream:
    """A stream whose batches go through a function of the user."""

    def __init__(self, stream: Stream, transform: Transform) -> None:
        self.stream, self.transform = stream, transform

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def collate(self, samples: list[Any]) -> Batch:
        """Collate and transform."""
        return _transformed(self.transform, self.stream.collate(samples))

    def describe(self) -> dict[str, Any]:
        """Describe the stream and name the function."""
        return {**describe(self.stream), "transform": qualified_name(self.transform)}


def make_source(
    data: Any, *, transform: Transform | None = None, collate: Collate | None = None, name: str = "train_data"
) -> Source | Stream:
    """Choose how to serve `data`. Called in the driver; raises ConfigError for anything that cannot be trained on.

    transform: batch -> batch, after the fetch. collate: list of samples -> batch, for a Dataset or a stream.
    name: how messages call the data. Values and dtypes are kept as they are.
    """
    for option, value in (("transform", transform), ("collate", collate)):
        if value is not None and not callable(value):
            raise ConfigError(f"{option}={value!r}: expected a function.")
    source = _make(data, collate, name)
    if transform is None:
        return source
    if isinstance(source, Source):
        return TransformedSource(source, transform)
    return TransformedStream(source, transform)


def label_range(source: Source | Stream) -> tuple[int, int] | None:
    """Return the least and largest target when they are integers in memory that nothing transforms, otherwise None."""
    return source.label_range() if isinstance(source, ArraySource) else None


def spare_cpus(source: Source | Stream) -> int:
    """Return the CPUs that the cluster needs beside those of the workers; with fewer, reading would wait for ever."""
    inner = source.stream if isinstance(source, TransformedStream) else source
    return 1 if isinstance(inner, RayDataStream) else 0


def describe(source: Source | Stream) -> dict[str, Any]:
    """Return what tells this data from other data, as JSON values: kind, length, shapes, dtypes, fingerprint."""
    own: Callable[[], dict[str, Any]] | None = getattr(source, "describe", None)
    if own is not None:
        return own()
    kind = {"kind": qualified_name(type(source))}
    return {**kind, "samples": len(source)} if isinstance(source, Source) else kind


def _transformed(transform: Transform, batch: Batch) -> Batch:
    changed = transform(batch)
    if changed is None:
        raise ConfigError(f"transform={qualified_name(transform)} returned None. It must return the batch.")
    return changed


def _make(data: Any, collate: Collate | None, name: str) -> Source | Stream:
    if data is None:
        raise ConfigError(f"{name} is None. Give {_ACCEPTED}.")
    if is_a(data, "ray", "Dataset") and not is_a(data, "ray", "MaterializedDataset"):
        return RayDataStream(data, name, collate)
    if is_a(data, "torch", "IterableDataset") or is_a(data, "datasets", "IterableDataset"):
        return IterableStream(data, collate)
    if isinstance(data, Stream):
        return data
    arrays = _arrays(data, collate, name)
    is_blocks = is_a(data, "ray", "MaterializedDataset")
    if arrays is None and not is_blocks and not isinstance(data, Source):
        return DatasetSource(_checked_dataset(data, name), collate)
    if collate is not None:
        raise ConfigError(f"collate= is for a Dataset or a stream; {name} is {_kind(data)}. Use transform=.")
    if arrays is not None:
        return array_source(arrays, name)
    if is_blocks:
        return RayDataSource(data, name)
    if len(data) == 0:
        raise ConfigError(f"{name} is empty: its length is 0.")
    own: Source = data
    return own


def _arrays(data: Any, collate: Collate | None, name: str) -> Any:
    """Return the arrays that `data` is or holds, None when it is something else."""
    if isinstance(data, (str, Path)):
        return read_parquet(data, name)
    if is_array(data) or isinstance(data, (tuple, list, Mapping)):
        return data
    if is_a(data, "pandas", "DataFrame"):
        if len(data.columns) == 0 or not data.columns.is_unique:
            raise ConfigError(f"{name}: the DataFrame needs columns whose names differ; found {list(data.columns)}.")
        return {column: data[column].to_numpy() for column in data.columns}
    if type(data).__name__ == "TensorDataset" and is_a(data, "torch", "TensorDataset") and collate is None:
        return data.tensors  # the same batches, and shared by the workers of a node
    return None


def _checked_dataset(data: Any, name: str) -> Any:
    if is_a(data, "torch", "DataLoader"):
        raise ConfigError(
            f"{name} is a DataLoader, which makes batches itself. Pass its dataset (loader.dataset), the batch size "
            f"as batch= and its collate_fn as collate=."
        )
    if is_a(data, "keras", "PyDataset") or is_a(data, "tensorflow", "DatasetV2"):
        raise ConfigError(f"{name} is {_kind(data)}, which makes batches itself. Give {_ACCEPTED}.")
    if hasattr(data, "__next__"):
        raise ConfigError(
            f"{name} is a {_kind(data)}: it can be read once only and not be sent to workers. "
            f"Wrap what makes it in a torch IterableDataset, or give {_ACCEPTED}."
        )
    if isinstance(data, type) or not hasattr(data, "__getitem__"):
        raise ConfigError(f"{name} is {_kind(data)}. Give {_ACCEPTED}.")
    try:
        samples = len(data)
    except (TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"{name}: the Dataset {_kind(data)} has no usable __len__ ({error}). Add one, or use an IterableDataset."
        ) from error
    if samples == 0:
        raise ConfigError(f"{name} is empty: the Dataset {_kind(data)} has length 0.")
    return data


def _kind(value: Any) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else type(value).__qualname__
