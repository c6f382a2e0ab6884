"""Keras models inside a worker, on Keras' torch backend: the model and its loss.

What Keras does differently from torch, and what is made of it here:
- training or evaluation is an argument of the call;
- BatchNorm's statistics are weights that are not trained; they are offered as buffers;
- dropout draws from seed variables in the layers; they are set for each microbatch and are no part of the state;
- names count up in each process; weights are known by their position.
"""

from __future__ import annotations

import inspect
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lepton_ray.data.batch import Batch, samples, split_target
from lepton_ray.errors import ConfigError
from lepton_ray.plan.batch import seed_of
from lepton_ray.train.blueprint import describe
from lepton_ray.train.keras_import import without_compiler_and_sklearn
from lepton_ray.train.keras_pack import NO_SAMPLE, Portable, is_overridden, weight_names
from lepton_ray.train.model import Buffer, Model
from lepton_ray.train.objective import Objective, Outcome, call
from lepton_ray.train.pickling import FACTORY_HINT
from lepton_ray.train.words import TargetFacts, infer_loss

_WRONG_BACKEND = (
    "a Keras model is trained on Keras' torch backend, but this process runs {found}. "
    "Set the environment variable KERAS_BACKEND=torch before the process imports keras."
)

if os.environ.get("KERAS_BACKEND") != "torch":
    raise ConfigError(_WRONG_BACKEND.format(found=f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND', '(not set)')}"))
try:
    with without_compiler_and_sklearn():
        import keras

    # Private, there since Keras 3.0 and tested: what layers without a seed of their own draw from.
    from keras.src.random.seed_generator import global_seed_generator
except ImportError as error:
    raise ConfigError("a Keras model needs Keras 3 in the workers: pip install 'lepton-ray[keras]'.") from error
if keras.config.backend() != "torch":
    raise ConfigError(_WRONG_BACKEND.format(found=f"the {keras.config.backend()} backend"))

# --- the model -------------------------------------------------------------------------------------------------------


class KerasModel:
    """A Keras model with its weights on `device`."""

    def __init__(self, model: keras.Model, device: torch.device) -> None:
        self.keras_model, self.device = model, device
        self._training = True
        self._takes_training = _takes(model.call, "training")
        self._loss_takes_training = _takes(model.compute_loss, "training")
        self._weights = dict(zip(weight_names(model), model.weights))
        owned = {id(v) for v in model.weights}
        self._seeds = [v for v in model.variables if id(v) not in owned]
        for variable in model.variables:
            variable.value.data = variable.value.data.to(device)

    @property
    def user_module(self) -> keras.Model:
        return self.keras_model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward: one input as it is, several as Keras' list of inputs, keywords as its dict by input name."""
        inputs: Any = kwargs or (args[0] if len(args) == 1 else list(args))
        mode = {"training": self._training} if self._takes_training else {}
        with self.scope():
            return self.keras_model(inputs, **mode)

    def train(self, mode: bool) -> None:
        self._training = mode

    def seed(self, seed: int) -> None:
        with self.scope(), torch.no_grad():
            for place, state in enumerate([global_seed_generator().state, *self._seeds]):
                value = seed_of(seed, place) & 0x7FFFFFFF  # Keras holds seeds as int32
                state.value.copy_(torch.tensor([value, 0]))

    def parameters(self) -> dict[str, nn.Parameter]:
        trained = {id(v) for v in self.keras_model.trainable_weights}
        return {name: v.value for name, v in self._weights.items() if id(v) in trained}

    def buffers(self) -> list[Buffer]:
        names = {id(v): name for name, v in self._weights.items()}
        changing = _changing(self.keras_model)
        return [Buffer(name=names[key], tensor=v.value, keep=keep) for key, (v, keep) in changing.items()]

    def state(self) -> dict[str, torch.Tensor]:
        """Name all weights by position. Seeds are left out: `seed` sets them before they are used."""
        return {name: v.value.detach() for name, v in self._weights.items()}

    def compute_loss(self, inputs: Any, target: Any, outputs: Any) -> torch.Tensor:
        """Return the mean loss as the model computes it itself, with its penalty."""
        mode = {"training": self._training} if self._loss_takes_training else {}
        with self.scope():
            return self.keras_model.compute_loss(x=inputs, y=target, y_pred=outputs, sample_weight=None, **mode)

    def scope(self) -> AbstractContextManager[Any]:
        """Return a context in which this thread's Keras makes its tensors on the device of the model."""
        return keras.device(str(self.device))


def load(payload: bytes, facts: Mapping[str, Any], device: torch.device) -> keras.Model:
    """Unpack a Keras model of a blueprint. Raises ConfigError when Keras cannot make the same model again."""
    archive, code = pickle.loads(payload)  # made by this package, in the user's own driver
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), keras.device(str(device)):
        # The optimizer of a model that was compiled and not trained yet has nothing to load.
        warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
        path = Path(folder) / "model.keras"
        path.write_bytes(archive)
        try:
            custom = {name: _remakeable(value) for name, value in pickle.loads(code).items()}
            model = keras.saving.load_model(path, custom_objects=custom, safe_mode=False)
        except Exception as error:  # the user's layers may raise anything
            raise ConfigError(f"Keras cannot load model={facts['class']} on torch: {error}\n{_advice()}") from error
    if describe(model)["sha256"] != facts["sha256"]:
        raise ConfigError(
            f"Keras made model={facts['class']} with other weights, or others of them frozen.\n{_advice()}"
        )
    return model


def _remakeable(definition: Any) -> Any:
    """Let Keras make a user's model class again that takes no arguments, to which it would pass some."""
    is_model = isinstance(definition, type) and issubclass(definition, keras.Model)
    if not is_model or is_overridden(definition, "get_config") or is_overridden(definition, "from_config"):
        return definition
    if inspect.signature(definition).parameters:
        return definition
    return type(definition.__name__, (definition,), {"from_config": classmethod(lambda cls, config: definition())})


def _advice() -> str:
    return f"Complete the get_config and build of its own layers, or {FACTORY_HINT}."


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether Keras would pass an argument: it goes by the name alone and takes no notice of **kwargs."""
    return name in inspect.signature(function).parameters


def _changing(model: keras.Model) -> dict[int, tuple[Any, float]]:
    """Return what a training forward may change, by id: the variable and the part that a forward keeps of it."""
    found: dict[int, tuple[Any, float]] = {}
    for layer in model._flatten_layers():
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        if is_norm and not layer.trainable:
            continue
        # Private, there since Keras 3.0 and tested: unlike non_trainable_weights it leaves out the kernels of frozen
        # layers, which no forward changes.
        for variable in layer._non_trainable_variables:
            found.setdefault(id(variable), (variable, layer.momentum if is_norm else 1.0))
    return found


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasDefaults:
    """What a Keras model brings along, or what was chosen for it; as `compile` takes them."""

    loss: Any = None
    optimizer: Any = None
    metrics: Any = None
    why: str = "the model was compiled with it"


def defaults(model: KerasModel) -> KerasDefaults:
    """Return what the model was compiled with; without `compile()`, nothing."""
    config = _compiled(model)
    return KerasDefaults(loss=config.get("loss"), optimizer=config.get("optimizer"), metrics=config.get("metrics"))


def prepare(
    model: KerasModel,
    target: TargetFacts | None,
    *,
    loss: Any = None,
    optimizer: Any = None,
    metrics: Any = None,
) -> KerasDefaults:
    """Compile the model for training and return what it is compiled with.

    What is given counts first, then what the model was compiled with, then what follows from the targets.
    target: None when there is none to be seen. loss, optimizer, metrics: as `keras.Model.compile` takes them, or
    Portable. Raises ConfigError.
    """
    loss, metrics = _arrived(loss), _arrived(metrics)
    optimizer = optimizer.config if isinstance(optimizer, Portable) else optimizer
    own, inferred = defaults(model), KerasDefaults()
    if loss is not None:
        inferred = KerasDefaults(why="it was given to the trainer")
    elif has_own_loss(model):
        inferred = KerasDefaults(why="the model has its own compute_loss")
    elif own.loss is None:
        if target is None:
            raise ConfigError(NO_SAMPLE)
        activation = last_activation(model.keras_model)
        inferred = infer(activation, target, _like(model.keras_model.output_shape, target.shape))
    compile_model(
        model,
        loss=inferred.loss if loss is None else loss,
        optimizer="adam" if optimizer is None and own.optimizer is None else optimizer,
        metrics=inferred.metrics if metrics is None and own.metrics is None else metrics,
    )
    return replace(defaults(model), why=inferred.why)


def _arrived(option: Any) -> Any:
    """Make the objects again that travelled as configs."""
    if isinstance(option, Portable):
        return keras.saving.deserialize_keras_object(option.config)
    if isinstance(option, Mapping):
        return {key: _arrived(value) for key, value in option.items()}
    return [_arrived(value) for value in option] if isinstance(option, list) else option


def _like(shape: Sequence[int | None], target: Sequence[int]) -> tuple[int, ...]:
    """Fill dims of an output that the model leaves open with those of the target; the first one counts samples."""
    known = (*target, *[0] * len(shape))
    return tuple(known[i] if size is None or i == 0 else size for i, size in enumerate(shape))


def has_own_loss(model: KerasModel) -> bool:
    """Tell whether the model computes its loss itself, by its own `compute_loss`."""
    return is_overridden(type(model.keras_model), "compute_loss")


def infer(activation: str | None, target: TargetFacts, outputs: tuple[int, ...]) -> KerasDefaults:
    """Choose loss and metrics for a model that was not compiled.

    activation: of the last layer. outputs: shape of the model's output for some samples.
    Raises ConfigError when nothing follows from these.
    """
    choice = infer_loss(target, outputs)
    if choice.loss == "mse":
        return KerasDefaults(loss="mean_squared_error", metrics=["mae"], why=choice.why)
    from_logits = activation not in ("softmax", "sigmoid")
    why = f"{choice.why}; the last activation is {activation}"
    metrics: list[Any] = ["accuracy"]
    if choice.loss == "bce":
        loss = keras.losses.BinaryCrossentropy(from_logits=from_logits)
        metrics = [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if from_logits else 0.5)]
    elif target.is_one_hot:
        loss = keras.losses.CategoricalCrossentropy(from_logits=from_logits)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    return KerasDefaults(loss=loss, metrics=metrics, why=why)


_RESHAPING = ("Reshape", "Flatten", "Permute", "Dropout")


def last_activation(model: keras.Model) -> str | None:
    """Return the name of the activation that the model ends with. Raises ConfigError when its layers do not tell."""
    kinds = {c.__name__ for c in type(model).__mro__}
    if not kinds & {"Functional", "Sequential"} or len(model.outputs) != 1:
        raise ConfigError(
            f"no loss follows from model={type(model).__name__}, whose layers do not tell its last activation. "
            "Call model.compile(loss=...), or pass loss=."
        )
    last = model.outputs[0]._keras_history.operation
    while type(last).__name__ in _RESHAPING:
        last = last.input._keras_history.operation
    if isinstance(last, keras.Model):
        return last_activation(last)
    if type(last).__name__ in ("Softmax", "Sigmoid"):
        return type(last).__name__.lower()
    return getattr(getattr(last, "activation", None), "__name__", None)


def compile_model(model: KerasModel, *, loss: Any = None, optimizer: Any = None, metrics: Any = None) -> None:
    """Compile the model with what is given, and for the rest with what it was compiled with before.

    loss, optimizer, metrics: as `keras.Model.compile` takes them. Raises ConfigError.
    """
    options = {"loss": loss, "optimizer": optimizer, "metrics": metrics}
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return
    options = {**_compiled(model), **given}
    if loss is not None:
        options.pop("loss_weights", None)
    try:
        with model.scope():
            model.keras_model.compile(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Keras cannot compile the model: {error}") from error


def keras_objective(model: KerasModel) -> Objective:
    """Return the objective of a compiled model: loss and penalty as Keras computes them, as a sum and its weight.

    Exact over microbatches where Keras' loss is a mean over samples, or over the unmasked steps of one output. With
    several masked outputs each microbatch counts by its samples. Raises ConfigError.
    """
    if not has_own_loss(model):
        _check_losses(_compiled(model).get("loss"))

    def objective(model: Model, batch: Batch) -> Outcome:
        assert isinstance(model, KerasModel)
        inputs, target = split_target(batch)
        outputs = call(model, inputs)
        weight = _weight(outputs, samples(batch))
        loss_sum = model.compute_loss(inputs, target, outputs) * weight
        return Outcome(loss_sum=loss_sum, weight=weight, outputs=outputs, target=target)

    return objective


def _compiled(model: KerasModel) -> dict[str, Any]:
    if not model.keras_model.compiled:
        return {}
    # Private, there since Keras 3.0 and tested: the arguments of compile() as they were given.
    return dict(model.keras_model._compile_config.config)


_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def _check_losses(losses: Any) -> None:
    flat = keras.tree.flatten(losses) if losses is not None else []
    if not flat:
        raise ConfigError("the model was compiled without a loss. Call model.compile(loss=...), or pass loss=.")
    for loss in flat:
        if getattr(loss, "reduction", "mean") not in _MEANS:
            raise ConfigError(
                f"loss={type(loss).__name__}(reduction={loss.reduction!r}): its scale changes with the batch, "
                'but gradients are means here. Use reduction="sum_over_batch_size".'
            )


def _weight(outputs: Any, count: int) -> float:
    """Return what Keras divides the loss of a microbatch by: its samples, or the steps that its mask lets through."""
    mask = getattr(outputs, "_keras_mask", None)
    return float(count if mask is None else mask.sum())
