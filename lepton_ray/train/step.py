"""One step: the owned microbatches forward and backward, the sums over all workers, the ballot, the update."""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from lepton_ray.data.batch import Batch, aligned, to_device
from lepton_ray.data.feed import Feed, StepPlan
from lepton_ray.errors import RunFailed
from lepton_ray.plan.batch import seed_of
from lepton_ray.plan.tree import PLAIN
from lepton_ray.train import optimizers
from lepton_ray.train.ballot import vote
from lepton_ray.train.buffers import BufferFold
from lepton_ray.train.model import Model
from lepton_ray.train.objective import Objective
from lepton_ray.train.ordered import Tree
from lepton_ray.train.peers import Peers
from lepton_ray.train.precision import Scaler, autocast
from lepton_ray.train.pulse import PULSE
from lepton_ray.train.reduce import Buckets, Reducer, can_overlap, over_wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What all workers agreed on when they committed a step."""

    loss_sum: float
    weight: float
    """What the loss sum and the gradients were divided by: samples, or tokens."""
    work: Sequence[float]
    """What the workers testify of each microbatch: samples, and then digests; see `data.feed.Fetched`."""
    stop: bool = False
    """Some worker wishes to stop after this step."""
    is_skipped: bool = False
    """fp16 gradients overflowed: no update was made."""
    grad_norm: float | None = None
    """L2 norm of the mean gradient before clipping, where it was computed."""
    extra: dict[str, float] = field(default_factory=dict)
    """Means over the samples of what a `step_fn` returned beside its loss."""

    @property
    def samples(self) -> int:
        """Count the samples of all microbatches."""
        return int(sum(self.work[: len(self.work) // 2]))

    @property
    def loss(self) -> float:
        return self.loss_sum / self.weight if self.weight else 0.0


def seed_everything(seed: int, device: torch.device) -> None:
    """Set the generators of Python, numpy and torch, on which data transforms, dropout and user code draw."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if device.type == "cpu":
        # `torch.manual_seed` notes a stack trace for each kind of accelerator that is absent: 0.5 ms.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def fetch(
    feed: Feed, model: Model, device: torch.device, seed: int, step: int, microbatch: int, *, is_exact: bool = False
) -> Batch:
    """Return a microbatch on the device, with every generator set to the random state that belongs to it.

    is_exact: its place in memory must make no difference.
    """
    PULSE.beat()
    own_seed = seed_of(seed, step, microbatch)
    seed_everything(own_seed, device)
    model.seed(own_seed)
    batch = to_device(feed.fetch(step, microbatch), device)
    return aligned(batch) if is_exact else batch


def begin_buffers(buffers: BufferFold, plan: StepPlan) -> None:
    """Start a step for the buffers. A plan of all workers fills its first microbatches, that of one worker its own."""
    filled = [m for m, size in enumerate(plan.sizes) if size]
    buffers.begin(len(filled), filled[0] if filled else 0)


class Stepping(Protocol):
    """Does steps that all workers commit together, or not at all."""

    def compute(self, step: int, plan: StepPlan, owned: Sequence[int]) -> list[float]:
        """Do a step as far as it can be undone; return this worker's numbers for the ballot."""

    def again(self, ballot: Sequence[float]) -> list[float] | None:
        """Return the numbers for another ballot where the one that was held was not enough."""

    def commit(self, ballot: Sequence[float]) -> list[Committed]:
        """Make it so."""

    def discard(self) -> None:
        """Undo what `compute` did."""


def step_together(
    stepper: Stepping, peers: Peers, step: int, plan: StepPlan, owned: Sequence[int], wish: bool
) -> list[Committed]:
    """Do a step with all workers. wish: this worker wishes to stop after it. Raises PeerLost, RunFailed."""
    numbers: list[float] | None = stepper.compute(step, plan, owned)
    while numbers is not None:
        wishes, *ballot = vote(peers, [wish, *numbers])
        numbers = stepper.again(ballot)
    return [replace(each, stop=wishes > 0) for each in stepper.commit(ballot)]


class Extras:
    """What a `step_fn` returned beside its loss, on its way through the ballots: as many numbers on every worker.

    The first step settles the names: those of rank 0, which owns microbatch 0 in every step.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._length: int | None = None
        self._names: list[str] = []

    def numbers(self, found: Mapping[str, Sequence[float]]) -> list[float]:
        """Return sums and weights for the ballot; zeros for what this worker did not see."""
        if self._length is None:
            self._length = 2 * int(vote(self._peers, [0 if self._peers.rank else len(found)])[0])
        self._names = self._names or sorted(found)
        numbers = [number for name in self._names for number in found.get(name, (0.0, 0.0))]
        return (numbers + [0.0] * self._length)[: self._length]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the means by name, from the ballot's sums."""
        return {name: total / weight for name, total, weight in zip(self._names, sums[::2], sums[1::2]) if weight}


@dataclass(slots=True)
class _Open:
    """A step that is computed and not committed."""

    step: int
    samples: int
    """Of all workers; losses were divided by so many."""
    untouched: torch.Tensor | None
    """One flag per parameter that no backward of this worker reached; None when all were reached."""
    numbers: list[float]
    microbatches: int
    unused: torch.Tensor | None = None
    """Parameters that no backward of any worker reached."""


class Stepper:
    """Runs the steps of one worker: `compute`, a ballot, `again` and another ballot if need be, then `commit`."""

    def __init__(
        self,
        *,
        model: Model,
        objective: Objective,
        optimizers: Mapping[str, torch.optim.Optimizer],
        feed: Feed,
        peers: Peers,
        device: torch.device,
        seed: int,
        precision: str = "fp32",
        clip_norm: float | None = None,
        wire: str = "fp32",
        buckets: Buckets | None = None,
        tree: Tree | None = None,
    ) -> None:
        """wire: the number format in which gradients travel. buckets: of this model; None makes them.

        tree: the order in which all is summed, if it matters.
        """
        allreduce = peers.allreduce if peers.world > 1 else None
        self._model, self._objective, self._optimizers = model, objective, optimizers
        self._feed, self._peers, self._device, self._seed = feed, peers, device, seed
        self._precision, self._clip_norm = precision, clip_norm
        self.scaler = Scaler() if precision == "fp16" else None
        self._tree = tree
        self._reducer = Reducer(
            model.parameters(), over_wire(peers, wire), buckets, tree, is_overlapped=can_overlap(peers)
        )
        self._buffers = BufferFold(model.buffers(), allreduce, tree)
        self._extras = Extras(peers)
        self._open: _Open | None = None

    def compute(self, step: int, plan: StepPlan, owned: Sequence[int]) -> list[float]:
        """Do step `step` with the microbatches that this worker owns, as far as it can be undone.

        Returns the numbers for the ballot. Raises PeerLost when another worker is gone.
        """
        self._feed.fetched.forget()
        self._reducer.begin()
        begin_buffers(self._buffers, plan)
        if self._tree is not None:
            self._tree.begin(sum(size > 0 for size in plan.sizes))
        losses: list[torch.Tensor] = []
        told, weights = [0.0] * len(plan.sizes), [0.0] * len(plan.sizes)
        extra: dict[str, list[float]] = {}
        owned = [m for m in owned if plan.sizes[m]]
        # Over the samples: gradients have the size that they have under torch's scaler, that of a mean, and mostly that
        # is what the step needs, so that nobody has to go over all of them again.
        scale = (self.scaler.scale if self.scaler else 1.0) / plan.samples
        for m in owned:
            turn = PLAIN if self._tree is None else self._tree.turn(m)
            self._reducer.turn(turn)
            batch = fetch(self._feed, self._model, self._device, self._seed, step, m, is_exact=self._tree is not None)
            self._buffers.enter()
            with autocast(self._precision, self._device):
                outcome = self._objective(self._model, batch)
            if m == owned[-1]:
                self._reducer.arm()
            (outcome.loss_sum * scale).backward()
            self._buffers.leave(m, turn)
            losses.append(outcome.loss_sum.detach().double())
            weights[m] = outcome.weight
            for name, (total, share) in outcome.extra.items():
                sums = extra.setdefault(name, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + float(total), sums[1] + share
        self._reducer.finish()
        self._buffers.reduce()
        untouched = self._reducer.untouched()
        *found, gradients = torch.stack(
            [*losses, self._reducer.share_sum(self._peers.rank, self._peers.world)]
        ).tolist()
        for m, loss in zip(owned, found):
            told[m] = loss
        work = self._feed.fetched.work(len(plan.sizes))
        numbers = [float(untouched is not None), gradients, *told, *weights, *work, *self._extras.numbers(extra)]
        self._open = _Open(step, plan.samples, untouched, numbers, len(plan.sizes))
        return numbers

    def again(self, ballot: Sequence[float]) -> list[float] | None:
        """Return the numbers for another ballot where one is not enough: gradients that nobody made go first."""
        assert self._open is not None
        if not ballot[0]:
            return None
        untouched = self._open.untouched
        if untouched is None:
            untouched = torch.zeros(self._reducer.size, dtype=torch.float64)
        self._peers.allreduce(untouched)
        # A worker that owned nothing in this step reached nothing either: unused is what everybody missed.
        self._open.unused = untouched == self._peers.world
        return [0.0, *self._open.numbers[1:]]

    def commit(self, ballot: Sequence[float]) -> list[Committed]:
        """Make the update that the workers agreed on; return the step. Raises RunFailed when it is not finite."""
        done, self._open = self._open, None
        assert done is not None
        count = done.microbatches
        # Each is of one worker: their sums are the same whoever that was.
        _, gradients, *told = ballot
        loss_sum, weight, told = _total(told[:count]), _total(told[count : 2 * count]), told[2 * count :]
        committed = read_step_ballot(loss_sum, weight, told, done.microbatches, self._extras)
        if done.unused is not None:
            self._reducer.drop(done.unused)
        return [self._apply(done, committed, gradients)]

    def discard(self) -> None:
        """Undo what `compute` did."""
        self._buffers.discard()
        self._open = None

    def close(self) -> None:
        """Take the hooks off the model."""
        self._reducer.close()

    def _apply(self, done: _Open, committed: Committed, gradients: float) -> Committed:
        """Turn the summed gradients into the mean, clip it and update; or skip or refuse the step.

        gradients: a number that is finite when all of them are.
        """
        scale = self.scaler.scale if self.scaler else 1.0
        is_finite = math.isfinite(committed.loss_sum) and math.isfinite(gradients)
        if not is_finite and (self.scaler is None or self.scaler.scale == 1.0):
            raise RunFailed(not_finite(done.step, committed.loss_sum))
        if committed.weight == 0:
            self._buffers.discard()
            return _skipped(committed)
        if self.scaler:
            self.scaler.update(is_finite)
            if not is_finite:
                self._buffers.discard()
                return _skipped(committed)
        factor = done.samples / committed.weight / scale
        norm = None
        if self._clip_norm is not None or self.scaler:
            norm = self._reducer.norm() * factor
            if self._clip_norm is not None and norm > self._clip_norm:
                factor *= self._clip_norm / norm
        self._reducer.scale(factor)
        self._buffers.apply()
        for optimizer in self._optimizers.values():
            optimizers.step(optimizer)
        return replace(committed, grad_norm=norm)


def read_step_ballot(
    loss_sum: float, weight: float, told: Sequence[float], microbatches: int, extras: Extras
) -> Committed:
    """Read what the workers told of their work and beside their loss."""
    work, extra = told[: 2 * microbatches], told[2 * microbatches :]
    return Committed(loss_sum=loss_sum, weight=weight, work=work, extra=extras.means(extra))


def _total(values: Sequence[float]) -> float:
    return functools.reduce(operator.add, values, 0.0)  # `sum` rounds otherwise from Python 3.12 on


def _skipped(committed: Committed) -> Committed:
    if math.isfinite(committed.loss_sum):
        return replace(committed, is_skipped=True)
    return replace(committed, is_skipped=True, loss_sum=0.0, weight=0.0)


def not_finite(step: int, loss_sum: float) -> str:
    what = (
        "a gradient turned inf or nan (the loss did not)" if math.isfinite(loss_sum) else f"the loss turned {loss_sum}"
    )
    return (
        f"{what} at step {step}. Lower the learning rate, set Batch(clip_norm=1.0), or look at the samples of this "
        "step; the last checkpoint is from before it."
    )
