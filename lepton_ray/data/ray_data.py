"""Serve ray.data: a materialised dataset by index out of its blocks, any other one as a stream.

Ray is imported in the functions, since a user without ray.data need not wait for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.arrays import numeric
from lepton_ray.data.batch import Batch
from lepton_ray.data.datasets import qualified_name
from lepton_ray.errors import ConfigError

# A cached block is pinned in the node's object store, where all its workers map the same bytes.
_CACHE_BYTES = 1 << 30

Columns = dict[str, NDArray[Any]]


class RayDataSource:
    """A source over the blocks of a materialised dataset; a batch is a dict of its columns.

    Sample ids follow the order of the blocks. ray.data keeps that order from one execution to the next only when the
    dataset was made with `DataContext.execution_options.preserve_order = True`, which an exact resume therefore needs.
    The blocks live as long as the process that materialised them.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self._cache: OrderedDict[int, Columns] = OrderedDict()
        # (reference, first row, rows) of each part; a bundle may show only a slice of a block.
        parts: list[tuple[Any, int, int]] = []
        for bundle in dataset.iter_internal_ref_bundles():
            for entry, shown in zip(bundle.blocks, bundle.slices or (None,) * len(bundle.blocks)):
                first = shown.start_offset if shown else 0
                rows = shown.num_rows if shown else entry.metadata.num_rows
                if rows:
                    parts.append((entry.ref, first, rows))
        if not parts:
            raise ConfigError(f"{name}: the ray.data.Dataset has no rows.")
        self._parts = parts
        self._ends = np.cumsum([rows for _, _, rows in parts])
        self._layout = {key: (array.shape[1:], array.dtype) for key, array in self._load(0).items()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Gather rows into new tensors."""
        import torch

        out = {key: np.empty((len(indices), *shape), dtype) for key, (shape, dtype) in self._layout.items()}
        parts = np.searchsorted(self._ends, indices, side="right")
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            rows = indices[places] - (self._ends[part] - self._parts[part][2])
            for key, array in self._columns(part).items():
                out[key][places] = array.take(rows, axis=0)
        return {key: torch.from_numpy(array) for key, array in out.items()}

    def describe(self) -> dict[str, Any]:
        """Return kind, length and columns. No content: blocks may come in another order at each execution."""
        layout = {key: {"shape": [len(self), *shape], "dtype": d.name} for key, (shape, d) in self._layout.items()}
        return {"kind": "ray.data", "samples": len(self), "columns": layout}

    def _columns(self, part: int) -> Columns:
        if part in self._cache:
            self._cache.move_to_end(part)
            return self._cache[part]
        columns = self._load(part)
        layout = {key: (array.shape[1:], array.dtype) for key, array in columns.items()}
        if layout != self._layout:
            raise ConfigError(f"{self.name}: block {part} has {layout}, block 0 has {self._layout}. Make them alike.")
        self._cache[part] = columns
        while len(self._cache) > 1 and sum(a.nbytes for c in self._cache.values() for a in c.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return columns

    def _load(self, part: int) -> Columns:
        import ray
        from ray.data.block import BlockAccessor

        reference, first, rows = self._parts[part]
        block: Any = BlockAccessor.for_block(ray.get(reference)).to_numpy()
        dense = {key: _dense(array, f"{self.name}: column {key!r}") for key, array in block.items()}
        return {key: array[first : first + rows] for key, array in dense.items()}


class RayDataStream:
    """A stream over a dataset that is not materialised: every pass of every worker executes it, in a fixed order.

    A sample is a row, as a dict. The execution runs in tasks, so it needs a CPU that no worker holds: see `spare_cpus`.
    """

    def __init__(self, dataset: Any, name: str, collate: Callable[[list[Any]], Batch] | None = None) -> None:
        self.dataset, self.name, self._collate = dataset, name, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        context = self.dataset.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        for block in self.dataset.iter_batches(batch_size=None, batch_format="numpy"):
            for row in zip(*block.values()):
                yield dict(zip(block, row))

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Stack consecutive rows into a dict of tensors."""
        if self._collate is not None:
            return self._collate(samples)
        import torch

        columns = {key: _stack([row[key] for row in samples], f"{self.name}: column {key!r}") for key in samples[0]}
        return {key: torch.from_numpy(array) for key, array in columns.items()}

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        collate = {} if self._collate is None else {"collate": qualified_name(self._collate)}
        return {"kind": "ray.data stream", **collate}


def _dense(array: NDArray[Any], where: str) -> NDArray[Any]:
    return _stack(array, where) if array.dtype.kind == "O" else numeric(array, where)


def _stack(rows: Any, where: str) -> NDArray[Any]:
    try:
        return numeric(np.stack(rows), where)
    except ValueError as error:
        raise ConfigError(f"{where} cannot be stacked into one array: {error}") from error
