"""Steps that the user writes: `step_fn(model, batch, optimizers)` may step several optimizers as often as it likes.

Each worker calls it once per step, on its one microbatch. An optimizer's `step` is where the workers meet: gradients
are summed, weighted by samples, and divided by the samples of the step. All workers must therefore step the same
optimizers in the same order. A worker whose microbatch is empty (short last batch) runs on another's with weight zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lepton_ray.data.batch import samples as count
from lepton_ray.data.feed import Feed, StepPlan
from lepton_ray.errors import RunFailed
from lepton_ray.train import optimizers
from lepton_ray.train.ballot import vote
from lepton_ray.train.buffers import BufferFold
from lepton_ray.train.model import Model
from lepton_ray.train.objective import StepFn, read_step
from lepton_ray.train.peers import Peers
from lepton_ray.train.reduce import Reducer, over_wire, sum_of
from lepton_ray.train.step import Committed, Extras, begin_buffers, fetch, not_finite, read_step_ballot


class SharedOptimizer:
    """What a `step_fn` gets in place of an optimizer of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, peers: Peers, wire: str = "fp32") -> None:
        self.optimizer = optimizer
        allreduce = peers.allreduce if peers.world > 1 else None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        named = {str(i): p for i, p in enumerate(parameters)}
        # Nobody knows which backward is the last before a step.
        self._reducer = Reducer(named, over_wire(peers, wire), is_overlapped=False)
        self._allreduce = allreduce
        self.share = 1.0
        """What the gradients of this worker are multiplied by before they are summed."""
        self.steps = 0
        self.gradients = torch.zeros((), dtype=torch.float64)
        """The sum of all gradients of the step, inf or nan when one of them was."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, for a look at or a change of their options."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Start from gradients of zero (they are kept in place, whatever `set_to_none` says)."""
        self._reducer.begin()

    def step(self) -> None:
        """Average the gradients over the samples of all workers and update."""
        self._reducer.reclaim()
        self._reducer.scale(self.share)
        self._reducer.finish()
        self.gradients = self.gradients + sum_of(self._reducer.buckets)
        self._drop_unused()
        optimizers.step(self.optimizer)
        self._reducer.reclaim()
        self.steps += 1

    def begin(self, share: float) -> None:
        """Start a step of the run in which this worker has the part `share` of the samples."""
        self.share, self.steps, self.gradients = share, 0, torch.zeros((), dtype=torch.float64)
        self._reducer.begin()

    def _drop_unused(self) -> None:
        """Take the gradient from parameters that no backward of any worker reached, as torch does."""
        unused = self._reducer.untouched()
        if self._allreduce:
            used = torch.ones(self._reducer.size, dtype=torch.float64)
            if unused is not None:
                used -= unused
            self._allreduce(used)
            unused = used == 0
        if unused is not None:
            self._reducer.drop(unused)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._reducer.close()


class FreeStepper:
    """Runs the steps of one worker through the user's `step_fn`. Same interface as `Stepper`.

    The optimizers move while a step is computed, so its undoing needs a copy of weights and optimizer state.
    """

    scaler = None

    def __init__(
        self,
        *,
        model: Model,
        step_fn: StepFn,
        optimizers: Mapping[str, torch.optim.Optimizer],
        shape: Callable[[dict[str, SharedOptimizer]], Any],
        feed: Feed,
        peers: Peers,
        device: torch.device,
        seed: int,
        wire: str = "fp32",
    ) -> None:
        """shape: turn the named optimizers into what the user's `optimizer=` returned (one, a list, a dict).

        wire: the number format in which gradients travel.
        """
        allreduce = peers.allreduce if peers.world > 1 else None
        self._model, self._step_fn, self._feed, self._peers = model, step_fn, feed, peers
        self._device, self._seed, self._extras = device, seed, Extras(peers)
        self._shared = {name: SharedOptimizer(o, peers, wire) for name, o in optimizers.items()}
        self._argument = shape(self._shared)
        self._buffers = BufferFold(model.buffers(), allreduce)
        self._optimizers = optimizers
        self._step = self._microbatches = 0
        self._before: tuple[list[torch.Tensor], list[dict[str, Any]]] | None = None

    def compute(self, step: int, plan: StepPlan, owned: Sequence[int]) -> list[float]:
        """Do step `step` on the one microbatch that this worker owns; return the numbers for the ballot."""
        (m,) = owned
        self._feed.fetched.forget()
        weights = [tensor.detach().clone() for tensor in self._model.parameters().values()]
        self._before = weights, [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers.values()]
        samples = plan.sizes[m]
        total = sum(plan.sizes)
        for shared in self._shared.values():
            shared.begin(samples / total)
        begin_buffers(self._buffers, plan)
        batch = fetch(self._feed, self._model, self._device, self._seed, step, m if samples else 0)
        self._buffers.enter()
        outcome = read_step(self._step_fn(self._model.user_module, batch, self._argument), count(batch))
        weight = outcome.weight if samples else 0.0
        if not any(shared.steps for shared in self._shared.values()):
            whole = vote(self._peers, [weight])[0]
            outcome.loss_sum.backward()
            for shared in self._shared.values():
                shared.share = bool(samples) / (whole or 1.0)
                shared.step()
        if samples:
            self._buffers.leave(m)
        self._buffers.reduce()
        own_sum = float(outcome.loss_sum.detach()) if samples else 0.0
        extra = {name: (float(part), share) for name, (part, share) in outcome.extra.items()} if samples else {}
        if not samples:
            self._feed.fetched.forget()  # what it ran on is another's
        self._step, self._microbatches = step, len(plan.sizes)
        return [own_sum, weight, *self._feed.fetched.work(len(plan.sizes)), *self._extras.numbers(extra)]

    def again(self, ballot: Sequence[float]) -> None:
        """One ballot is enough."""

    def commit(self, ballot: Sequence[float]) -> list[Committed]:
        """Take in what the workers agreed on; return the step. Raises RunFailed when it is not finite."""
        loss_sum, weight, *told = ballot
        self._before = None
        gradients = float(sum(shared.gradients.cpu() for shared in self._shared.values()))
        if not math.isfinite(loss_sum) or not math.isfinite(gradients):
            raise RunFailed(not_finite(self._step, loss_sum))
        self._buffers.apply()
        return [read_step_ballot(loss_sum, weight, told, self._microbatches, self._extras)]

    def discard(self) -> None:
        """Undo what `compute` did."""
        self._buffers.discard()
        if self._before is not None:
            weights, states = self._before
            with torch.no_grad():
                for tensor, weight in zip(self._model.parameters().values(), weights):
                    tensor.copy_(weight)
            for optimizer, state in zip(self._optimizers.values(), states):
                optimizer.load_state_dict(state)
        self._before = None

    def close(self) -> None:
        """Take the hooks off the model."""
        for shared in self._shared.values():
            shared.close()
