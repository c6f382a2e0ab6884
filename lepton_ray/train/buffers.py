"""Fold what the forwards of a step did to the buffers, as if one worker had run them in the order of the microbatches.

Every microbatch starts from the buffers as they were before the step (B0) and leaves B_m. For BatchNorm's moving
averages, with k the part that a forward keeps (a layer that one forward calls c times keeps k^c; c is learnt from the
first one), running microbatches 0..M-1 one after another gives

    k^M * B0  +  sum over m of  k^(M-1-m) * (B_m - k * B0)

The sum may be shared among workers in any way, so that statistics do not depend on who computed what. Plain running
means (momentum=None) give B0 + (n+1)/(n+M) * sum(B_m - B0) with n forwards before the step, and anything else counts
as a sum of changes, B0 + sum(B_m - B0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lepton_ray.train.model import Buffer
from lepton_ray.train.reduce import AllReduce


@dataclass(slots=True)
class _Group:
    """Buffers of one dtype, device and rule, moved into one flat tensor that they are views of."""

    keep: float | None | torch.Tensor
    """A float64 number for each element where layers are called several times."""
    flat: torch.Tensor
    before: torch.Tensor
    change: torch.Tensor
    """Float64: what this worker's microbatches contribute."""
    members: list[Buffer]
    count: torch.Tensor | None


class BufferFold:
    """The changing buffers of one copy of the model. Call order: `begin`, (`enter`, forward, `leave`)*,
    `reduce`, then `apply` or `discard`."""

    def __init__(self, buffers: Sequence[Buffer], allreduce: AllReduce | None) -> None:
        self._allreduce = allreduce
        self._groups = [_gather(members) for members in _by_rule(buffers)]
        self._total = 0
        self._knows_calls = False

    def begin(self, total: int) -> None:
        """Start a step in which `total` microbatches (of all workers) are not empty."""
        self._total = total
        for group in self._groups:
            group.before.copy_(group.flat)
            group.change.zero_()

    def enter(self) -> None:
        """Set the buffers as they were before the step; the next forward starts from there."""
        for group in self._groups:
            for buffer in group.members:
                buffer.reclaim()  # after a forward without a `leave`, too
            group.flat.copy_(group.before)

    def leave(self, microbatch: int) -> None:
        """Take in what the forward of `microbatch` did."""
        for group in self._groups:
            for buffer in group.members:
                buffer.reclaim()
        if not self._knows_calls:
            self._learn_calls(lambda group: group.flat - group.before)
        for group in self._groups:
            keep = 1.0 if group.keep is None else group.keep
            weight = keep ** (self._total - 1 - microbatch)
            group.change += (group.flat.double() - group.before.double() * keep) * weight

    def reduce(self) -> None:
        """Sum the contributions of all workers."""
        if not self._groups or not self._allreduce:
            return
        joined = torch.cat([group.change.cpu() for group in self._groups])
        self._allreduce(joined)
        for group, part in zip(self._groups, joined.split([g.change.numel() for g in self._groups])):
            group.change.copy_(part)

    def apply(self) -> None:
        """Set the buffers to what follows the step."""
        if not self._knows_calls:  # this worker ran no forward yet; the others' counts tell
            self._learn_calls(lambda group: group.change / self._total)
        self.enter()  # counts are read as they were before the step
        rules = [_rule(group, self._total) for group in self._groups]
        for group, (old, new) in zip(self._groups, rules):
            group.flat.copy_(group.before.double() * old + group.change * new)

    def discard(self) -> None:
        """Set the buffers back to what they were before the step."""
        self.enter()

    def _learn_calls(self, counted: Callable[[_Group], torch.Tensor]) -> None:
        """Learn how often one forward calls each layer, from what it adds to the layers' counts."""
        self._knows_calls = True
        counts = {id(buffer.count) for group in self._groups for buffer in group.members if buffer.count is not None}
        calls = {
            id(buffer.tensor): float(added)
            for group in self._groups
            if any(id(buffer.tensor) in counts for buffer in group.members)
            for buffer, added in zip(group.members, _starts(group, counted(group)))
        }
        for group in self._groups:
            own = [calls.get(id(buffer.count), 1.0) for buffer in group.members]
            if isinstance(group.keep, float) and any(c != 1.0 for c in own):
                sizes = torch.tensor([buffer.tensor.numel() for buffer in group.members])
                powers = torch.tensor(own, dtype=torch.float64).repeat_interleave(sizes)
                group.keep = group.keep ** powers.to(group.flat.device)


def _starts(group: _Group, values: torch.Tensor) -> list[float]:
    """Return the first value of each member."""
    parts = values.split([buffer.tensor.numel() for buffer in group.members])
    return [float(part[0]) if len(part) else 0.0 for part in parts]


def _rule(group: _Group, total: int) -> tuple[float | torch.Tensor, float]:
    """Return the factors of B0 and of the summed changes."""
    if group.keep is None:
        assert group.count is not None
        seen = int(group.count)
        return 1.0, (seen + 1) / (seen + total)
    return group.keep**total, 1.0


def _by_rule(buffers: Sequence[Buffer]) -> list[list[Buffer]]:
    groups: dict[tuple[object, ...], list[Buffer]] = {}
    for buffer in buffers:
        tensor = buffer.tensor
        key = (tensor.dtype, tensor.device, buffer.keep, id(buffer.count) if buffer.keep is None else None)
        groups.setdefault(key, []).append(buffer)
    return list(groups.values())


def _gather(members: list[Buffer]) -> _Group:
    first = members[0]
    flat = torch.cat([buffer.tensor.detach().reshape(-1) for buffer in members])
    views = flat.split([buffer.tensor.numel() for buffer in members])
    for buffer, view in zip(members, views):
        buffer.tensor.data = view.view(buffer.tensor.shape)
    return _Group(
        keep=first.keep,
        flat=flat,
        before=flat.clone(),
        change=torch.zeros(flat.numel(), dtype=torch.float64, device=flat.device),
        members=members,
        count=first.count,
    )
