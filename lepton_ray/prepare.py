"""Turn what the user handed to the trainer into a job: checked, packed, described. Runs in the driver, without Ray.

Whatever can be known here to be wrong is said here, before any process starts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_ray.callbacks import EarlyStopping
from lepton_ray.config import Batch, Checkpoints, Elastic, Parallel, Sync, check
from lepton_ray.data.arrays import ArraySource
from lepton_ray.data.batch import split_target
from lepton_ray.data.sources import Source, Stream, describe, label_range
from lepton_ray.errors import ConfigError
from lepton_ray.train import blueprint, keras_pack, pickling
from lepton_ray.train.spec import Code, TrainSpec
from lepton_ray.train.words import Inferred, TargetFacts, check_words, infer_loss, target_facts

if TYPE_CHECKING:
    import torch

PROBE_SAMPLES = 2
IGNORED = -100
"""torch's label of a sample that does not count (`train.objective` says the same, but is slow to import)."""
PROBE_PARAMETERS = 50_000_000
"""Larger models are not tried out in the driver: a forward of theirs takes too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The trainer's arguments, as given."""

    workers: Elastic
    loss: Any
    optimizer: Any
    scheduler: Any
    metrics: Any
    step_fn: Any
    transform: Any
    collate: Any
    callbacks: Sequence[Any]
    epochs: int | None
    steps: int | None
    batch: Batch
    precision: str
    seed: int
    reproducible: bool
    parallel: Parallel
    sync: Sync
    checkpoints: Checkpoints
    validate_every: int | None
    threads: int
    patience_s: float


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
        workers=options.workers,
        batch=options.batch,
        epochs=options.epochs,
        steps=options.steps,
        precision=options.precision,
        parallel=options.parallel,
        seed=options.seed,
        validate_every=options.validate_every,
        sync=options.sync,
        reproducible=options.reproducible,
    )
    epochs = options.epochs if options.epochs or options.steps else 1
    if options.step_fn is not None and not callable(options.step_fn):
        raise ConfigError(f"step_fn={options.step_fn!r}: expected a function of (model, batch, optimizers).")
    if options.step_fn is not None and test is not None and options.loss is None:
        raise ConfigError("test_data with step_fn needs loss=: it says what the evaluation measures.")
    if options.step_fn is not None and options.batch.clip_norm is not None:
        raise ConfigError("Batch(clip_norm=...) with step_fn: clip the gradients in step_fn itself.")
    if options.step_fn is not None and options.reproducible:
        raise ConfigError(
            "reproducible=True promises the same bits for any number of workers; a step_fn steps its optimizers on "
            "each worker's one microbatch, so that their number counts. Use loss=, or leave reproducible alone."
        )
    _check_best(options.checkpoints.best)
    if test is None:
        _check_no_test(options)
    packed = blueprint.pack(model)
    if packed.kind == "keras":
        options = _keras_options(model, train, options)
    else:
        check_words(options.loss, options.optimizer, options.metrics, options.scheduler)
    words = _words(model, packed, train, test, options)
    code = _pickled(
        Code(
            loss=options.loss,
            optimizer=options.optimizer,
            scheduler=options.scheduler,
            metrics=options.metrics,
            step_fn=options.step_fn,
            callbacks=tuple(options.callbacks),
            inferred=words,
            target=_keras_target(model, packed, train, options),
        )
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
        sync=options.sync,
        checkpoints=_checkpoints(train, batch, options),
        validate_every=options.validate_every,
        threads=options.threads,
        patience_s=options.patience_s,
    )
    return Prepared(
        spec=spec,
        notes=[words.note] if words is not None and packed.kind == "module" else [],  # of a factory, the workers know
        config=_config(model, spec, train, test, options, options.loss if words is None else words.loss),
        total_steps=_total_steps(train, batch, epochs, options.steps),
    )


def _check_best(best: str | None) -> None:
    """Refuse a metric that no run has: whether a test_... exists, the first evaluation tells. Raises ConfigError."""
    if best is not None and best != "train_loss" and not best.startswith("test_"):
        raise ConfigError(
            f"Checkpoints(best={best!r}): what is measured is train_loss and, on the test data, test_loss and a "
            f'test_... of each metric. Did you mean "test_{best}"?'
        )


def _checkpoints(train: Source | Stream, batch: Batch, options: Options) -> Checkpoints:
    """Fill in when to write checkpoints where no epoch may end in a run of `steps`.

    Ten times, but not so often that writing them is felt, and not so rarely that much is lost.
    """
    is_open = not isinstance(train, Source) or -(-len(train) // batch.samples) > (options.steps or 0)
    if options.steps is None or options.checkpoints.every_steps is not None or not is_open:
        return options.checkpoints
    return replace(options.checkpoints, every_steps=min(max(100, options.steps // 10), 1000))


def _check_no_test(options: Options) -> None:
    """Refuse what waits for a measure that a run without test data never has. Raises ConfigError."""
    best = options.checkpoints.best
    waits = {f"Checkpoints(best={best!r})": best, "validate_every": options.validate_every and "test_loss"}
    waits |= {f"EarlyStopping({c.metric!r})": c.metric for c in options.callbacks if isinstance(c, EarlyStopping)}
    for asked, metric in waits.items():
        if metric and metric.startswith("test_"):
            raise ConfigError(f"{asked} needs test_data=, which was not given.")


def _pickled(code: Code) -> bytes:
    """Pickle all pieces at once; what cannot be sent is named by its option. Raises ConfigError."""
    try:
        return pickling.dumps(code, "options")
    except ConfigError:
        for option in fields(code):
            pickling.dumps(getattr(code, option.name), option.name)
        raise


def _total_steps(train: Source | Stream, batch: Batch, epochs: int | None, steps: int | None) -> int | None:
    if steps is not None or not isinstance(train, Source):
        return steps
    return -(-len(train) // batch.samples) * (epochs or 1)


# --- what a bare model trains on --------------------------------------------------------------------------------------


def _words(
    model: Any, packed: blueprint.Blueprint, train: Source | Stream, test: Source | Stream | None, options: Options
) -> Inferred | None:
    """Infer the loss where none was given; check the data against the model's inputs and outputs."""
    if packed.kind == "keras" or options.step_fn is not None or not isinstance(train, Source):
        if options.loss is None and options.step_fn is None and packed.kind != "keras":
            raise ConfigError("a stream shows no sample before it is read, so no loss can be inferred. Pass loss=.")
        return None
    is_plain = isinstance(train, ArraySource) and (test is None or isinstance(test, ArraySource))
    if packed.kind == "factory" and options.loss is not None and is_plain:
        return None  # nothing to try and no user code to run: a driver without torch stays without
    sample = train.fetch(np.arange(min(PROBE_SAMPLES, len(train))))
    outputs = _try(model, packed, sample, "train_data")
    words = None
    if options.loss is None:
        target = _target(train, sample)
        carries = outputs is not None and not hasattr(outputs, "shape")
        shape = tuple(outputs.shape) if outputs is not None and not carries else None
        words = infer_loss(target_facts(target) if target is not None else None, shape, carries_loss=carries)
    loss = options.loss if words is None else words.loss
    if isinstance(test, Source):
        _try(model, packed, test.fetch(np.arange(min(PROBE_SAMPLES, len(test)))), "test_data")
    if getattr(outputs, "ndim", 0) == 2:
        for name, source in (("train_data", train), ("test_data", test)):
            _check_labels(name, source, outputs.shape[1], loss)
    return words


def _keras_options(model: Any, train: Source | Stream, options: Options) -> Options:
    """Check the options that go to a Keras model, and make them ready to travel to another backend."""
    keras_pack.check_options(
        loss=options.loss,
        optimizer=options.optimizer,
        metrics=options.metrics,
        scheduler=options.scheduler,
        step_fn=options.step_fn,
    )
    if options.loss is None and not isinstance(train, Source) and not keras_pack.has_loss(model):
        raise ConfigError(keras_pack.NO_SAMPLE)
    loss, optimizer, metrics = map(keras_pack.portable, (options.loss, options.optimizer, options.metrics))
    return replace(options, loss=loss, optimizer=optimizer, metrics=metrics)


def _keras_target(
    model: Any, packed: blueprint.Blueprint, train: Source | Stream, options: Options
) -> TargetFacts | None:
    """Describe the targets where a Keras model may need it to choose a loss."""
    needs_none = packed.kind == "module" or options.loss is not None or options.step_fn is not None
    if needs_none or not isinstance(train, Source) or (packed.kind == "keras" and keras_pack.has_loss(model)):
        return None
    target = _target(train, train.fetch(np.arange(min(PROBE_SAMPLES, len(train)))))
    return None if target is None else target_facts(target)


def _check_labels(name: str, source: Source | Stream | None, classes: int, loss: Any) -> None:
    """Refuse class indices that the model has no output for. Raises ConfigError."""
    is_classes = loss in ("cross_entropy", "nll") or type(loss).__name__ in ("CrossEntropyLoss", "NLLLoss")
    labels = label_range(source) if source is not None and is_classes else None
    if labels is None:
        return
    lowest, highest = labels
    if lowest < 0 and lowest != getattr(loss, "ignore_index", IGNORED):
        advice = "Shift the labels to start at 0."
    elif highest >= classes:
        advice = f"Shift the labels to start at 0, or give the model {highest + 1} outputs."
    else:
        return
    raise ConfigError(
        f"{name}: labels run from {lowest} to {highest}, but the model gives {classes} outputs (classes 0 to "
        f"{classes - 1}). {advice}"
    )


def _target(train: Source, sample: Any) -> Any:
    """Return a target from which its kind can be told: more of it than a sample where that costs nothing."""
    try:
        more = train.fetch(np.arange(min(256, len(train))))
    except Exception:  # noqa: BLE001 - user code; the sample is enough, and the workers will show the error
        more = sample
    target = split_target(more)[1]
    return target if not isinstance(target, (tuple, list, Mapping)) else None


def _try(model: Any, packed: blueprint.Blueprint, sample: Any, name: str) -> Any:
    """Return what the model makes of two samples, without a trace in it; None where that is not tried.

    name: how messages call the data. Raises ConfigError when the model cannot take them.
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
                f"the model cannot take {name}: {type(error).__name__}: {_short(error)} "
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


# --- what must stay the same under a name -----------------------------------------------------------------------------


def _config(
    model: Any, spec: TrainSpec, train: Source | Stream, test: Source | Stream | None, options: Options, loss: Any
) -> dict[str, Any]:
    return {
        "model": {**spec.blueprint.facts, "form": _form(model, spec.blueprint.kind)},
        "train_data": describe(train),
        "test_data": None if test is None else describe(test),
        "loss": identity(loss),
        "optimizer": identity(options.optimizer),
        "scheduler": identity(options.scheduler),
        "step_fn": identity(options.step_fn),
        "transform": identity(options.transform),
        "collate": identity(options.collate),
        "batch": asdict(spec.batch),
        "epochs": spec.epochs,
        "steps": spec.steps,
        "precision": spec.precision,
        "seed": spec.seed,
        "reproducible": spec.reproducible,
        "parallel": asdict(options.parallel),
        "sync": _sync(options),
    }


def _sync(options: Options) -> dict[str, Any] | None:
    """Describe how workers exchange what they learn. After local steps no other can go on from a worker's state."""
    sync = asdict(options.sync)
    del sync["tls"]  # it changes nothing in the outcome
    if replace(options.sync, tls=False) == Sync():
        return None
    workers = {"num_workers": options.workers.max} if options.sync.is_local else {}
    return {**sync, **workers}


def _form(model: Any, kind: str) -> str | None:
    """Tell what a model does beside holding its weights, such as a Dropout's rate, as a digest."""
    if kind == "factory":
        return identity(model)
    if kind == "keras":  # its text says little, and counts the models that were made before it
        return None
    return _digest(re.sub(r" at 0x[0-9a-f]+", "", repr(model)))


def identity(value: Any) -> str | None:
    """Describe a word or callable so that a changed one reads differently: its name, and a digest of its code and of
    the plain values that it holds: defaults, what a function took from around it, the fields of an object.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, keras_pack.Portable):
        return str(value)
    if isinstance(value, Mapping):
        return str({key: identity(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return str([identity(item) for item in value])
    if isinstance(value, functools.partial):
        options = ", ".join(f"{key}={option!r}" for key, option in sorted(value.keywords.items()))
        return f"partial({identity(value.func)}, {value.args!r}, {options})"
    made = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
    name = f"{made.__module__}.{made.__qualname__}"
    if inspect.isclass(value):
        return name
    if inspect.isfunction(value):
        around = zip(value.__code__.co_freevars, value.__closure__ or ())
        held = {name: cell.cell_contents for name, cell in around if cell != types.CellType()}  # an unset one is empty
        held |= {f"default {i}": default for i, default in enumerate(value.__defaults__ or ())}
        text = _code_text(value.__code__) + _plain_text({**held, **(value.__kwdefaults__ or {})})
    else:
        text = _plain_text(getattr(value, "__dict__", {}))
    return f"{name} {_digest(text)}" if text else name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain_text(held: Mapping[Any, Any]) -> str:
    """Return the plain values among those that a function or an object holds, in the order of their names."""
    plain = {name: content for name, content in held.items() if _is_plain(content)}
    return str(sorted(map(repr, plain.items()))) if plain else ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bytes, int, float, bool))


def _code_text(value: Any) -> str:
    """Return code and constants as a text that is the same in every process."""
    if inspect.iscode(value):
        return f"{value.co_code!r}{value.co_names!r}{[*map(_code_text, value.co_consts)]!r}"
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


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
