"""Turn the user's metrics into sums and weights, which add up exactly over microbatches and workers.

A metric is (outputs, target) -> (sum, weight); its value over a data set is the sum of the sums by the sum of the
weights. What is a function of such a mean (rmse, perplexity) is applied once, by `finish`. A callable that returns a
mean counts once per sample of what it was given; return (sum, weight) for means over anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lepton_ray.data.batch import samples
from lepton_ray.errors import ConfigError
from lepton_ray.train.objective import IGNORED, alike, class_second, scores_of, weigh
from lepton_ray.train.words import FINISHED, check_metrics, name_metrics

Metric = Callable[[Any, Any], tuple[Tensor, float]]
"""(outputs, target) -> (sum of type float64, weight)."""

_FINISH: dict[str, Callable[[float], float]] = dict(zip(FINISHED, (math.sqrt, math.exp)))


def make_metrics(spec: Any, loss: Any = None) -> dict[str, Metric]:
    """Return the metrics by name.

    spec: a word, a callable(outputs, target), a list of these, a dict name -> callable, or None.
    loss: the job's loss. Where it is a binary one, "accuracy" asks on which side of the border each output lies.
    Raises ConfigError.
    """
    check_metrics(spec)
    by_word = {**_BY_WORD, "accuracy": _accuracy(_border(loss))}
    return {
        name: _worded(name, by_word[metric]) if isinstance(metric, str) else _called(metric)
        for name, metric in name_metrics(spec).items()
    }


def finish(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the value of each metric from its (sum, weight) over everything; NaN where nothing was counted."""
    means = {name: total / weight if weight else math.nan for name, (total, weight) in sums.items()}
    return {name: _applied(_FINISH.get(name), mean) for name, mean in means.items()}


def _applied(function: Callable[[float], float] | None, mean: float) -> float:
    try:
        return mean if function is None else function(mean)
    except OverflowError:
        return math.inf


# --- words -----------------------------------------------------------------------------------------------------------


def _worded(name: str, metric: Callable[[Tensor, Tensor], tuple[Tensor, float]]) -> Metric:
    def measure(outputs: Any, target: Any) -> tuple[Tensor, float]:
        if not isinstance(target, Tensor):
            raise ConfigError(
                f"metrics={name!r} compares outputs with a target tensor; the batch has "
                f"{'none' if target is None else type(target).__name__}. Leave the metric out or pass a callable."
            )
        return metric(scores_of(outputs).detach(), target)

    return measure


def _border(loss: Any) -> float | None:
    """Return the output above which a binary loss means yes; None for other losses."""
    if loss == "bce" or isinstance(loss, (nn.BCEWithLogitsLoss, nn.SoftMarginLoss)):
        return 0.0
    return 0.5 if isinstance(loss, nn.BCELoss) else None


def _accuracy(border: float | None) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    def measure(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
        if border is not None or scores.ndim == 1 or scores.shape[1:] == (1,):
            scores, target = alike(scores, target)
            hits = (scores > (border or 0.0)) == (target > 0.5)
            return _sum(hits), float(hits.numel())
        scores, classes, counted = _classes(scores, target)
        return _sum((scores.argmax(1) == classes) & counted), float(counted.sum())

    return measure


def _top5(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
    scores, classes, counted = _classes(scores, target)
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return _sum((best == classes.unsqueeze(1)).any(1) & counted), float(counted.sum())


def _classes(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores with classes in dim 1, the right classes, and which of them count."""
    scores, target = class_second(scores, target)
    classes = target.argmax(1) if target.is_floating_point() else target
    return scores, classes, classes != IGNORED


def _log_likelihood(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Sum the cross entropy of the counted targets, whose mean is the logarithm of the perplexity."""
    scores, classes, counted = _classes(scores, target)
    loss_sum = F.cross_entropy(scores.double(), classes, reduction="sum", ignore_index=IGNORED)
    return loss_sum, float(counted.sum())


def _distance(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    def measure(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
        scores, target = alike(scores.double(), target)
        return _sum(function(scores - target)), float(scores.numel())

    return measure


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


_BY_WORD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, float]]] = {
    "top5": _top5,
    "mae": _distance(torch.abs),
    "mse": _distance(torch.square),
    "rmse": _distance(torch.square),
    "perplexity": _log_likelihood,
}


# --- callables -------------------------------------------------------------------------------------------------------


def _called(metric: Callable[[Any, Any], Any]) -> Metric:
    def measure(outputs: Any, target: Any) -> tuple[Tensor, float]:
        value = metric(outputs, target)
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return _float64(value[0]).reshape(()), float(value[1])
        return weigh(_float64(value), samples(outputs if target is None else target))

    return measure


def _float64(value: Any) -> Tensor:
    try:
        value = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"a metric returned {type(value).__name__}; expected a number, one value per sample, or (sum, weight)."
        ) from error
    return value.double()
