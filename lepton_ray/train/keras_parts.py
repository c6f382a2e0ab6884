"""Loss, metrics and optimizer of a Keras model: what the trainer was given, else `compile()`, else what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lepton_ray.errors import ConfigError
from lepton_ray.train import keras
from lepton_ray.train.evaluate import Counts
from lepton_ray.train.keras_metrics import KerasMetrics
from lepton_ray.train.keras_optimizer import KerasOptimizer
from lepton_ray.train.keras_pack import NO_SCHEDULER, NO_STEP_FN, Portable
from lepton_ray.train.objective import Objective
from lepton_ray.train.optimizers import Optimizers, make_optimizer
from lepton_ray.train.spec import Code


def keras_pieces(
    model: keras.KerasModel, code: Code, note: Callable[[str], None]
) -> tuple[Objective, Counts, Optimizers]:
    """Compile the model with all that is known; return its objective, metrics and optimizers.

    Raises ConfigError.
    """
    if code.step_fn is not None:
        raise ConfigError(NO_STEP_FN)
    is_own = code.optimizer is None or isinstance(code.optimizer, (str, Portable))
    chosen = keras.prepare(
        model, code.target, loss=code.loss, optimizer=code.optimizer if is_own else None, metrics=code.metrics
    )
    if code.loss is None:
        name = getattr(chosen.loss, "name", chosen.loss)
        note(f"Keras loss{'' if name is None else f' {name}'}: {chosen.why} (set loss= to choose)")
    if not is_own:
        optimizers = make_optimizer(code.optimizer, model)
    elif code.scheduler is not None:
        raise ConfigError(NO_SCHEDULER)
    else:
        named: dict[str, Any] = {"optimizer": KerasOptimizer(model)}
        optimizers = Optimizers(named=named, shape=lambda parts: parts["optimizer"])
    return keras.keras_objective(model), KerasMetrics(model), optimizers
