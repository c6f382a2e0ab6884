"""Turn the user's loss into a sum and a weight, so that means over samples stay exact however a batch is shared.

The gradient of a step is (sum over microbatches of the gradient of loss_sum) / (sum of weight). Exact are: losses given
by a word, `nn.CrossEntropyLoss`, `nn.NLLLoss`, and callables that return (sum, weight) or one value per sample. A
callable that returns a mean counts once per sample of its microbatch. That is exact when each sample weighs the same,
as in torch's other losses, but not for a mean over a varying number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lepton_ray.data.batch import TARGET_KEYS, Batch, samples, split_target
from lepton_ray.errors import ConfigError
from lepton_ray.train.model import Model
from lepton_ray.train.words import check_loss

IGNORED = -100
"""torch's target for a token that does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a microbatch adds to its step."""

    loss_sum: Tensor
    """One value, with its graph."""
    weight: float
    """What the loss is a sum over: samples, elements or tokens."""
    outputs: Any = None
    target: Any = None
    """Both None when a `step_fn` ran, which keeps them to itself."""
    extra: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    """Sum and weight of what a `step_fn` returned beside its loss."""


Objective = Callable[[Model, Batch], Outcome]
Measure = Callable[[Any, Any, Batch], tuple[Tensor, float]]
"""(outputs, target, batch) -> (loss sum, weight)."""
StepFn = Callable[[Any, Batch, Any], Any]
"""(the user's module, batch, optimizers: one, or a list or dict) -> loss, (sum, weight), or a dict with "loss" and
scalars."""


def make_objective(loss: Any, step_fn: StepFn | None = None, optimizers: Any = None) -> Objective:
    """Return the function that computes the loss of a microbatch.

    loss: a word, a callable(outputs, target), or None when the model's outputs carry a loss.
    step_fn: takes the place of `loss`; it must return its loss and leave the stepping to the caller.
    optimizers: handed to `step_fn`.
    Raises ConfigError.
    """
    if step_fn is not None:
        return _opened(step_fn, optimizers)
    check_loss(loss)
    if loss is None:
        return _carried
    measure = _measure(loss)

    def objective(model: Model, batch: Batch) -> Outcome:
        inputs, target = split_target(batch)
        outputs = call(model, inputs)
        loss_sum, weight = measure(outputs, target, batch)
        return Outcome(loss_sum=loss_sum, weight=weight, outputs=outputs, target=target)

    return objective


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: a tuple by position, a dict by name, anything else as the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def scores_of(outputs: Any) -> Tensor:
    """Return the tensor that words for losses and metrics look at: the outputs themselves, or their `logits`."""
    found = outputs if isinstance(outputs, Tensor) else _field(outputs, "logits")
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the model returned {type(outputs).__name__}, which is no tensor and has no logits; a loss or metric "
            "given by a word needs one. Pass a callable(outputs, target)."
        )
    return _wide(found)


def weigh(value: Any, count: int) -> tuple[Tensor, float]:
    """Read what a user's callable returned for `count` samples: a mean, (sum, weight), or one value per sample."""
    match value:
        case (Tensor() as total, weight) if total.numel() == 1:
            return _wide(total).reshape(()), float(weight)
        case Tensor() if value.numel() == 1:
            return _wide(value).reshape(()) * count, float(count)
        case Tensor():
            return _wide(value).sum(), float(value.numel())
    raise ConfigError(
        f"a loss returned {type(value).__name__}; expected a tensor (one mean, or one value per sample), "
        "or a pair (sum, weight)."
    )


def class_second(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores with classes in dim 1, as torch wants them, and the target to match.

    Scores may be (N, C), (N, ..., C) with a target (N, ...), or torch's (N, C, ...). Where both readings fit, three
    dims are read as a sequence (N, T, C) and more as torch's. A target with the shape of the scores holds
    probabilities in the place of the classes.
    Raises ConfigError when the shapes do not fit.
    """
    if scores.ndim > 1 and target.shape == scores.shape:
        target = target.to(scores.dtype)
        return (scores.flatten(0, 1), target.flatten(0, 1)) if scores.ndim == 3 else (scores, target)
    if scores.ndim == 2 and target.shape == (len(scores), 1):
        target = target[:, 0]
    is_last = scores.ndim > 1 and target.shape == scores.shape[:-1]
    is_second = scores.ndim > 1 and target.shape == scores.shape[:1] + scores.shape[2:]
    if not is_last and not is_second:
        raise ConfigError(
            f"outputs {_shape(scores)} and target {_shape(target)} do not fit each other as classes. Expected "
            "outputs (N, C), (N, T, C) or (N, C, ...), and class indices of the same shape without C."
        )
    if target.is_floating_point():
        raise ConfigError(
            f"the target {_shape(target)} of type {target.dtype} cannot hold class indices. Make it whole numbers "
            "(torch.long), or use a loss for floats such as mse."
        )
    if is_last and (scores.ndim == 3 or not is_second):
        scores, target = scores.flatten(0, -2), target.flatten()
    return scores, target.long()


def alike(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and target in one shape and type. (N, 1) and (N,) would broadcast to (N, N). Raises ConfigError."""
    if scores.shape != target.shape:
        if _core(scores) != _core(target):
            raise ConfigError(
                f"outputs {_shape(scores)} and target {_shape(target)} differ in shape; this loss or metric compares "
                "them element by element."
            )
        target = target.reshape(scores.shape)
    return scores, target.to(scores.dtype)


def _core(tensor: Tensor) -> list[int]:
    return [*tensor.shape[:1], *(n for n in tensor.shape[1:] if n != 1)]


# --- losses by word --------------------------------------------------------------------------------------------------


def _cross_entropy(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
    scores, target = class_second(scores, target)
    loss_sum = F.cross_entropy(scores, target, reduction="sum", ignore_index=IGNORED)
    return loss_sum, _class_weight(scores, target, None, IGNORED)


def _nll(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
    scores, target = class_second(scores, target)
    if target.is_floating_point():
        raise ConfigError(f'loss="nll" needs class indices, not a target of probabilities {_shape(target)}.')
    loss_sum = F.nll_loss(scores, target, reduction="sum", ignore_index=IGNORED)
    return loss_sum, _class_weight(scores, target, None, IGNORED)


def _class_weight(scores: Tensor, target: Tensor, class_weights: Tensor | None, ignored: int) -> float:
    """Return what torch divides by for the mean of a loss over classes."""
    if target.is_floating_point():
        return float(scores.numel() // scores.shape[1])
    counted = target[target != ignored]
    return float(counted.numel() if class_weights is None else class_weights[counted].sum())


def _elementwise(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    def measure(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
        scores, target = alike(scores, target)
        return function(scores, target, reduction="sum"), float(scores.numel())

    return measure


_BY_WORD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, float]]] = {
    "cross_entropy": _cross_entropy,
    "nll": _nll,
    "bce": _elementwise(F.binary_cross_entropy_with_logits),
    "mse": _elementwise(F.mse_loss),
    "mae": _elementwise(F.l1_loss),
    "l1": _elementwise(F.l1_loss),
    "huber": _elementwise(F.huber_loss),
}


# --- kinds of loss ---------------------------------------------------------------------------------------------------


def _measure(loss: Any) -> Measure:
    if isinstance(loss, str):
        by_word = _BY_WORD[loss]

        def worded(outputs: Any, target: Any, batch: Batch) -> tuple[Tensor, float]:
            if not isinstance(target, Tensor):
                raise ConfigError(
                    f"loss={loss!r} compares outputs with a target tensor; the batch has "
                    f"{'none' if target is None else type(target).__name__}. Give (x, y) data or a callable loss."
                )
            return by_word(scores_of(outputs), target)

        return worded
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ConfigError(
            f"loss=<{type(loss).__name__}> has trainable parameters, which no optimizer would see. "
            "Make it a part of the model and let the model return its loss."
        )
    # Subclasses may compute something else: they count as any other callable.
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss) and loss.reduction == "mean":
        return lambda outputs, target, batch: _class_module(loss, scores_of(outputs), target)
    has_buffers = isinstance(loss, nn.Module) and any(True for _ in loss.buffers())

    def called(outputs: Any, target: Any, batch: Batch) -> tuple[Tensor, float]:
        if has_buffers and isinstance(target, Tensor):
            loss.to(target.device)
        return weigh(loss(outputs, target), samples(batch))

    return called


def _class_module(loss: Any, outputs: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Evaluate an `nn.CrossEntropyLoss` or `nn.NLLLoss` of mean reduction as the sum and the weight of that mean."""
    class_weights = None if loss.weight is None else loss.weight.to(outputs.device)
    if isinstance(loss, nn.CrossEntropyLoss):
        loss_sum = F.cross_entropy(
            outputs,
            target,
            weight=class_weights,
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            reduction="sum",
        )
    else:
        loss_sum = F.nll_loss(outputs, target, weight=class_weights, ignore_index=loss.ignore_index, reduction="sum")
    return loss_sum, _class_weight(outputs, target, class_weights, loss.ignore_index)


def _carried(model: Model, batch: Batch) -> Outcome:
    """Take the loss that the model returns, as models of HuggingFace do: a mean over the samples given."""
    if isinstance(batch, Mapping):
        # The model wants its labels too, and need not have any.
        inputs, target = batch, next((batch[key] for key in TARGET_KEYS if key in batch), None)
    else:
        inputs, target = split_target(batch)
    outputs = call(model, inputs)
    loss = _field(outputs, "loss")
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"no loss was given and the model's {type(outputs).__name__} carries none. "
            "Pass loss=, or give the model what it needs to compute one."
        )
    loss_sum, weight = weigh(loss, samples(batch))
    return Outcome(loss_sum=loss_sum, weight=weight, outputs=outputs, target=target)


def _opened(step_fn: StepFn, optimizers: Any) -> Objective:
    def objective(model: Model, batch: Batch) -> Outcome:
        return read_step(step_fn(model.user_module, batch, optimizers), samples(batch))

    return objective


def read_step(returned: Any, count: int) -> Outcome:
    """Read what a `step_fn` returned for `count` samples. Raises ConfigError."""
    found = returned if isinstance(returned, Mapping) else {"loss": returned}
    if found.get("loss") is None:
        keys = f"a dict with the keys {sorted(found)}" if found is returned else type(returned).__name__
        raise ConfigError(f'step_fn returned {keys}; expected a loss, or a dict with "loss".')
    loss = found["loss"]
    loss_sum, weight = weigh(torch.as_tensor(loss) if isinstance(loss, (int, float)) else loss, count)
    extra = {
        name: weigh(torch.as_tensor(value, dtype=torch.float64).detach(), count)
        for name, value in found.items()
        if name != "loss"
    }
    return Outcome(loss_sum=loss_sum, weight=weight, extra=extra)


def _wide(tensor: Tensor) -> Tensor:
    """Leave half precision: a sum over a batch does not fit its 8 or 11 bits of mantissa."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
