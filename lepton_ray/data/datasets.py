"""Serve torch Datasets: map-style by index, iterable ones as a stream. Other libraries' look-alikes work as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.batch import Batch

Collate = Callable[[list[Any]], Batch]


class DatasetSource:
    """A source over an object with `__len__` and `__getitem__` (or `__getitems__`, one call per batch).

    The dataset is pickled, so each worker holds a copy of it; arrays given as (x, y) are shared instead.
    """

    def __init__(self, dataset: Any, collate: Collate | None = None) -> None:
        self.dataset, self._collate = dataset, collate
        self._samples = len(dataset)

    def __len__(self) -> int:
        return self._samples

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Ask the dataset for each sample, in order, and collate them."""
        wanted = indices.tolist()
        several = getattr(self.dataset, "__getitems__", None)
        return collated(several(wanted) if several else [self.dataset[index] for index in wanted], self._collate)

    def describe(self) -> dict[str, Any]:
        """Return kind, length and class. No content: asking for samples runs user code that may draw at random."""
        return {"kind": "dataset", "samples": self._samples, **_names(self.dataset, self._collate)}


class IterableStream:
    """A stream over an object whose every `iter` starts from its first sample, such as a torch IterableDataset."""

    def __init__(self, dataset: Any, collate: Collate | None = None) -> None:
        self.dataset, self._collate = dataset, collate

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def collate(self, samples: list[Any]) -> Batch:
        """Make one batch of consecutive samples."""
        return collated(samples, self._collate)

    def describe(self) -> dict[str, Any]:
        """Return kind and class."""
        return {"kind": "stream", **_names(self.dataset, self._collate)}


def collated(samples: Sequence[Any], collate: Collate | None) -> Batch:
    """Make one batch of samples: by `collate`, or as torch's DataLoader does without one."""
    if collate is not None:
        return collate(list(samples))
    from torch.utils.data import default_collate  # not at the top: a driver describes its data without loading torch

    return default_collate(list(samples))


def qualified_name(value: Any) -> str:
    """Name a function, or the class of any other object, with its module."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _names(dataset: Any, collate: Collate | None) -> dict[str, str]:
    names = {"class": qualified_name(type(dataset))}
    return names if collate is None else {**names, "collate": qualified_name(collate)}
