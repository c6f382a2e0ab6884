"""Fold what the forwards of a step did to the buffers, as if one worker had run them in the order of the microbatches.

Every microbatch starts from the buffers as they were before the step (B0) and leaves B_m. For BatchNorm's moving
averages, with k the part that a forward keeps (a layer that one forward calls c times keeps k^c; c is learnt from the
first one), running microbatches 0..M-1 one after another gives

    k^M * B0  +  sum over m of  k^(M-1-m) * (B_m - k * B0)   =   B0  +  sum over m of  k^(M-1-m) * (B_m - B0)

The sum may be shared among workers in any way, so that statistics do not depend on who computed what. k = 0 gives what
the last microbatch left. Plain running means (momentum=None) give B0 + (n+1)/(n+M) * sum(B_m - B0) with n forwards
before the step, and anything else counts as a sum of changes, B0 + sum(B_m - B0). What no forward changes keeps its
bits; buffers are sent from the first step on that changed one of their type and shape, and constants never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lepton_ray.plan.tree import PLAIN, Turn
from lepton_ray.train.model import Buffer
from lepton_ray.train.ordered import Aside, Tree
from lepton_ray.train.reduce import AllReduce


@dataclass(slots=True)
class _Group:
    """Buffers of one dtype, device and rule, moved into one flat tensor that they are views of."""

    keep: float | None | torch.Tensor
    """A float64 number for each element where layers are called several times."""
    is_sum: bool
    """The changes count as they are (keep=1.0)."""
    flat: torch.Tensor
    before: torch.Tensor
    change: torch.Tensor | None
    """What this worker's microbatches contribute, float64; None as long as this worker has seen none."""
    is_sent: bool
    """All workers know that it changes."""
    members: list[Buffer]
    count: torch.Tensor | None
    aside: Aside = field(default_factory=Aside)
    """Changes of earlier microbatches, where a tree wants them apart."""

    def open(self, aside: int = 0) -> torch.Tensor:
        """Return `change`, which begins with zeros, as do as many that were put aside."""
        if self.change is None:
            self.change = torch.zeros(self.flat.numel(), dtype=torch.float64, device=self.flat.device)
            for _ in range(aside):
                self.aside.put(self.change)
        return self.change


class BufferFold:
    """The changing buffers of one copy of the model. Call order: `begin`, (`enter`, forward, `leave`)*,
    `reduce`, then `apply` or `discard`."""

    def __init__(self, buffers: Sequence[Buffer], allreduce: AllReduce | None, tree: Tree | None = None) -> None:
        """tree: takes the place of `allreduce` for what workers contribute, and sums in its order."""
        self._allreduce, self._tree = allreduce, tree
        self._depth = 0
        self._groups = [_gather(members) for members in _by_rule(buffers)]
        self._total = 0
        self._first = 0
        self._knows_calls = False

    def begin(self, total: int, first: int = 0) -> None:
        """Start a step in which `total` microbatches (of all workers) are not empty, from number `first` on."""
        self._total, self._first, self._depth = total, first, 0
        for group in self._groups:
            group.aside.clear()
            group.before.copy_(group.flat)
            if group.change is not None:
                group.change.zero_()

    def enter(self) -> None:
        """Set the buffers as they were before the step; the next forward starts from there."""
        for group in self._groups:
            for buffer in group.members:
                buffer.reclaim()  # after a forward without a `leave`, too
            group.flat.copy_(group.before)

    def leave(self, microbatch: int, turn: Turn = PLAIN) -> None:
        """Take in what the forward of `microbatch` did. turn: its own in the tree."""
        for group in self._groups:
            for buffer in group.members:
                buffer.reclaim()
        if not self._knows_calls:
            self._learn_calls()
        if turn.is_apart:
            for group in self._groups:
                if group.change is not None:
                    group.aside.put(group.change)
            self._depth += 1
        self._take_in(microbatch)
        for group in self._groups:
            if group.change is not None:
                group.aside.merge(group.change, turn.merges)
        self._depth -= turn.merges

    def _take_in(self, microbatch: int) -> None:
        for group in self._groups:
            if group.change is None and torch.equal(group.flat, group.before):
                continue
            if group.is_sum:
                after = group.flat.double() if group.flat.is_floating_point() else group.flat.long()
                group.open(self._depth).add_(torch.where(group.flat == group.before, 0, after - _base(group.before)))
                continue
            change = group.flat.double().sub_(group.before)
            later = self._first + self._total - 1 - microbatch
            group.open(self._depth).add_(change if group.keep is None else change * group.keep**later)

    def reduce(self) -> None:
        """Sum the contributions of all workers."""
        if not self._groups or not self._allreduce:
            return
        quiet = [group for group in self._groups if not group.is_sent]
        found = torch.tensor([group.change is not None for group in quiet], dtype=torch.float64)
        self._sum([group for group in self._groups if group.is_sent], found)
        new = [group for group, times in zip(quiet, found.tolist()) if times]
        if new:
            self._sum(new, found[:0])
        for group in new:
            group.is_sent = True

    def apply(self) -> None:
        """Set the buffers to what follows the step."""
        self.enter()  # counts are read as they were before the step
        factors = [_factor(group, self._total) for group in self._groups]
        for group, factor in zip(self._groups, factors):
            if group.change is None:
                continue
            if group.is_sum:
                base = _base(group.before)
                after = base.add_(group.change.to(base.dtype)).to(group.flat.dtype)
                group.flat.copy_(torch.where(group.change == 0, group.before, after))
            else:
                group.flat.copy_(group.before.double().add_(group.change, alpha=factor))

    def discard(self) -> None:
        """Set the buffers back to what they were before the step."""
        self.enter()

    def _sum(self, groups: Sequence[_Group], found: torch.Tensor) -> None:
        """Sum what groups contribute, and numbers beside, over all workers, in place."""
        assert self._allreduce is not None
        parts = [*(group.open(self._depth) for group in groups), found]
        joined = torch.cat([part.cpu() for part in parts])
        if self._tree is None:
            self._allreduce(joined)
        else:
            rows = zip(*(group.aside.kept for group in groups)) if groups else [()] * self._depth
            kept = [torch.cat([*(part.cpu() for part in row), torch.zeros_like(found)]) for row in rows]
            self._tree.total(kept, joined)
        for part, total in zip(parts, joined.split([part.numel() for part in parts])):
            part.copy_(total)

    def _learn_calls(self) -> None:
        """Learn how often a forward calls each layer, from what the first one added to the layers' counts.

        A layer that it did not call is taken to be called once: only what is learnt as less would let it diverge.
        """
        self._knows_calls = True
        calls = {
            id(buffer.tensor): max(1.0, added)
            for group in self._groups
            if group.is_sum and len(group.members) == group.flat.numel()
            for buffer, added in zip(group.members, (group.flat.double() - group.before.double()).tolist())
        }
        for group in self._groups:
            own = [calls.get(id(buffer.count), 1.0) for buffer in group.members]
            if isinstance(group.keep, float) and any(c != 1.0 for c in own):
                sizes = torch.tensor([buffer.tensor.numel() for buffer in group.members])
                powers = torch.tensor(own, dtype=torch.float64).repeat_interleave(sizes)
                group.keep = group.keep ** powers.to(group.flat.device)


class BufferMean:
    """The buffers of workers that train by themselves, brought together now and then.

    Averages become the mean of the workers', what counts as a sum of changes is added up, and the vectors of a spectral
    norm are those of the last worker. What no worker has changed is not sent, and keeps its bits.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        """Made when all workers hold the same buffers."""
        self._buffers = buffers
        self.shared = [buffer.tensor.detach().clone() for buffer in buffers]
        """As they were when the workers last met."""

    @property
    def own(self) -> list[torch.Tensor]:
        """This worker's buffers."""
        return [buffer.tensor.detach() for buffer in self._buffers]

    def changed(self) -> list[bool]:
        """Tell which buffers this worker has changed since the workers last met."""
        return [not torch.equal(own, shared) for own, shared in zip(self.own, self.shared)]

    def meet(self, changed: Sequence[float], share: float, is_last: bool, allreduce: AllReduce | None) -> None:
        """Bring those buffers together that some worker has `changed`; share: this worker's, of all shares a part."""
        met = [index for index, times in enumerate(changed) if times]
        if not met:
            return
        parts = []
        for index in met:
            own, shared, keep = self.own[index], self.shared[index], self._buffers[index].keep
            if keep == 1.0:
                parts.append(torch.where(_real(own) == _real(shared), 0, _base(_real(own)) - _base(_real(shared))))
            else:
                weight = float(is_last) if keep == 0.0 else share
                parts.append((_real(own).double() - _real(shared)) * weight)
        total = torch.cat([part.reshape(-1).double().cpu() for part in parts])
        if allreduce is not None:
            allreduce(total)
        for index, part in zip(met, total.split([part.numel() for part in parts])):
            shared = _real(self.shared[index])
            change = part.view(shared.shape).to(shared.device)
            after = (_base(shared) + change.to(_base(shared).dtype)).to(shared.dtype)
            shared.copy_(torch.where(change == 0, shared, after))
            self.own[index].copy_(self.shared[index])


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _base(before: torch.Tensor) -> torch.Tensor:
    """Return a copy that changes are measured from: whole numbers exactly, and 0 where there was no finite one."""
    return before.double().nan_to_num(0, 0, 0) if before.is_floating_point() else before.to(torch.int64, copy=True)


def _factor(group: _Group, total: int) -> float:
    """Return the factor of the summed changes."""
    if group.keep is not None:
        return 1.0
    assert group.count is not None
    seen = int(group.count)
    return (seen + 1) / (seen + total)


def _by_rule(buffers: Sequence[Buffer]) -> list[list[Buffer]]:
    groups: dict[tuple[object, ...], list[Buffer]] = {}
    for buffer in buffers:
        tensor = buffer.tensor
        own: object = None
        if buffer.keep == 1.0:
            own = tensor.shape  # constants, such as masks, are rarely of a shape with what changes
        elif buffer.keep is None:
            own = id(buffer.count)
        groups.setdefault((tensor.dtype, tensor.device, buffer.keep, own), []).append(buffer)
    return list(groups.values())


def _gather(members: list[Buffer]) -> _Group:
    first = members[0]
    parts = [buffer.tensor.detach() for buffer in members]
    if first.tensor.is_complex():
        parts = [torch.view_as_real(part) for part in parts]
    flat = torch.cat([part.reshape(-1) for part in parts])
    for buffer, part, view in zip(members, parts, flat.split([part.numel() for part in parts])):
        shaped = view.view(part.shape)
        buffer.tensor.data = torch.view_as_complex(shaped) if first.tensor.is_complex() else shaped
    return _Group(
        keep=first.keep,
        is_sum=first.keep == 1.0,
        flat=flat,
        before=flat.clone(),
        change=None,
        is_sent=False,
        members=members,
        count=first.count,
    )
