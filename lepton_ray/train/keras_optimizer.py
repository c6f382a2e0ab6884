"""Keras optimizers, driven by the loop like torch's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import torch

from lepton_ray.errors import CheckpointError
from lepton_ray.train.keras import KerasModel


class KerasOptimizer:
    """The Keras optimizer that a model was compiled with, which the loop drives like a torch optimizer."""

    def __init__(self, model: KerasModel) -> None:
        chosen = model.keras_model.optimizer
        self.keras_optimizer, self._model = chosen, model
        self._variables = model.keras_model.trainable_variables
        chosen.loss_scale_factor = None  # gradients arrive unscaled
        if not chosen.built:
            with model.scope():
                chosen.build(self._variables)

    def step(self) -> None:
        """Update the parameters with their gradients; those without one stay as they are."""
        gradients = [v.value.grad for v in self._variables]
        with self._model.scope(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist for variables")
            self.keras_optimizer.apply(gradients, self._variables)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        for variable in self._variables:
            if set_to_none:
                variable.value.grad = None
            elif variable.value.grad is not None:
                variable.value.grad.zero_()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, for a look at the learning rate; a change of it has no effect. Keras' schedules set the rate."""
        with self._model.scope(), torch.no_grad():
            rate = float(keras.ops.convert_to_numpy(self.keras_optimizer.learning_rate))
        return [{"params": [v.value for v in self._variables], "lr": rate}]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name the live tensors of the optimizer by position, the step counter among them."""
        return {
            f"{i:04d}:{re.sub(r'_[0-9]+(?=[_/]|$)', '', v.path)}": v.value.detach()
            for i, v in enumerate(self.keras_optimizer.variables)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state of the same optimizer, by position. Raises CheckpointError when it is another one's."""
        own = self.state_dict()
        shapes, found = ([tuple(t.shape) for t in tensors.values()] for tensors in (own, state))
        if shapes != found:
            raise CheckpointError(
                f"the saved state of the optimizer has {len(found)} tensors that do not fit the {len(shapes)} of "
                f"{type(self.keras_optimizer).__name__}. Use the optimizer that the run was started with."
            )
        for mine, saved in zip(own.values(), state.values()):
            mine.copy_(saved)

    def finalize(self) -> bool:
        """Put averaged weights in place at the end of training; tell whether there are any (`use_ema=True`)."""
        with self._model.scope(), torch.no_grad():
            self.keras_optimizer.finalize_variable_values(self._variables)
        return bool(self.keras_optimizer.use_ema)
