"""Read Parquet files into arrays, one per column. Needs pyarrow only."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.data.arrays import numeric
from lepton_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

_RAY_ADVICE = "prepare it with ray.data.read_parquet(...).map_batches(...)"


def read_parquet(path: str | Path, name: str) -> dict[str, NDArray[Any]]:
    """Return the columns of one file, a folder or a glob, in sorted order of file names.

    Lists of equal length become further dims. Raises ConfigError with the file and the column that cannot be an array.
    """
    import pyarrow.parquet

    pieces: dict[str, list[NDArray[Any]]] = {}
    origin: Path | None = None
    for file in _files(path, name):
        try:
            # Not read_table: that guesses further columns from folder names.
            table = pyarrow.parquet.ParquetFile(file).read()
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{name}: {file} cannot be read as a Parquet file: {error}") from error
        if origin is not None and set(table.column_names) != set(pieces):
            raise ConfigError(
                f"{name}: {file} has the columns {', '.join(table.column_names)}, and {origin} has "
                f"{', '.join(pieces)}. All files need the same columns."
            )
        origin = origin or file
        for field in table.schema:
            where = f"{name}: column {field.name!r} of {file}"
            if b"ARROW:extension:name" in (field.metadata or {}):
                # Unknown to pyarrow, so it would show as flat lists and lose the shape of its rows.
                raise ConfigError(f"{where} has an extension type. Read it with ray.data.read_parquet(...) instead.")
            arrays = pieces.setdefault(field.name, [])
            for chunk in table.column(field.name).chunks:
                array = _dense(chunk, where)
                if arrays and (array.shape[1:], array.dtype) != (arrays[0].shape[1:], arrays[0].dtype):
                    raise ConfigError(
                        f"{where} has rows of shape {array.shape[1:]} and dtype {array.dtype}; earlier rows have "
                        f"{arrays[0].shape[1:]} and {arrays[0].dtype}. Make them alike, or {_RAY_ADVICE}."
                    )
                arrays.append(array)
    if not any(len(array) for arrays in pieces.values() for array in arrays):
        raise ConfigError(f"{name}: {path} holds no rows.")
    return {column: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for column, arrays in pieces.items()}


def _files(path: str | Path, name: str) -> list[Path]:
    if "://" in str(path):
        raise ConfigError(f"{name}={str(path)!r}: paths must be local. Pass ray.data.read_parquet({str(path)!r}).")
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(place.rglob("*.parquet"))
    else:
        found = [Path(file) for file in sorted(glob.glob(str(place), recursive=True)) if Path(file).is_file()]
    if not found:
        what = "no file in this folder ends in .parquet" if place.is_dir() else "no such file, and no file matches"
        raise ConfigError(f"{name}={str(path)!r}: {what} (looked from {Path.cwd()}). Give a file, folder or glob.")
    return found


def _dense(array: pyarrow.Array, where: str) -> NDArray[Any]:
    import pyarrow
    import pyarrow.compute

    if array.null_count:
        raise ConfigError(f"{where} has {array.null_count} missing values. Fill them, or {_RAY_ADVICE}.")
    kind = array.type
    if isinstance(kind, pyarrow.FixedShapeTensorType):
        return numeric(array.to_numpy_ndarray(), where)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise ConfigError(
                f"{where} has lists of {min(lengths)} to {max(lengths)} values. Pad them, or {_RAY_ADVICE}."
            )
        values = _dense(array.flatten(), where)
        return values.reshape((len(array), *lengths, *values.shape[1:]))
    if not (pyarrow.types.is_boolean(kind) or pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)):
        raise ConfigError(f"{where} has type {kind}, which is no number. Encode or drop it, or {_RAY_ADVICE}.")
    return numeric(array.to_numpy(zero_copy_only=False), where)
