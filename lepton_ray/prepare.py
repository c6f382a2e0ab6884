"""Turn what the user handed to the trainer into a job: checked, packed, described. Runs in the driver, without Ray.

Whatever can be known here to be wrong is said here, before any process starts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_ray.config import Batch, Checkpoints, Parallel, check
from lepton_ray.data.batch import split_target
from lepton_ray.data.sources import Source, Stream, describe, label_range
from lepton_ray.errors import ConfigError
from lepton_ray.train import blueprint
from lepton_ray.train.spec import Code, TrainSpec
from lepton_ray.train.words import Inferred, check_words, infer_loss, target_facts

if TYPE_CHECKING:
    import torch

PROBE_SAMPLES = 2
PROBE_PARAMETERS = 50_000_000
"""Larger models are not tried out in the driver: a forward of theirs takes too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The trainer's arguments, as given."""

    num_workers: int
    loss: Any
    optimizer: Any
    scheduler: Any
    metrics: Any
    step_fn: Any
    callbacks: Sequence[Any]
    epochs: int | None
    steps: int | None
    batch: Batch
    precision: str
    seed: int
    reproducible: bool
    parallel: Parallel
    checkpoints: Checkpoints
    validate_every: int | None
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job, ready to be sent; all but its name and folder."""

    spec: TrainSpec
    notes: list[str]
    """What was inferred, for people."""
    config: dict[str, Any]
    """What must be the same for a run to go on under its name."""
    total_steps: int | None


def prepare(model: Any, train: Source | Stream, test: Source | Stream | None, options: Options) -> Prepared:
    """Check everything and pack it. Raises ConfigError."""
    batch = check(
        num_workers=options.num_workers,
        batch=options.batch,
        epochs=options.epochs,
        steps=options.steps,
        precision=options.precision,
        parallel=options.parallel,
        seed=options.seed,
        validate_every=options.validate_every,
    )
    epochs = options.epochs if options.epochs or options.steps else 1
    if options.step_fn is not None and test is not None and options.loss is None:
        raise ConfigError("test_data with step_fn needs loss=: it says what the evaluation measures.")
    if options.step_fn is not None and options.batch.clip_norm is not None:
        raise ConfigError("Batch(clip_norm=...) with step_fn: clip the gradients in step_fn itself.")
    packed = blueprint.pack(model)
    if packed.kind != "keras":
        check_words(options.loss, options.optimizer, options.metrics, options.scheduler)
    words = _words(model, packed, train, options)
    notes = [] if words.why == "" else [_note(words)]
    loss = words.loss if options.loss is None and words.why else options.loss
    metrics = list(words.metrics) if options.metrics is None and words.why else options.metrics
    code = blueprint.dumps(
        Code(
            loss=loss,
            optimizer=options.optimizer if options.optimizer is not None or packed.kind == "keras" else "adam",
            scheduler=options.scheduler,
            metrics=metrics,
            step_fn=options.step_fn,
            callbacks=tuple(options.callbacks),
        ),
        "loss, optimizer, scheduler, metrics, step_fn or callbacks",
    )
    spec = TrainSpec(
        name="",
        run_url="",
        blueprint=packed,
        code=code,
        batch=batch,
        epochs=epochs,
        steps=options.steps,
        precision=options.precision,
        seed=options.seed,
        reproducible=options.reproducible,
        checkpoints=options.checkpoints,
        validate_every=options.validate_every,
        threads=options.threads,
    )
    return Prepared(
        spec=spec,
        notes=notes,
        config=_config(spec, train, test, options, loss),
        total_steps=_total_steps(train, batch, epochs, options.steps),
    )


def _total_steps(train: Source | Stream, batch: Batch, epochs: int | None, steps: int | None) -> int | None:
    if steps is not None or not isinstance(train, Source):
        return steps
    return -(-len(train) // batch.samples) * (epochs or 1)


# --- what a bare model trains on --------------------------------------------------------------------------------------


def _words(model: Any, packed: blueprint.Blueprint, train: Source | Stream, options: Options) -> Inferred:
    """Infer the loss where none was given, and check labels against the model's outputs."""
    given = Inferred(loss=None, metrics=(), why="")
    if packed.kind == "keras" or options.step_fn is not None or not isinstance(train, Source):
        if options.loss is None and options.step_fn is None and packed.kind != "keras":
            raise ConfigError("a stream shows no sample before it is read, so no loss can be inferred. Pass loss=.")
        return given
    sample = train.fetch(np.arange(min(PROBE_SAMPLES, len(train))))
    outputs = _try(model, packed, sample)
    words = given
    if options.loss is None:
        target = _target(train, sample)
        carries = outputs is not None and not hasattr(outputs, "shape")
        shape = tuple(outputs.shape) if outputs is not None and not carries else None
        words = infer_loss(target_facts(target) if target is not None else None, shape, carries_loss=carries)
    is_classes = (words.loss if words.why else options.loss) == "cross_entropy"
    labels = label_range(train)
    if is_classes and labels is not None and outputs is not None and getattr(outputs, "ndim", 0) == 2:
        lowest, highest = labels
        classes = outputs.shape[1]
        if lowest < 0 or highest >= classes:
            raise ConfigError(
                f"labels run from {lowest} to {highest}, but the model gives {classes} outputs (classes 0 to "
                f"{classes - 1}). Shift the labels to start at 0, or give the model {highest + 1} outputs."
            )
    return words


def _target(train: Source, sample: Any) -> Any:
    """Return a target from which its kind can be told: more of it than a sample where that costs nothing."""
    try:
        more = train.fetch(np.arange(min(256, len(train))))
    except Exception:  # noqa: BLE001 - user code; the sample is enough, and the workers will show the error
        more = sample
    target = split_target(more)[1]
    return target if not isinstance(target, (tuple, list, Mapping)) else None


def _try(model: Any, packed: blueprint.Blueprint, sample: Any) -> Any:
    """Return what the model makes of two samples, without a trace in it; None where that is not tried.

    Raises ConfigError when the model cannot take the data.
    """
    if packed.kind != "module" or packed.facts["parameters"] > PROBE_PARAMETERS:
        return None
    import torch

    from lepton_ray.data.batch import to_device
    from lepton_ray.train.objective import call

    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    inputs = split_target(sample)[0]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model.eval()
            return call(model, to_device(inputs, device))
        except Exception as error:
            raise ConfigError(
                f"the model cannot take the training data: {type(error).__name__}: {_short(error)} "
                f"(tried with inputs {_shapes(inputs)}). Fix the shapes or types, or pass transform=."
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{key}: {_shapes(value)}" for key, value in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(_shapes(value) for value in inputs) + ")"
    tensor: torch.Tensor = inputs
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _note(words: Inferred) -> str:
    metrics = f", metrics {', '.join(words.metrics)}" if words.metrics else ""
    return f"loss {words.loss or 'from the model'}{metrics}: {words.why} (set loss= and metrics= to choose)"


# --- what must stay the same under a name -----------------------------------------------------------------------------


def _config(
    spec: TrainSpec, train: Source | Stream, test: Source | Stream | None, options: Options, loss: Any
) -> dict[str, Any]:
    return {
        "model": spec.blueprint.facts,
        "train_data": describe(train),
        "test_data": None if test is None else describe(test),
        "loss": identity(loss),
        "optimizer": identity(options.optimizer),
        "scheduler": identity(options.scheduler),
        "step_fn": identity(options.step_fn),
        "batch": asdict(spec.batch),
        "epochs": spec.epochs,
        "steps": spec.steps,
        "precision": spec.precision,
        "seed": spec.seed,
        "reproducible": spec.reproducible,
        "parallel": asdict(options.parallel),
    }


def identity(value: Any) -> str | None:
    """Describe a word or callable so that a changed one reads differently: its name and a digest of its code."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, functools.partial):
        options = ", ".join(f"{key}={option!r}" for key, option in sorted(value.keywords.items()))
        return f"partial({identity(value.func)}, {value.args!r}, {options})"
    made = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
    name = f"{made.__module__}.{made.__qualname__}"
    if not inspect.isfunction(value):
        return name
    digest = hashlib.sha256()
    _add_code(digest, value.__code__)
    return f"{name} {digest.hexdigest()[:12]}"


def _add_code(digest: Any, code: Any) -> None:
    digest.update(code.co_code)
    for constant in (*code.co_names, *code.co_consts):
        if inspect.iscode(constant):
            _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode())


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List what differs between two configurations, one line each."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} before, {b!r} now")
    return lines


def with_place(spec: TrainSpec, name: str, run_url: str) -> TrainSpec:
    """Give a job its name and folder."""
    return replace(spec, name=name, run_url=run_url)
