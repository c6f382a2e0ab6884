"""Build what a worker trains with from what the driver sent, and take its state apart and together again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from lepton_ray.callbacks import Callback
from lepton_ray.data.feed import Feed, StreamFeed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.plan.batch import seed_of
from lepton_ray.train.blueprint import build
from lepton_ray.train.evaluate import Counts, Pass, Sums, evaluate
from lepton_ray.train.free_step import FreeStepper
from lepton_ray.train.local_step import LocalStepper
from lepton_ray.train.metrics import make_metrics
from lepton_ray.train.model import Model, TorchModel
from lepton_ray.train.objective import Objective, StepFn, make_objective
from lepton_ray.train.optimizers import Optimizers, Schedulers, make_optimizer, make_scheduler, prepare_step
from lepton_ray.train.ordered import Tree
from lepton_ray.train.peers import Alone, Background, Peers
from lepton_ray.train.precision import Scaler
from lepton_ray.train.reduce import Buckets
from lepton_ray.train.spec import Code, TrainSpec
from lepton_ray.train.step import Stepper

if TYPE_CHECKING:
    from lepton_ray.train.keras import KerasModel


@dataclass(slots=True, kw_only=True)
class Parts:
    """One worker's copy of everything that makes a training."""

    spec: TrainSpec
    step_fn: StepFn | None
    feed: Feed | StreamFeed | None
    device: torch.device
    model: Model
    judge: Objective
    """The loss of evaluations."""
    counts: Counts
    """The metrics of evaluations."""
    optimizers: Optimizers
    schedulers: Schedulers
    callbacks: Sequence[Callback]
    stepper: Stepper | FreeStepper | LocalStepper = field(init=False)
    """Of the generation that this worker is in."""
    how: Pass = field(init=False)
    """How evaluations and predictions go."""
    _first: dict[str, Any] = field(init=False)
    """State of optimizers and schedulers before the first step."""
    _buckets: Buckets | None = field(init=False)
    """Made ahead of the first generation, and kept while generations end well."""

    def __post_init__(self) -> None:
        named = {name: optimizer.state_dict() for name, optimizer in self.optimizers.named.items()}
        for optimizer in self.optimizers.named.values():
            prepare_step(optimizer)
        self._first = copy.deepcopy({"optimizers": named, "schedulers": self.schedulers.state_dict()})
        is_known = self.feed is not None and self.step_fn is None
        self._buckets = Buckets(self.model.parameters().values()) if is_known else None

    def bind(self, peers: Peers, *, is_clean: bool = True) -> None:
        """Make the stepper of a generation; that of an earlier one ends.

        is_clean: all of its workers left the earlier one after the same transaction. Otherwise one that was given up
        may still write into the gradients.
        """
        spec, scaler = self.spec, None
        if hasattr(self, "stepper"):
            scaler = self.stepper.scaler
            self.stepper.close()
        is_local = self.feed is not None and spec.sync.is_local
        met: Peers = Alone() if is_local else peers
        common: dict[str, Any] = {
            "model": self.model,
            "feed": self.feed,
            "peers": met,
            "device": self.device,
            "seed": spec.seed,
            "wire": spec.sync.wire,
        }
        optimizers = self.optimizers
        if self.step_fn is not None and spec.batch.microbatches == peers.world and spec.precision == "fp32":
            self.stepper = FreeStepper(
                step_fn=self.step_fn, optimizers=optimizers.named, shape=optimizers.shape, **common
            )
        else:
            if self._buckets is None or not is_clean:
                self._buckets = Buckets(self.model.parameters().values())
            self.stepper = Stepper(
                objective=_train_objective(self.step_fn, self.judge, optimizers),
                optimizers=optimizers.named,
                precision=spec.precision,
                clip_norm=spec.batch.clip_norm,
                buckets=self._buckets,
                tree=Tree(peers, spec.batch.microbatches or peers.world) if spec.reproducible else None,
                **common,
            )
            if scaler is not None:
                self.stepper.scaler = scaler
        if is_local:
            assert isinstance(peers, Background)
            self.stepper = LocalStepper(self.stepper, self.model, peers, spec.sync)
        self.how = Pass(
            block_samples=-(-spec.batch.samples // (spec.batch.microbatches or peers.world)),
            precision=spec.precision,
            seed=spec.seed,
            peers=peers,
            device=self.device,
            is_exact=spec.reproducible,
        )

    def restart(self) -> None:
        """Set everything as it was before the first step."""
        load_weights(self.model, _first_model(self.spec, self.device).state())
        state = copy.deepcopy(self._first)
        for name, optimizer in self.optimizers.named.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.schedulers.load_state_dict(state["schedulers"])
        if not isinstance(self.stepper, FreeStepper) and self.stepper.scaler is not None:
            self.stepper.scaler = Scaler()

    def evaluate(self, source: Source | Stream) -> dict[str, float]:
        """Return the loss and the metrics over all of `source`; all workers take part."""
        with self.shared():
            return evaluate(self.model, self.judge, self.counts, source, self.how)

    def shared(self) -> AbstractContextManager[None]:
        """Let the model hold, for a while, what is the same on all workers; without local steps it always does."""
        return self.stepper.shared() if isinstance(self.stepper, LocalStepper) else nullcontext()

    def begin(self) -> None:
        """Take note that all workers hold the same first weights now."""
        if isinstance(self.stepper, LocalStepper):
            self.stepper.begin()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the live tensors of the model, and the rest of the training state as a tree of tensors and scalars."""
        shared = {"shared": self.stepper.state()} if isinstance(self.stepper, LocalStepper) else {}
        return self.model.state(), {**self.own_state(), "schedulers": self.schedulers.state_dict(), **shared}

    def own_state(self) -> dict[str, Any]:
        """Return the part of the training state that after local steps each worker has for itself."""
        scaler = self.stepper.scaler
        own = {"own": self.stepper.own_state()} if isinstance(self.stepper, LocalStepper) else {}
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.named.items()},
            "scaler": [scaler.scale, scaler.good_steps] if scaler else None,
            **own,
        }

    def finalize(self) -> bool:
        """Put the weights in place that a run ends with; tell whether these are others than it trained.

        Optimizers that keep averaged weights have such, and workers that trained by themselves.
        """
        named = self.optimizers.named.values()
        is_averaged = True in {optimizer.finalize() for optimizer in named if hasattr(optimizer, "finalize")}
        return (isinstance(self.stepper, LocalStepper) and self.stepper.finish(is_averaged)) or is_averaged

    def load(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Take over a state. Raises ConfigError when it is that of another model."""
        load_weights(self.model, tensors)
        for name, optimizer in self.optimizers.named.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.schedulers.load_state_dict(state["schedulers"])
        if state["scaler"] is not None and self.stepper.scaler is not None:
            self.stepper.scaler = Scaler(*state["scaler"])
        if isinstance(self.stepper, LocalStepper):
            self.stepper.load(state["shared"], state["own"])


def load_weights(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the model's own. Raises ConfigError when names or shapes differ."""
    own = model.state()
    shapes, saved = ({name: tensor.shape for name, tensor in state.items()} for state in (own, tensors))
    wrong = sorted(name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name))
    if wrong:
        raise ConfigError(
            f"the checkpoint is of another model: {wrong[0]!r} and {len(wrong) - 1} more tensors do not fit. "
            "Start under another name, or use the model that the run began with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.data_ptr() != tensors[name].data_ptr():
                tensor.copy_(tensors[name])


def make_parts(
    spec: TrainSpec,
    feed: Feed | StreamFeed | None,
    device: torch.device,
    note: Callable[[str], None],
) -> Parts:
    """Build everything but the stepper, which belongs to a generation: see `Parts.bind`.

    feed: None for a job that does not train. note: told what was inferred.
    Raises ConfigError.
    """
    model = _first_model(spec, device)  # first, so that Keras is imported as we want it
    code: Code = pickle.loads(spec.code)  # made by this package in the user's own driver
    if isinstance(model, TorchModel):
        loss, metrics = code.loss, code.metrics
        if code.inferred is not None:
            loss, metrics = code.inferred.loss, code.inferred.metrics if metrics is None else metrics
            if spec.blueprint.kind == "factory":
                note(code.inferred.note)
        judge = make_objective(loss)
        counts: Counts = Sums(make_metrics(metrics, loss))
        optimizers = make_optimizer("adam" if code.optimizer is None else code.optimizer, model)
    else:
        from lepton_ray.train.keras_parts import keras_pieces  # imports keras, which only these models need

        judge, counts, optimizers = keras_pieces(cast("KerasModel", model), code, note)
    return Parts(
        spec=spec,
        step_fn=code.step_fn,
        feed=feed,
        device=device,
        model=model,
        judge=judge,
        counts=counts,
        optimizers=optimizers,
        schedulers=make_scheduler(code.scheduler, optimizers),
        callbacks=code.callbacks,
    )


def _first_model(spec: TrainSpec, device: torch.device) -> Model:
    return build(spec.blueprint, device, seed_of(spec.seed, spec.coordinate))


def _train_objective(step_fn: StepFn | None, judge: Objective, optimizers: Optimizers) -> Objective:
    if step_fn is None:
        return judge
    return make_objective(None, step_fn, optimizers.shape({name: _NotHere() for name in optimizers.named}))


class _NotHere:
    """Stands for an optimizer where a `step_fn` may not step by itself."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"step_fn uses its optimizers (.{name}), so every worker must have one microbatch per step, in fp32: leave "
            'Batch(microbatches=...) at the number of workers and precision at "fp32", or return the loss only.'
        )
