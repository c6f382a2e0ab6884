"""The metrics of a compiled Keras model, counted over microbatches and workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import torch

from lepton_ray.errors import ConfigError
from lepton_ray.train.keras import KerasModel


class KerasMetrics:
    """The metrics that a model was compiled with, as sums that add up over workers."""

    def __init__(self, model: KerasModel) -> None:
        self._model = model
        # Any: Keras' own class for the metrics of compile() is not public.
        self._metrics: Any = next((m for m in model.keras_model.metrics if m.name == "compile_metrics"), None)
        self._is_checked = False

    def update(self, outputs: Any, target: Any) -> None:
        """Count a microbatch. Raises ConfigError for a metric that does not add up over microbatches."""
        if self._metrics is None:
            return
        with self._model.scope(), torch.no_grad():
            if not self._is_checked and len(keras.tree.flatten(target)[0]) > 1:
                self._check(outputs, target)
            self._metrics.update_state(target, outputs)

    def prime(self, outputs: Any, target: Any) -> None:
        """Learn the shapes from a microbatch without counting it; a worker that counted none needs it for `vector`."""
        if self._metrics is not None and not self._metrics.built:
            self.update(outputs, target)
            self.reset()

    def vector(self) -> torch.Tensor:
        """Return all counts, float64 on the CPU; the sum of these over the workers goes to `result`."""
        return _flat(self._variables())

    def result(self, counts: torch.Tensor) -> dict[str, float]:
        """Return the metrics by name from summed counts, and start anew."""
        if self._metrics is None or not self._metrics.built:
            return {}
        with self._model.scope(), torch.no_grad():
            self._assign(counts)
            values = {name: keras.ops.convert_to_numpy(v) for name, v in self._metrics.result().items()}
        self.reset()
        return _scalars(values)

    def reset(self) -> None:
        """Forget all counts."""
        if self._metrics is not None:
            with self._model.scope():
                self._metrics.reset_state()

    def _variables(self) -> list[Any]:
        return self._metrics.variables if self._metrics is not None else []

    def _assign(self, counts: torch.Tensor) -> None:
        variables = self._variables()
        for variable, part in zip(variables, counts.split([v.value.numel() for v in variables])):
            variable.value.copy_(part.view(variable.value.shape))

    def _check(self, outputs: Any, target: Any) -> None:
        """Refuse metrics whose counts over two halves do not add up to those over the whole."""
        kept = self.vector()
        middle = len(keras.tree.flatten(target)[0]) // 2
        first = self._counts_over(slice(0, middle), outputs, target)
        second = self._counts_over(slice(middle, None), outputs, target)
        whole = self._counts_over(slice(None), outputs, target)
        self.reset()
        start = self._counts()
        for name, parts in start.items():
            if parts.any() or not torch.allclose(first[name] + second[name], whole[name], rtol=1e-3, atol=1e-3):
                raise ConfigError(
                    f"metric {name!r} does not add up over microbatches and workers. "
                    "Use one whose variables are sums over samples, such as keras.metrics.Mean."
                )
        if len(kept):
            self._assign(kept)
        self._is_checked = True

    def _counts_over(self, part: slice, outputs: Any, target: Any) -> dict[str, torch.Tensor]:
        self.reset()
        sides = [keras.tree.map_structure(lambda tensor: tensor[part], side) for side in (target, outputs)]
        self._metrics.update_state(*sides)
        return self._counts()

    def _counts(self) -> dict[str, torch.Tensor]:
        return {
            f"{metric.name} ({type(metric).__name__}, {place})": _flat(metric.variables)
            for place, metric in enumerate(self._metrics.metrics)
        }


def _flat(variables: Sequence[Any]) -> torch.Tensor:
    parts = [v.value.detach().reshape(-1).double().cpu() for v in variables]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Name each element of a metric that has several (F1 of each class)."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if value.ndim == 0:
            found[name] = float(value)
        else:
            found.update({f"{name}_{i}": float(v) for i, v in enumerate(value.reshape(-1))})
    return found
