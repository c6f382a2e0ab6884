"""What ranks say about the operation that they begin, so that a difference between them is named, never mixed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.errors import ConfigError
from lepton_ray.plan.transport import Wire

Array = NDArray[Any]  # any dtype that numpy can hold without objects


@dataclass(frozen=True, slots=True)
class Reduction:
    """How two arrays become one."""

    name: str
    code: int
    apply: Callable[..., object]
    """Called as apply(first, second, out=out) with arrays of one size; out may be one of the others."""


SUM = Reduction("sum", 1, np.add)
PRODUCT = Reduction("product", 2, np.multiply)
MIN = Reduction("min", 3, np.minimum)
MAX = Reduction("max", 4, np.maximum)
BAND = Reduction("band", 5, np.bitwise_and)
BOR = Reduction("bor", 6, np.bitwise_or)
BXOR = Reduction("bxor", 7, np.bitwise_xor)
_REDUCTION_NAMES = ("", *(each.name for each in (SUM, PRODUCT, MIN, MAX, BAND, BOR, BXOR)))

_WIRES = tuple(wire.value for wire in Wire)

ALLREDUCE, BROADCAST, ALLGATHER, REDUCE_SCATTER, REDUCE, MESSAGE, BARRIER = range(7)
CALLS = ("allreduce", "broadcast", "allgather", "reducescatter", "reduce", "send/recv", "barrier")

# Call, reduction and wire format, dtype kind, item size, root, sequence number, elements. All ranks of an operation
# must say the same, so a comparison of bytes is the whole check.
HEADER = struct.Struct("<4BIIQ")


def header_of(
    call: int, dtype: np.dtype, count: int, op: Reduction | None, root: int, number: int, wire: int = 0
) -> bytes:
    """Return what a rank says when it begins an operation. wire: code of a format, 0 for arrays as they are."""
    how = (op.code if op else 0) | wire << 4
    return HEADER.pack(call, how, ord(dtype.kind), dtype.itemsize & 0xFF, root, number, count)


def check_array(call: int, array: Array) -> None:
    """Raise ConfigError for an array that cannot travel as it is."""
    dtype = array.dtype
    if array.ndim != 1 or not array.flags.c_contiguous or not dtype.isnative or dtype.hasobject:
        raise ConfigError(
            f"{CALLS[call]} got an array of shape {array.shape} and dtype {dtype}: expected one dimension, "
            "C-contiguous, numbers in native byte order. Use np.ascontiguousarray(x).reshape(-1)."
        )


def check_rows(call: int, world: int, rows: Sequence[Array], like: Array) -> None:
    """Raise ConfigError for a list that does not hold, for each rank, an array like this one."""
    if len(rows) != world:
        raise ConfigError(f"{CALLS[call]} got a list of {len(rows)} arrays for {world} ranks.")
    for row in rows:
        check_array(call, row)
        if row.size != like.size or row.dtype != like.dtype:
            raise ConfigError(
                f"{CALLS[call]} got {row.size} x {row.dtype} beside {like.size} x {like.dtype}: all must be alike."
            )


def mismatch(rank: int, own: bytes, peer: int, other: bytes) -> ConfigError:
    """Say which two calls met that do not belong together."""
    return ConfigError(
        f"rank {rank} calls {_describe(own)} but rank {peer} calls {_describe(other)}. All ranks of a group "
        "must make the same calls in the same order, with arrays of equal size and dtype."
    )


def _describe(header: bytes) -> str:
    call, reduction, kind, itemsize, root, number, count = HEADER.unpack(header)
    reduction, wire = reduction & 15, reduction >> 4
    if call >= len(CALLS) or wire >= len(_WIRES) or reduction >= len(_REDUCTION_NAMES):
        return "something unknown"
    detail = [_REDUCTION_NAMES[reduction]] if reduction else []
    detail += [_WIRES[wire]] if wire else []
    detail += [f"rank {root}"] if call in (BROADCAST, REDUCE, MESSAGE) else []
    return f"{CALLS[call]}({', '.join(detail)}) #{number} of {count} x {chr(kind)}{itemsize}"
