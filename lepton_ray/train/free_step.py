"""Steps that the user writes: `step_fn(model, batch, optimizers)` may step several optimizers as often as it likes.

Each worker calls it once per step, on its one microbatch. An optimizer's `step` is where the workers meet: gradients
are summed, weighted by samples, and divided by the samples of the step. All workers must therefore step the same
optimizers in the same order. A worker whose microbatch is empty (short last batch) runs on another's with weight zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lepton_ray.data.batch import Batch
from lepton_ray.data.feed import Feed, StepPlan
from lepton_ray.errors import ConfigError, RunFailed
from lepton_ray.train import optimizers
from lepton_ray.train.buffers import BufferFold
from lepton_ray.train.model import Model
from lepton_ray.train.peers import Peers
from lepton_ray.train.reduce import Reducer
from lepton_ray.train.step import Committed, fetch, not_finite, vote

StepFn = Callable[[Any, Batch, Any], Any]
"""(the user's module, batch, optimizer or list or dict of them) -> loss, or dict with "loss" and other scalars."""


class SharedOptimizer:
    """What a `step_fn` gets in place of an optimizer of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, allreduce: Callable[[torch.Tensor], None] | None) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._reducer = Reducer({str(i): p for i, p in enumerate(parameters)}, allreduce)
        self._allreduce = allreduce
        self._share = 1.0
        self.steps = 0

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
        self._reducer.scale(self._share)
        self._reducer.finish()
        self._drop_unused()
        optimizers.step(self.optimizer)
        self._reducer.reclaim()
        self.steps += 1

    def begin(self, share: float) -> None:
        """Start a step of the run in which this worker has the part `share` of the samples."""
        self._share, self.steps = share, 0
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
    """Runs the steps of one worker through the user's `step_fn`. Same interface as `Stepper`."""

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
    ) -> None:
        """shape: turn the named optimizers into what the user's `optimizer=` returned (one, a list, a dict)."""
        allreduce = peers.allreduce if peers.world > 1 else None
        self._model, self._step_fn, self._feed, self._peers = model, step_fn, feed, peers
        self._device, self._seed = device, seed
        self._shared = {name: SharedOptimizer(o, allreduce) for name, o in optimizers.items()}
        self._argument = shape(self._shared)
        self._buffers = BufferFold(model.buffers(), allreduce)

    def run(self, step: int, plan: StepPlan, owned: Sequence[int], wish: bool) -> Committed:
        """Do step `step` on the one microbatch that this worker owns."""
        (m,) = owned
        samples = plan.sizes[m]
        total = sum(plan.sizes)
        for shared in self._shared.values():
            shared.begin(samples / total)
        self._buffers.begin(sum(size > 0 for size in plan.sizes))
        batch = fetch(self._feed, self._model, self._device, self._seed, step, m if samples else 0)
        self._buffers.enter()
        loss, extra = _split(self._step_fn(self._model.user_module, batch, self._argument))
        if not any(shared.steps for shared in self._shared.values()):
            loss.backward()
            for shared in self._shared.values():
                shared.step()
        if samples:
            self._buffers.leave(m)
        self._buffers.reduce()
        loss_sum, agreed_samples, stop, *sums = vote(
            self._peers,
            [_number(loss) * samples, samples, wish, *(_number(extra[key]) * samples for key in sorted(extra))],
        )
        if not math.isfinite(loss_sum):
            raise RunFailed(not_finite(step, loss_sum))
        self._buffers.apply()
        return Committed(
            loss_sum=loss_sum,
            weight=agreed_samples,
            samples=int(agreed_samples),
            stop=stop > 0,
            extra={key: value / agreed_samples for key, value in zip(sorted(extra), sums)},
        )

    def vote(self, wish: bool) -> bool:
        """Hold a ballot without a step; return whether anybody wishes to stop."""
        return vote(self._peers, [wish])[0] > 0

    def close(self) -> None:
        """Take the hooks off the model."""
        for shared in self._shared.values():
            shared.close()


def _split(returned: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Part what a `step_fn` returned into its loss and its other scalars."""
    if isinstance(returned, Mapping):
        if "loss" not in returned:
            raise ConfigError(f'step_fn returned a dict without "loss"; its keys are {sorted(returned)}.')
        return returned["loss"], {key: value for key, value in returned.items() if key != "loss"}
    if not isinstance(returned, torch.Tensor) or returned.numel() != 1:
        raise ConfigError(f"step_fn returned {type(returned).__name__}; expected a scalar loss or a dict with one.")
    return returned, {}


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
