"""The words for losses, optimizers and metrics, and which loss a bare model gets.

No torch here, so that the driver can refuse a misspelt word before it has imported anything slow.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lepton_ray.errors import ConfigError

LOSSES = ("cross_entropy", "bce", "mse", "mae", "l1", "huber", "nll")
METRICS = ("accuracy", "top5", "mae", "mse", "rmse", "perplexity")
OPTIMIZERS = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "asgd": "ASGD",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "sgd": "SGD",
}
"""Word -> class in torch.optim, called with torch's own defaults (adam: lr 1e-3; sgd: lr 1e-3, no momentum)."""


@dataclass(frozen=True, slots=True)
class PerEpoch:
    """Wraps a `scheduler=` callable whose scheduler is to advance at the end of each epoch, not after each step."""

    make: Callable[[Any], Any]
    """Takes the optimizer (or the list or dict of them); returns a torch LR scheduler, or a list or dict of them."""


# --- checks ----------------------------------------------------------------------------------------------------------


def check_words(loss: Any = None, optimizer: Any = None, metrics: Any = None, scheduler: Any = None) -> None:
    """Raise ConfigError for what no worker could turn into a loss, an optimizer, metrics or a scheduler."""
    check_loss(loss)
    check_optimizer(optimizer)
    check_metrics(metrics)
    check_scheduler(scheduler)


def check_loss(loss: Any) -> None:
    """Raise ConfigError for a loss that is neither None, a known word nor a callable that gives a mean."""
    if isinstance(loss, str):
        _known("loss", loss, LOSSES)
    elif isinstance(loss, type):
        raise ConfigError(f"loss={loss.__name__} is a class. Pass an instance of it: loss={loss.__name__}().")
    elif loss is not None and not callable(loss):
        raise ConfigError(f"loss={_kind(loss)}: expected a word ({', '.join(LOSSES)}) or a callable(outputs, target).")
    elif getattr(loss, "reduction", None) == "sum":
        raise ConfigError(
            f'loss={_kind(loss)} has reduction="sum", whose scale changes with the batch; gradients are means here. '
            'Use reduction="mean", or a function that returns (sum, weight).'
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise ConfigError for an optimizer that is neither None, a known word nor a callable."""
    if isinstance(optimizer, str):
        _known("optimizer", optimizer, OPTIMIZERS)
    elif not isinstance(optimizer, type) and hasattr(optimizer, "param_groups"):
        name = type(optimizer).__name__
        raise ConfigError(
            f"optimizer={_kind(optimizer)} holds the parameters of this process, but the workers train copies. "
            f"Pass the class, functools.partial({name}, lr=...), or a function: lambda model: "
            f"{name}(model.parameters(), lr=...)."
        )
    elif optimizer is not None and not callable(optimizer):
        raise ConfigError(
            f"optimizer={_kind(optimizer)}: expected a word ({', '.join(OPTIMIZERS)}), a torch.optim class, "
            "a functools.partial of one, or a callable(model)."
        )


def check_scheduler(scheduler: Any) -> None:
    """Raise ConfigError for a scheduler that is neither None, a callable nor a `PerEpoch` of one."""
    if scheduler is None:
        return
    make = scheduler.make if isinstance(scheduler, PerEpoch) else scheduler
    if not isinstance(make, type) and hasattr(make, "load_state_dict"):
        name = type(make).__name__
        raise ConfigError(
            f"scheduler={_kind(make)} holds an optimizer of this process; the workers make their own. "
            f"Pass a function: lambda optimizer: {name}(optimizer, ...)."
        )
    if not callable(make):
        raise ConfigError(f"scheduler={_kind(make)}: expected a callable(optimizer), or PerEpoch of one.")


def check_metrics(metrics: Any) -> None:
    """Raise ConfigError for metrics that are not words, callables, a list of these or a dict name -> callable."""
    for name, metric in name_metrics(metrics).items():
        if name == "loss" or (metric not in METRICS and name in FINISHED):
            raise ConfigError(f"metrics: the name {name!r} is taken. Give yours another one: {{'my_{name}': ...}}.")


FINISHED = ("rmse", "perplexity")
"""Metrics that are a function of a mean, applied when the mean over all samples is known."""


def name_metrics(metrics: Any) -> dict[str, Any]:
    """Name each metric: a word by itself, a callable by its name or its key. Raises ConfigError."""
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            if not isinstance(name, str) or not callable(metric):
                raise ConfigError(
                    f"metrics={{{name!r}: {_kind(metric)}}}: expected a dict of names and callables(outputs, target)."
                )
        return dict(metrics)
    named: dict[str, Any] = {}
    several = isinstance(metrics, Sequence) and not isinstance(metrics, str)
    for metric in metrics if several else [metrics]:
        if isinstance(metric, str):
            name = _known("metrics", metric, METRICS)
        elif callable(metric):
            name = getattr(metric, "__name__", type(metric).__name__)
        else:
            raise ConfigError(f"metrics: {_kind(metric)} is neither a word ({', '.join(METRICS)}) nor a callable.")
        if name == "<lambda>" or name in named:
            why = "has no name" if name == "<lambda>" else "occurs twice"
            raise ConfigError(f"metrics: {name} {why}. Pass a dict: {{'name': callable}}.")
        named[name] = metric
    return named


def _known(option: str, word: str, known: Sequence[str] | Mapping[str, str]) -> str:
    if word in known:
        return word
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{option}={word!r} is not known.{hint} Known: {', '.join(known)}; or pass a callable.")


def _kind(value: Any) -> str:
    """Name a value in an error: plain values as written, objects by their type."""
    return repr(value) if isinstance(value, (str, int, float, type(None))) else f"<{type(value).__name__}>"


# --- the loss of a bare model ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What a target looks like."""

    kind: str
    """numpy's letter for the type: b bool, i and u integer, f float."""
    shape: tuple[int, ...]
    """Samples first."""
    is_binary: bool
    """Every value is 0 or 1."""
    is_one_hot: bool
    """Rows of at least two columns with a single 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """The loss and the metrics that a job without `loss=` gets."""

    loss: str | None
    """None: the one that the model returns."""
    metrics: tuple[str, ...]
    why: str

    @property
    def note(self) -> str:
        """What to tell the user of it."""
        metrics = f", metrics {', '.join(self.metrics)}" if self.metrics else ""
        return f"loss {self.loss or 'from the model'}{metrics}: {self.why} (set loss= and metrics= to choose)"


def target_facts(target: Any) -> TargetFacts:
    """Describe a target: a numpy array, a tensor on the CPU, or anything that numpy reads."""
    import numpy as np  # only a driver that has to infer needs it

    values = np.asarray(target)
    is_binary = values.dtype.kind in "biuf" and bool(((values == 0) | (values == 1)).all())
    is_one_hot = is_binary and values.ndim > 1 and values.shape[-1] > 1 and bool((values.sum(-1) == 1).all())
    return TargetFacts(kind=values.dtype.kind, shape=values.shape, is_binary=is_binary, is_one_hot=is_one_hot)


def infer_loss(
    target: TargetFacts | None, outputs: tuple[int, ...] | None = None, *, carries_loss: bool = False
) -> Inferred:
    """Choose loss and metrics for a model that came without a loss.

    target: None when the batches have none. outputs: shape of the model's output for some samples, if known.
    carries_loss: the output is an object or dict with a loss in it.
    Raises ConfigError when there is nothing to choose from.
    """
    if carries_loss:
        return Inferred(loss=None, metrics=(), why="the model's outputs carry a loss")
    if target is None:
        raise ConfigError(
            "no loss was given, the batches have no target and the model returns no loss. "
            "Pass loss=, or data as (x, y) pairs."
        )
    if target.kind not in "biuf":
        raise ConfigError(
            f"the target is of numpy kind {target.kind!r}, from which no loss follows. "
            "Encode labels as integers, or pass loss=."
        )
    is_column = outputs is not None and outputs[1:] in ((), (1,))
    is_alike = outputs is not None and not is_column and outputs[1:] == target.shape[1:]
    classes = ("accuracy",)
    distances = ("mae",)
    if target.is_one_hot and (is_alike or outputs is None):
        return Inferred(loss="cross_entropy", metrics=classes, why="each row of the target is a one-hot class")
    if target.kind == "f":
        return Inferred(loss="mse", metrics=distances, why="the target is a float")
    if is_column and target.is_binary:
        return Inferred(loss="bce", metrics=classes, why="the target is 0 or 1 and the model has one output")
    if is_alike and target.is_binary:
        return Inferred(loss="bce", metrics=classes, why="each output has its own target, 0 or 1")
    if is_column or is_alike:
        return Inferred(loss="mse", metrics=distances, why="each output has its own whole number as target")
    return Inferred(loss="cross_entropy", metrics=classes, why="the target is a class index")
