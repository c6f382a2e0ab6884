"""Show torch tensors to a group as the flat arrays that it moves, and reduce what numpy cannot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lepton_ray.collective.calls import BAND, BOR, BXOR, MAX, MIN, PRODUCT, SUM, Array, Reduction
from lepton_ray.collective.holdings import HEAP
from lepton_ray.collective.memory import missing
from lepton_ray.errors import ConfigError

# numpy has no bfloat16. As an opaque two-byte type it passes through a group, which never looks inside.
_BFLOAT16 = np.dtype([("bfloat16", "<i2")])

# The floats of one byte, which numpy does not know either. They travel, and are not reduced.
_TINY_FLOATS = {
    each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype) and each.is_floating_point and each.itemsize == 1
}
_OPAQUE = {torch.bfloat16, *_TINY_FLOATS}


def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Make a 1-D CPU tensor of undefined values where any group of this process is fastest.

    It lies in memory that processes of a machine can share, if there is such. Tensors in it are reduced in place,
    without a copy, where all ranks' tensors of the call are. When a group has failed, a rank that does not know it yet
    may still write into them: make new ones for the next group then.
    """
    if missing() is not None:
        return torch.empty(count, dtype=dtype)
    return torch.from_numpy(HEAP.empty(count * dtype.itemsize)).view(dtype)


def flat(tensor: torch.Tensor, *, is_written: bool = True) -> tuple[Array, Callable[[], object]]:
    """Show a tensor as a 1-D array, in place if it is contiguous and in host memory, otherwise as a copy.

    Returns the array, and what brings a result in it back to the tensor.
    """
    if not tensor.requires_grad and tensor.dtype not in _OPAQUE:
        try:
            array: Array = tensor.numpy()
        except (RuntimeError, TypeError):
            pass  # not in host memory, or not what it seems to be: see below
        else:
            if array.flags.c_contiguous:
                return array.reshape(-1), _nothing
    if tensor.layout != torch.strided:
        raise ConfigError(f"the collective got a {tensor.layout} tensor. Use tensor.to_dense().")
    source = tensor.detach()
    if source.is_cpu and source.is_contiguous() and not source.is_conj() and not source.is_neg():
        return _as_array(source), _nothing
    host = source.cpu().resolve_conj().resolve_neg().contiguous()
    return _as_array(host), (lambda: source.copy_(host)) if is_written else _nothing


def reduction_of(plain: Reduction, dtype: torch.dtype) -> Reduction:
    """Return the reduction for arrays that `flat` made of tensors of this dtype. Raises ConfigError if it has none."""
    if dtype.is_complex and plain in (MIN, MAX):
        raise ConfigError(f"the collective got op={plain.name.upper()} for {dtype}: complex numbers have no order.")
    if dtype in _TINY_FLOATS:
        raise ConfigError(
            f"the collective got op={plain.name.upper()} for {dtype}, which it only moves. Use tensor.float()."
        )
    if plain in (BAND, BOR, BXOR) and (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"the collective got op={plain.name.upper()} for {dtype}: only integers and bool have bits.")
    return _HALF.get((dtype, plain), plain)


def _as_array(host: torch.Tensor) -> Array:
    if host.dtype is torch.bfloat16:
        return host.reshape(-1).view(torch.int16).numpy().view(_BFLOAT16)
    if host.dtype in _TINY_FLOATS:
        return host.reshape(-1).view(torch.uint8).numpy()
    return host.numpy().reshape(-1)


def _nothing() -> None:
    """Bring nothing back: the result is where it belongs."""


def _in_torch(dtype: torch.dtype, plain: Reduction, apply: Callable[..., object]) -> Reduction:
    """Reduce two-byte floats with torch: numpy knows one of them not at all and the other without SIMD."""

    def reduce(first: Array, second: Array, out: Array) -> None:
        views = (torch.from_numpy(each.view(np.int16)).view(dtype) for each in (first, second))
        apply(*views, out=torch.from_numpy(out.view(np.int16)).view(dtype))

    return Reduction(plain.name, plain.code, reduce)


_TORCH: dict[Reduction, Callable[..., object]] = {
    SUM: torch.add,
    PRODUCT: torch.mul,
    MIN: torch.minimum,
    MAX: torch.maximum,
}
_HALF = {
    (dtype, plain): _in_torch(dtype, plain, apply)
    for dtype in (torch.float16, torch.bfloat16)
    for plain, apply in _TORCH.items()
}
