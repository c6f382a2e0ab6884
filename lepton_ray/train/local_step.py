"""Local steps: each worker trains by itself, and now and then they share what they learnt.

A worker's own step is that of a worker which is alone, with its own microbatches, optimizer state, clipping and loss
scale. Beside its own weights it keeps the shared ones, of which every worker holds the same bits. When a fragment of
the weights leaves, the progress of the workers since it last left (shared - own, as a gradient points) is averaged,
weighted by what they counted, and an outer SGD moves the shared weights by it (local SGD; DiLoCo, Douillard et al.,
2023). The sum may go on in the background of a few steps. What a worker has learnt meanwhile stays on top of the new
shared weights, and is a part of the fragment's next progress, so that no step is in vain (CoCoD-SGD, Shen et al.,
2019; Streaming DiLoCo mixes weights instead).

Evaluations, checkpoints and results are those of the shared weights. The end of a run sets them to the mean of the
workers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lepton_ray.collective.tensors import empty
from lepton_ray.config import Sync
from lepton_ray.data.feed import StepPlan
from lepton_ray.errors import ConfigError
from lepton_ray.plan.local import Turns, cut
from lepton_ray.train import optimizers
from lepton_ray.train.ballot import vote
from lepton_ray.train.buffers import BufferMean
from lepton_ray.train.free_step import FreeStepper
from lepton_ray.train.model import Model
from lepton_ray.train.peers import Alone, Background
from lepton_ray.train.precision import Scaler
from lepton_ray.train.step import Committed, Extras, Stepper, step_together


@dataclass(slots=True, kw_only=True)
class _Fragment:
    """A part of the weights, flat, on the CPU."""

    members: list[torch.Tensor]
    """This worker's own weights, where they live."""
    shared: nn.Parameter
    """What the workers agreed on last; the outer optimizer moves it by its gradient."""
    progress: torch.Tensor
    """This worker's share, which the collective turns into the sum."""
    residual: torch.Tensor | None
    """What a lossy wire has left out of this worker's earlier progress."""
    counted: float = 0.0
    """Weight of what this worker has learnt from since the fragment last left."""
    left: torch.Tensor | None = None
    """The own weights when the fragment left, while it is on its way."""

    def own(self) -> torch.Tensor:
        """Return a copy of the own weights."""
        parts = [member.reshape(-1).to("cpu", self.shared.dtype) for member in self.members]
        return torch.cat(parts)

    def set_own(self, weights: torch.Tensor) -> None:
        for member, part in zip(self.members, weights.split([member.numel() for member in self.members])):
            member.copy_(part.view(member.shape))

    def take_stock(self, own: torch.Tensor, share: float) -> None:
        """Write the progress, of which this worker's part is `share`."""
        torch.sub(self.shared.detach(), own, out=self.progress).mul_(share)


class LocalStepper:
    """Runs the steps of one worker, and its meetings with the others. Same interface as `Stepper`."""

    def __init__(self, inner: Stepper | FreeStepper, model: Model, peers: Background, sync: Sync) -> None:
        """inner: does a step of a worker that is alone. Raises ConfigError when there is too little to cut."""
        assert sync.steps is not None
        parameters = [_real(p.detach()) for p in model.parameters().values()]
        if len(parameters) < sync.fragments:
            raise ConfigError(
                f"Sync.local(fragments={sync.fragments}) cuts the weights between parameters, of which the model has "
                f"{len(parameters)} to train. Use at most {len(parameters)} fragments."
            )
        self._inner, self._peers, self._wire = inner, peers, sync.wire
        self._turns = Turns(steps=sync.steps, fragments=sync.fragments, delay=sync.delay)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        parts = cut([p.numel() * p.itemsize for p in parameters], sync.fragments)
        self._fragments = [self._make([parameters[index] for index in part], dtype) for part in parts]
        optimizers.quiet_construction()
        self._outer = torch.optim.SGD(
            [fragment.shared for fragment in self._fragments],
            lr=sync.outer.lr,
            momentum=sync.outer.momentum,
            nesterov=sync.outer.nesterov and sync.outer.momentum > 0,
        )
        self._model_buffers = model.buffers()
        self._buffers = BufferMean(self._model_buffers)
        self._extras = Extras(peers)
        self._work = 0
        """Numbers that tell of a step's microbatches."""
        self._rows: list[Committed] = []
        """Steps that no ballot has told the others of."""
        self._is_level = True
        """All workers hold the shared weights."""

    def _make(self, members: list[torch.Tensor], dtype: torch.dtype) -> _Fragment:
        count = sum(member.numel() for member in members)
        return _Fragment(
            members=members,
            shared=nn.Parameter(torch.empty(count, dtype=dtype)),
            progress=empty(count, dtype),
            residual=None if self._wire == "fp32" else torch.zeros(count, dtype=dtype),
        )

    # --- steps and meetings ------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> Scaler | None:
        """This worker's own loss scale."""
        return self._inner.scaler

    @scaler.setter
    def scaler(self, scaler: Scaler) -> None:
        assert isinstance(self._inner, Stepper)  # the other kind scales nothing
        self._inner.scaler = scaler

    def begin(self) -> None:
        """Begin with what the model holds, which is the same on all workers."""
        with torch.no_grad():
            for fragment in self._fragments:
                fragment.shared.copy_(fragment.own())
        self._buffers = BufferMean(self._model_buffers)

    def run(self, step: int, plan: StepPlan, owned: Sequence[int], wish: bool) -> list[Committed]:
        """Do this worker's part of step `step`, and meet the others when a fragment is to leave.

        Returns what is committed now: at a meeting all steps since the one before, otherwise nothing.
        Raises RunFailed when this worker's loss or gradient is not finite, PeerLost when another worker is gone.
        """
        sizes = [size if m in owned else 0 for m, size in enumerate(plan.sizes)]
        own = replace(plan, samples=sum(sizes), sizes=sizes)
        if own.samples:
            done = step_together(self._inner, Alone(), step, own, owned, wish)
        else:
            done = [_nothing(wish, len(plan.sizes))]
        self._rows += done
        self._work = 2 * len(plan.sizes)
        for fragment in self._fragments:
            fragment.counted += sum(each.weight for each in done if not each.is_skipped)
        self._is_level = False
        with torch.no_grad():
            if self._turns.delay and (arriving := self._turns.arriving(step + 1)) is not None:
                self._arrive(self._fragments[arriving])
            leaving = self._turns.leaving(step + 1)
            return [] if leaving is None else self._meet(self._fragments[leaving])

    def settle(self) -> list[Committed]:
        """Tell the others of all steps that they do not know yet; return these."""
        return self._ballot([])[0] if self._rows else []

    def finish(self, is_changed: bool = False) -> bool:
        """Set the weights of all workers to the mean of theirs, when training is over; tell whether any changed.

        is_changed: somebody else has just changed them.
        """
        if self._is_level and not is_changed:
            return False
        with torch.no_grad():
            for fragment in self._fragments:
                if fragment.left is not None:
                    self._arrive(fragment)
            counted = [fragment.counted for fragment in self._fragments]
            changed = [float(each) for each in self._buffers.changed()]
            totals = vote(self._peers, [*counted, *changed])
            shares = [
                1 / self._peers.world if is_changed else self._share(own, total) for own, total in zip(counted, totals)
            ]
            for fragment, share in zip(self._fragments, shares):
                fragment.take_stock(fragment.own(), share)
                self._peers.allreduce(fragment.progress)
                fragment.shared.sub_(fragment.progress)
                fragment.set_own(fragment.shared)
                fragment.counted = 0.0
            self._meet_buffers(totals[len(counted) :], shares[-1])
        self._is_level = True
        return True

    def close(self) -> None:
        """Take the hooks off the model and end the thread."""
        self._inner.close()
        self._peers.close()

    def _meet(self, fragment: _Fragment) -> list[Committed]:
        """Tell the others of the steps, bring the buffers together, and let a fragment leave."""
        committed, totals = self._ballot([fragment.counted, *map(float, self._buffers.changed())])
        share = self._share(fragment.counted, totals[0])
        self._meet_buffers(totals[1:], share)
        own = fragment.own()
        fragment.take_stock(own, share)
        fragment.counted = 0.0
        if self._turns.delay:
            fragment.left = own
            self._peers.start(fragment.progress, self._wire, fragment.residual)
        else:
            self._peers.allreduce(fragment.progress, self._wire, fragment.residual)
            self._arrive(fragment)
            self._is_level = len(self._fragments) == 1
        return committed

    def _arrive(self, fragment: _Fragment) -> None:
        """Move the shared weights by the summed progress, and the own ones onto them."""
        self._peers.join()
        fragment.shared.grad = fragment.progress
        optimizers.step(self._outer)
        fragment.shared.grad = None
        since = 0.0 if fragment.left is None else fragment.own() - fragment.left
        fragment.set_own(fragment.shared + since)
        fragment.left = None

    def _share(self, own: float, total: float) -> float:
        """Return this worker's part of what all counted."""
        return own / total if total else 1 / self._peers.world

    def _meet_buffers(self, changed: Sequence[float], share: float) -> None:
        allreduce = self._peers.allreduce if self._peers.world > 1 else None
        self._buffers.meet(changed, share, self._peers.rank == self._peers.world - 1, allreduce)

    def _ballot(self, numbers: Sequence[float]) -> tuple[list[Committed], list[float]]:
        """Sum what the workers tell of their steps, and further numbers; return the steps, and these sums."""
        told = [number for row in self._rows for number in self._told(row)]
        sums = vote(self._peers, [*told, *numbers])
        width = len(told) // len(self._rows)
        committed = [self._read(sums[start : start + width]) for start in range(0, len(told), width)]
        self._rows = []
        return committed, sums[len(told) :]

    def _told(self, row: Committed) -> list[float]:
        norm, has_norm = (0.0, 0.0) if row.grad_norm is None else (row.grad_norm, 1.0)
        extra = {name: (mean * row.samples, row.samples) for name, mean in row.extra.items()}
        told = [row.loss_sum, row.weight, row.stop, row.is_skipped, norm, has_norm]
        return [*told, *row.work, *self._extras.numbers(extra)]

    def _read(self, sums: Sequence[float]) -> Committed:
        loss_sum, weight, stop, skipped, norm, norms, *told = sums
        work, extra = told[: self._work], told[self._work :]
        return Committed(
            loss_sum=loss_sum,
            weight=weight,
            work=work,
            stop=stop > 0,
            is_skipped=skipped > 0,
            grad_norm=norm / norms if norms else None,
            extra=self._extras.means(extra),
        )

    # --- state ---------------------------------------------------------------------------------------------------

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let the model hold the shared weights and buffers for a while."""
        own, buffers = [f.own() for f in self._fragments], [buffer.clone() for buffer in self._buffers.own]
        self._put([f.shared.detach() for f in self._fragments], self._buffers.shared)
        try:
            yield
        finally:
            self._put(own, buffers)

    def _put(self, weights: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for fragment, part in zip(self._fragments, weights):
                fragment.set_own(part)
            for buffer, value in zip(self._buffers.own, buffers):
                buffer.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return what all workers hold alike, beside the shared weights and buffers in the model's own types."""
        self._peers.join()
        return {
            "weights": [fragment.shared.detach() for fragment in self._fragments],
            "outer": self._outer.state_dict(),
            "on_the_way": [None if f.left is None else f.progress for f in self._fragments],
            "is_level": self._is_level,
        }

    def own_state(self) -> dict[str, Any]:
        """Return what only this worker holds."""
        self._peers.join()
        return {
            "weights": [fragment.own() for fragment in self._fragments],
            "buffers": [buffer.clone() for buffer in self._buffers.own],
            "counted": [fragment.counted for fragment in self._fragments],
            "left": [fragment.left for fragment in self._fragments],
            "residuals": [fragment.residual for fragment in self._fragments],
        }

    def load(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take over a state; the model holds the shared weights and buffers."""
        self._buffers = BufferMean(self._model_buffers)
        self._outer.load_state_dict(state["outer"])
        self._is_level = state["is_level"]
        with torch.no_grad():
            for i, fragment in enumerate(self._fragments):
                fragment.shared.copy_(state["weights"][i])
                fragment.counted, fragment.left = own["counted"][i], own["left"][i]
                if fragment.left is not None:
                    fragment.progress.copy_(state["on_the_way"][i])
                if fragment.residual is not None:
                    fragment.residual.copy_(own["residuals"][i])
        self._put(own["weights"], own["buffers"])


def _nothing(wish: bool, microbatches: int) -> Committed:
    """Return the step of a worker that has no sample in it."""
    return Committed(loss_sum=0.0, weight=0.0, work=[0.0] * (2 * microbatches), stop=wish)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
