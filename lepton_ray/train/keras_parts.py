"""Loss, metrics and optimizer of a Keras model: what the trainer was given, else `compile()`, else what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lepton_ray.data.batch import split_target
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.train import keras
from lepton_ray.train.evaluate import Counts
from lepton_ray.train.objective import Objective
from lepton_ray.train.optimizers import Optimizers, make_optimizer
from lepton_ray.train.spec import Code
from lepton_ray.train.words import target_facts

LOOKED_AT = 256
"""Samples whose targets are looked at to infer a loss."""


def keras_pieces(
    model: keras.KerasModel, code: Code, source: Source | Stream | None, note: Callable[[str], None]
) -> tuple[Objective, Counts, Optimizers]:
    """Compile the model with all that is known; return its objective, metrics and optimizers.

    Raises ConfigError.
    """
    known = keras.defaults(model)
    loss, metrics = code.loss, code.metrics
    if loss is None and known.loss is None and not keras.has_own_loss(model):
        found = _infer(model, source)
        loss, metrics = found.loss, metrics or found.metrics
        note(f"Keras loss {getattr(loss, 'name', loss)}: {found.why} (compile() the model or set loss= to choose)")
    word = code.optimizer if code.optimizer is not None or known.optimizer is not None else "adam"
    is_own = word is None or isinstance(word, str)
    keras.compile_model(model, loss=loss, metrics=metrics, optimizer=word if is_own else None)
    if not is_own:
        optimizers = make_optimizer(word, model)
    elif code.scheduler is not None:
        raise ConfigError(
            "scheduler= drives torch optimizers. Give the Keras optimizer a keras.optimizers.schedules schedule in "
            "compile(), or pass optimizer= a torch.optim class."
        )
    else:
        named: dict[str, Any] = {"optimizer": keras.KerasOptimizer(model)}
        optimizers = Optimizers(named=named, shape=lambda parts: parts["optimizer"])
    return keras.keras_objective(model), keras.KerasMetrics(model), optimizers


def _infer(model: keras.KerasModel, source: Source | Stream | None) -> keras.KerasDefaults:
    if not isinstance(source, Source):
        raise ConfigError("no loss follows from a stream, which shows no sample before it is read. Pass loss=.")
    target = split_target(source.fetch(np.arange(min(LOOKED_AT, len(source)))))[1]
    outputs = model.keras_model.output_shape
    if not isinstance(outputs, tuple) or target is None:
        raise ConfigError("no loss follows from several outputs or without a target. compile() the model with a loss.")
    return keras.infer(keras.last_activation(model), target_facts(target), (len(target), *outputs[1:]))
