"""Check what a torch program hands to a collective before it is issued, so that a mistake of a call ends no group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lepton_ray.collective.calls import BAND, BOR, BXOR, MAX, MIN, PRODUCT, SUM, Reduction
from lepton_ray.collective.tensors import reduction_of
from lepton_ray.errors import ConfigError

Tensor = torch.Tensor

_REDUCTIONS = {
    dist.ReduceOp.SUM: SUM,
    dist.ReduceOp.AVG: SUM,
    dist.ReduceOp.PRODUCT: PRODUCT,
    dist.ReduceOp.MIN: MIN,
    dist.ReduceOp.MAX: MAX,
    dist.ReduceOp.BAND: BAND,
    dist.ReduceOp.BOR: BOR,
    dist.ReduceOp.BXOR: BXOR,
}


class Reducing(NamedTuple):
    """What a reduction of torch is here."""

    how: Reduction
    """For the arrays of tensors of one dtype."""
    is_mean: bool
    """Whether the result, a sum, is to be divided."""


def reducing(opts: Any, tensor: Tensor) -> Reducing:
    """Read a reduction, given as options or in their place. Raises ConfigError if there is none for this tensor."""
    return _reducing(getattr(opts, "reduceOp", opts), tensor.dtype, tensor.layout)


@cache  # it takes as long as a small sum
def _reducing(op: dist.ReduceOp, dtype: torch.dtype, layout: torch.layout) -> Reducing:
    plain = next((ours for theirs, ours in _REDUCTIONS.items() if op == theirs), None)
    if plain is None:
        names = ", ".join(theirs.name for theirs in _REDUCTIONS)
        raise ConfigError(f"the backend lepton got op={op}: expected one of {names}.")
    is_mean = op == dist.ReduceOp.AVG
    if is_mean and not (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"the backend lepton got op=AVG for {dtype}: expected floats. Use SUM, and divide.")
    if layout == torch.sparse_coo and plain != SUM:
        raise ConfigError(
            f"the backend lepton got op={plain.name.upper()} for a sparse tensor: expected SUM or AVG. "
            "Use tensor.to_dense()."
        )
    return Reducing(reduction_of(plain, dtype), is_mean)


def only(call: str, those: Any) -> Any:
    """Return the one element of a list: torch's lists are for several devices of a process, which nobody has here."""
    if isinstance(those, Tensor):
        return those
    if len(those) != 1:
        raise ConfigError(f"{call} got a list of {len(those)} tensors: expected one.")
    return those[0]


def check(call: str, tensor: Tensor) -> None:
    if not tensor.is_cpu:
        raise ConfigError(f"{call} got a tensor on {tensor.device}. The backend lepton takes CPU tensors.")
    if tensor.layout != torch.strided and not (call.startswith("allreduce") and tensor.layout == torch.sparse_coo):
        raise ConfigError(f"{call} got a {tensor.layout} tensor. Use tensor.to_dense().")


def check_parts(world: int, call: str, parts: Sequence[Tensor], model: Tensor) -> None:
    """Check a list that holds one tensor like `model` for each rank."""
    if len(parts) != world:
        raise ConfigError(f"{call} got a list of {len(parts)} tensors for {world} ranks.")
    for part in parts:
        if part.numel() != model.numel() or part.dtype != model.dtype:
            raise ConfigError(
                f"{call} got a tensor of shape {tuple(part.shape)} and dtype {part.dtype} beside one of shape "
                f"{tuple(model.shape)} and dtype {model.dtype}: all must be alike."
            )


def check_whole(world: int, call: str, whole: Tensor, part: Tensor) -> None:
    """Check a tensor that holds one like `part` for each rank."""
    if whole.numel() != part.numel() * world or whole.dtype != part.dtype:
        raise ConfigError(
            f"{call} got a tensor of shape {tuple(whole.shape)} and dtype {whole.dtype} for {world} ranks and parts of "
            f"shape {tuple(part.shape)} and dtype {part.dtype}."
        )


def split(world: int, tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Cut a tensor by rows, evenly if nothing else is said."""
    if not rows and tensor.shape[0] % world == 0:
        rows = [tensor.shape[0] // world] * world
    if len(rows) != world or sum(rows) != tensor.shape[0]:
        raise ConfigError(f"alltoall got a tensor of {tensor.shape[0]} rows for {world} ranks, cut into {list(rows)}.")
    return list(tensor.detach().split(list(rows)))
