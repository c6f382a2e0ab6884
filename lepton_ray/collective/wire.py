"""Encode float32 for the way between nodes: bf16, or int8 with a scale for each 256 numbers. numpy only.

What is added up is float32 again, and all ranks decode the same bytes, so all get the same bits. Encoding what was
decoded gives the same bytes: a number that has been rounded once stays what it is.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_ray.errors import ConfigError
from lepton_ray.plan.transport import Wire

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 256
"""Numbers under one scale of int8."""
# Smallest normal number: a scale below it would lose bits. Blocks of nothing but zeros have it, too.
_LEAST = np.float32(2**-126)
# Added to a number below 2**22, it leaves the number, rounded to nearest even, in the low bits.
_ROUNDING = np.float32(1.5 * 2**23)


class Codec(Protocol):
    """A wire format. Holds scratch memory: one thread at a time."""

    def size(self, count: int) -> int:
        """Return the bytes of so many numbers."""
        ...

    def encode(self, values: Floats, out: Bytes) -> None: ...

    def decode(self, data: Bytes, out: Floats) -> None: ...


class Bf16:
    """The upper half of a float32, rounded to nearest even. Relative error up to 2**-8; inf and nan stay."""

    def __init__(self) -> None:
        self._work = np.empty(0, np.uint32)

    def size(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Floats, out: Bytes) -> None:
        if self._work.size < values.size:
            self._work = np.empty(values.size, np.uint32)
        work, bits = self._work[: values.size], values.view(np.uint32)
        np.right_shift(bits, 16, out=work)
        work &= 1
        work += 0x7FFF
        work += bits
        work >>= 16
        halves = out.view(np.uint16)
        np.copyto(halves, work, casting="unsafe")
        is_nan = np.isnan(values)
        if is_nan.any():  # its bits may have been carried into those of inf, or of zero
            halves[is_nan] = 0x7FC0

    def decode(self, data: Bytes, out: Floats) -> None:
        np.left_shift(data.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


class Int8:
    """Scales of float32, then a byte for each number: a multiple of its block's scale, up to 127 times.

    Error up to 1/253 of the largest number of the block. With inf or nan in it, all of a block becomes nan.
    """

    def __init__(self) -> None:
        self._work = np.empty((0, BLOCK), np.float32)

    def size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + count

    def encode(self, values: Floats, out: Bytes) -> None:
        scales, codes = self._parts(out, values.size)
        blocks, rest = divmod(values.size, BLOCK)
        whole = blocks * BLOCK
        self._encode(values[:whole].reshape(blocks, BLOCK), scales[:blocks], codes[:whole].reshape(blocks, BLOCK))
        if rest:
            last = np.zeros((1, BLOCK), np.float32)
            last[0, :rest] = values[whole:]
            last_codes = np.empty((1, BLOCK), np.int8)
            self._encode(last, scales[blocks:], last_codes)
            codes[whole:] = last_codes[0, :rest]

    def decode(self, data: Bytes, out: Floats) -> None:
        scales, codes = self._parts(data, out.size)
        blocks, rest = divmod(out.size, BLOCK)
        whole = blocks * BLOCK
        out[:] = codes
        rows = out[:whole].reshape(blocks, BLOCK)
        with np.errstate(invalid="ignore"):
            rows *= scales[:blocks, None]
            if rest:
                out[whole:] *= scales[blocks]

    def _parts(self, data: Bytes, count: int) -> tuple[Floats, NDArray[np.int8]]:
        split = 4 * -(-count // BLOCK)
        return data[:split].view(np.float32), data[split:].view(np.int8)

    def _encode(self, values: Floats, scales: Floats, codes: NDArray[np.int8]) -> None:
        if len(self._work) < len(values):
            self._work = np.empty_like(values)
        work = self._work[: len(values)]
        # As integers, numbers without a sign have the same order, nan comes last, and numpy is twice as fast.
        sizes = work.view(np.int32)
        np.bitwise_and(values.view(np.int32), 0x7FFFFFFF, out=sizes)
        np.max(sizes, axis=1, out=scales.view(np.int32))
        scales /= 127
        np.maximum(scales, _LEAST, out=scales)
        # Rounded up to 17 significant bits: times 127 it is exact, so that encoding again finds the same scale.
        bits = scales.view(np.uint32)
        bits += 127
        bits &= ~np.uint32(127)
        with np.errstate(invalid="ignore"):
            np.multiply(values, (1 / scales)[:, None], out=work)
            work += _ROUNDING
        np.copyto(codes, work.view(np.int32), casting="unsafe")


CODECS: dict[Wire, type[Codec]] = {Wire.BF16: Bf16, Wire.INT8: Int8}


class Feedback:
    """What a rank's rounding has lost in the sums of one buffer so far; the next sum gets it back.

    Pass the same one with the same buffer in every call, on every rank. Then what all calls together give is off by
    what the last one lost, instead of by the sum of all errors.
    """

    def __init__(self, lost: Floats | None = None) -> None:
        """lost: where to keep it; made at the first sum by default."""
        self._lost = lost

    def of(self, size: int) -> Floats:
        """Return the losses for a buffer of so many numbers; whoever encodes writes them."""
        if self._lost is None:
            self._lost = np.zeros(size, np.float32)
        elif self._lost.size != size:
            raise ConfigError(
                f"a Feedback for a buffer of {self._lost.size} numbers came with one of {size}. Keep one per buffer."
            )
        return self._lost
