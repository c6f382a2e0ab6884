"""Serve arrays in memory: gather rows by index out of buffers that all workers of a node share.

Torch tensors are kept as numpy arrays, because Ray maps those from its object store without a copy. They are read-only
in a worker, so nothing here may hand out a view of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.batch import Batch, split_target, tree_map
from lepton_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

_NUMPY_FLOATS = ("torch.float16", "torch.float32", "torch.float64")
_FINGERPRINT_BYTES = 1 << 20
_FINGERPRINT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Column:
    """One array, samples along its first dim."""

    array: Array
    torch_dtype: str | None = None
    """The torch dtype, for example "bfloat16", of what `array` holds as bare integers since numpy lacks the dtype."""

    def take(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Gather rows into a new tensor."""
        import torch  # not at the top: a driver describes its data without loading torch

        # numpy's take is up to twice as fast as torch.index_select for batches, and as a slice even for adjacent rows.
        rows = torch.from_numpy(self.array.take(indices, axis=0))
        return rows if self.torch_dtype is None else rows.view(getattr(torch, self.torch_dtype))

    @property
    def dtype(self) -> str:
        """Name of the dtype that `take` returns."""
        return self.torch_dtype or self.array.dtype.name


class ArraySource:
    """A source over columns: a Column, or a (nested) tuple or dict of them, of equal length."""

    def __init__(self, columns: Batch) -> None:
        self.columns = columns
        self._samples = len(_flat(columns)[0][1].array)

    def __len__(self) -> int:
        return self._samples

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Gather samples into new tensors."""
        return tree_map(lambda column: column.take(indices), self.columns)

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and largest target when the targets are one array of integers, otherwise None."""
        try:
            _, target = split_target(self.columns)
        except ConfigError:  # a dict without a target, as for predict
            return None
        if not isinstance(target, Column) or target.torch_dtype is not None or target.array.dtype.kind not in "iu":
            return None
        return int(target.array.min()), int(target.array.max())

    def describe(self) -> dict[str, Any]:
        """Return kind, length, columns and a sha256 over shapes, dtypes and evenly spaced rows (about 1 MB at most)."""
        columns = {path: (column.array, column.dtype) for path, column in _flat(self.columns)}
        digest = hashlib.sha256(repr([(p, a.shape, d) for p, (a, d) in columns.items()]).encode())
        for array, _ in columns.values():
            row_bytes = max(1, array[:1].nbytes)
            budget = max(1, _FINGERPRINT_BYTES // len(columns))
            rows = max(1, min(len(array), _FINGERPRINT_ROWS, budget // row_bytes))
            for row in np.linspace(0, len(array) - 1, rows).astype(np.int64):
                digest.update(array[row].reshape(-1)[: max(1, budget // array.itemsize)].tobytes())
        return {
            "kind": "arrays",
            "samples": self._samples,
            "columns": {path: {"shape": list(array.shape), "dtype": dtype} for path, (array, dtype) in columns.items()},
            "sha256": digest.hexdigest(),
        }


def is_array(value: Any) -> bool:
    """Tell whether `value` is an array of numpy, torch, JAX, TensorFlow, or a Series, without importing any."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("__array__", "shape", "dtype"))


def is_a(value: Any, package: str, class_name: str) -> bool:
    """Tell whether `value` is an instance of a class of a package, which is not imported for that."""
    return any(c.__name__ == class_name and c.__module__.split(".")[0] == package for c in type(value).__mro__)


def array_source(data: Any, name: str) -> ArraySource:
    """Check arrays, or a (nested) tuple, list or dict of them, and make a source of them. Raises ConfigError.

    name: how messages call the data. Arrays are copied only when they are not contiguous in memory.
    """
    columns = _columns(data, name)
    flat = _flat(columns)
    first_path, first = flat[0]
    for path, column in flat[1:]:
        if len(column.array) != len(first.array):
            raise ConfigError(
                f"{name}: {first_path} has {len(first.array)} samples and {path} has {len(column.array)}. Every array "
                f"needs one row per sample (a list of samples becomes one array with numpy.stack)."
            )
    if len(first.array) == 0:
        raise ConfigError(f"{name} is empty: {first_path} has shape {first.array.shape}. Give at least one sample.")
    return ArraySource(columns)


def numeric(array: Array, where: str) -> Array:
    """Return `array` in native byte order. Raises ConfigError when torch has no dtype for it."""
    kind, item_bytes = array.dtype.kind, array.dtype.itemsize
    if kind in "biufc" and not (kind == "f" and item_bytes > 8) and not (kind == "c" and item_bytes > 16):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if kind == "O":
        advice = "Rows of unequal length or mixed types cannot form a tensor: pad them to one shape, or give a Dataset"
    elif kind in "USMm":
        advice = "Encode it as numbers"
    else:
        advice = "Convert it to a dtype that torch knows"
    raise ConfigError(f"{where} has dtype {array.dtype}. {advice}.")


def _columns(value: Any, where: str) -> Batch:
    if is_array(value):
        return _column(value, where)
    if isinstance(value, Mapping) and value:
        return {key: _columns(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (tuple, list)) and value:
        odd = [entry for entry in value if not is_array(entry) and not isinstance(entry, (tuple, list, Mapping))]
        if odd:
            advice = "one array per entry" if isinstance(value, tuple) else "an array, for example numpy.asarray(...)"
            if hasattr(odd[0], "to_numpy"):
                advice = "its matrix, .to_numpy()"
            raise ConfigError(f"{where} is a {type(value).__name__} that holds {_type(odd[0])}. Give {advice}.")
        return tuple(_columns(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if value is None:
        raise ConfigError(f"{where} is None. Give an array, or leave it out.")
    if isinstance(value, (Mapping, tuple, list)):
        raise ConfigError(f"{where} is an empty {type(value).__name__}. Give at least one array.")
    raise ConfigError(f"{where} is {_type(value)}. Give a numpy or torch array.")


def _column(value: Any, where: str) -> Column:
    if _type(value).startswith("numpy.ma."):
        raise ConfigError(f"{where} is a masked array, and the mask would be lost. Fill it first: .filled(value).")
    torch_dtype = None
    try:
        if is_a(value, "torch", "Tensor"):
            value = value.detach().cpu().contiguous()
            # numpy lacks bfloat16 and the 8-bit floats: keep their bits as integers.
            if value.is_floating_point() and str(value.dtype) not in _NUMPY_FLOATS:
                import torch

                torch_dtype = str(value.dtype).removeprefix("torch.")
                value = value.view({1: torch.uint8, 2: torch.int16}[value.element_size()])
            value = value.numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{where} is {_type(value)} and cannot become a plain array: {error}") from error
    if array.ndim == 0:
        raise ConfigError(f"{where} is a single number. Give an array with one row per sample.")
    return Column(np.ascontiguousarray(numeric(array, where)), torch_dtype)


def _flat(columns: Batch, path: str = "") -> list[tuple[str, Column]]:
    if isinstance(columns, Column):
        return [(path or "x", columns)]
    if isinstance(columns, dict):
        entries = [(str(key), value) for key, value in columns.items()]
    elif len(columns) == 2 and not path:
        entries = list(zip("xy", columns))
    else:
        entries = [(str(i), value) for i, value in enumerate(columns)]
    return [leaf for key, value in entries for leaf in _flat(value, f"{path}.{key}" if path else key)]


def _type(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
