"""A Keras model of any backend in the driver: check it, save it, and put trained weights into it.

What travels is Keras' own archive of architecture and weights, with the user's classes and functions beside it. Keras
is imported only by functions that are given a model of it, and torch never: a driver on TensorFlow may have none.
"""

from __future__ import annotations

import inspect
import json
import pickle
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_ray.errors import ConfigError
from lepton_ray.train.pickling import FACTORY_HINT, class_name, dumps, variables
from lepton_ray.train.words import check_optimizer, check_scheduler

TensorFacts = tuple[str, tuple[int, ...], str, bool]
"""Of a tensor of a model: name, shape, type, and whether it is trained."""


def weight_names(model: Any) -> list[str]:
    """Name the weights of a Keras model by position and by a path that does not depend on what was made before it."""
    return [f"{i:04d}:{stable_path(v.path)}" for i, v in enumerate(model.weights)]


def stable_path(path: str) -> str:
    """Shorten a Keras variable's path to layer and variable, without the numbers that Keras appends as it counts."""
    return "/".join(re.sub(r"(_\d+)+(?=_|$)", "", part) for part in path.split("/")[-2:])


_UNTRAINABLE_LAYERS = {
    "SpectralNormalization": "changes its kernel in the forward, so copies of the model would part. Leave it out",
    "TorchModuleWrapper": "holds a torch module. Hand over a torch model, or write the layer with keras.ops",
    "JaxLayer": "runs on JAX; the workers run Keras on torch. Write it with keras.ops",
    "FlaxLayer": "runs on JAX; the workers run Keras on torch. Write it with keras.ops",
    "NnxLayer": "runs on JAX; the workers run Keras on torch. Write it with keras.ops",
    "TFSMLayer": "runs on TensorFlow; the workers run Keras on torch. Write it with keras.ops",
    **dict.fromkeys(
        ("TextVectorization", "StringLookup", "IntegerLookup", "Hashing", "HashedCrossing"),
        "runs on TensorFlow; the workers run Keras on torch. Apply it to the data beforehand",
    ),
}


def _layers(model: Any) -> list[Any]:
    # A private name, there since Keras 3.0 and tested: `layers` misses what wrappers, cells and attention hold.
    return list(model._flatten_layers())


def _is_keras_own(cls: type) -> bool:
    return cls.__module__ == "keras" or cls.__module__.startswith("keras.")


def check(model: Any) -> None:
    """Refuse what cannot be trained on torch in several copies. Raises ConfigError."""
    if not model.built or not model.weights:
        raise ConfigError(
            f"model={class_name(model)} has no weights yet. "
            "Add keras.Input(shape) as its first layer, or call it once on a batch."
        )
    if not model.trainable_weights:
        raise ConfigError(
            f"model={class_name(model)}: all layers are frozen. Set trainable=True on those to be trained."
        )
    for method in ("train_step", "test_step"):
        if is_overridden(type(model), method):
            raise ConfigError(
                f"model={class_name(model)} has its own {method}, which is written for one process. "
                "Move the loss to compute_loss or add_loss, or pass step_fn= with a torch model."
            )
    for layer in _layers(model):
        reason = _untrainable(layer)
        if reason:
            raise ConfigError(f"layer {layer.name!r} of the model (a {type(layer).__name__}) {reason}.")
    optimizer = getattr(model, "optimizer", None)
    if type(optimizer).__name__ == "LossScaleOptimizer":
        raise ConfigError(
            "the model was compiled for mixed_float16 with a LossScaleOptimizer. Make it in float32 and pass "
            'precision="fp16" to the trainer, which scales the loss so that all workers agree.'
        )


def is_overridden(cls: type, method: str) -> bool:
    """Tell whether a class of the user, not one of Keras, defines what a Keras model has as `method`."""
    owner = next((c for c in cls.__mro__ if method in vars(c)), None)
    return owner is not None and not _is_keras_own(owner)


def _untrainable(layer: Any) -> str | None:
    for cls in type(layer).__mro__:
        # Each backend has a base class of layers, and that of JAX is called JaxLayer too.
        if _is_keras_own(cls) and ".backend." not in cls.__module__ and cls.__name__ in _UNTRAINABLE_LAYERS:
            return _UNTRAINABLE_LAYERS[cls.__name__]
    is_model = "Model" in {c.__name__ for c in type(layer).__mro__}
    if is_model and is_overridden(type(layer), "__init__") and not is_overridden(type(layer), "get_config"):
        taken = inspect.signature(type(layer).__init__).parameters.values()
        named = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY][1:]
        if set(named) - {"name", "dtype", "trainable"}:
            return f"takes {', '.join(named)} but has no get_config, so Keras would make it with defaults. Add one"
    if getattr(layer, "stateful", False) is True and hasattr(layer, "reset_state"):
        return "is stateful: it carries states from batch to batch, but the batches are shared out. Set stateful=False"
    if type(layer).__name__ == "BatchNormalization":
        if getattr(layer, "renorm", False):
            return "uses renorm, whose statistics cannot be joined over workers. Set renorm=False"
        if getattr(layer, "synchronized", False):
            return "is synchronized, which Keras on torch does not offer. Set synchronized=False"
    return None


def save(model: Any) -> bytes:
    """Return a pickle of (archive of the model, pickled objects of the user that it names)."""
    from keras.saving import save_model

    custom = _custom_objects(model)
    with _named_lambdas(custom), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        try:
            save_model(model, path)
        except Exception as error:  # get_config of the user's layers may raise anything
            raise ConfigError(
                f"model={class_name(model)} cannot be saved by Keras: {error}\n"
                f"Give its own layers a get_config, or {FACTORY_HINT}."
            ) from error
        config = zipfile.ZipFile(path).read("config.json").decode()
        named = {name: value for name, value in custom.items() if json.dumps(name) in config}
        for name, value in named.items():
            _check_framework(value, name)
        return pickle.dumps((path.read_bytes(), dumps(named, "model")))


def tensors(model: Any) -> list[TensorFacts]:
    """List the weights, in the order of `model.weights`."""
    trained = {id(v) for v in model.trainable_weights}
    named = zip(weight_names(model), model.weights)
    return [(name, tuple(v.shape), str(v.dtype), id(v) in trained) for name, v in named]


def compiled(model: Any) -> Any:
    """Return what the model was compiled with, as JSON values that are the same on every backend; None without."""
    if not getattr(model, "compiled", False):
        return None
    with _named_lambdas(_custom_objects(model)):
        config = {name: model.get_compile_config().get(name) for name in _COMPILE_OPTIONS}
    return _essence(json.loads(json.dumps(config, default=str)))


_COMPILE_OPTIONS = ("loss", "loss_weights", "optimizer", "metrics", "weighted_metrics")


def _essence(config: Any) -> Any:
    """Take from a Keras config what differs between backends (modules) and what counts up in a process (`sgd_1`)."""
    if isinstance(config, dict):
        return {
            key: re.sub(r"_\d+$", "", value) if key == "name" and isinstance(value, str) else _essence(value)
            for key, value in config.items()
            if key not in ("module", "registered_name")
        }
    return [_essence(item) for item in config] if isinstance(config, list) else config


def restore(model: Any, state: Mapping[str, Any]) -> None:
    """Put the weights of the same names into the model."""
    model.set_weights([_to_numpy(state[name]) for name in weight_names(model)])


def _to_numpy(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if "bfloat16" in str(tensor.dtype):  # unknown to numpy
            tensor = tensor.float()
        return tensor.numpy()
    return tensor


_SETTINGS = {"floatx": "float32", "epsilon": 1e-7, "image_data_format": "channels_last"}
"""Keras' process-wide settings, as a new process has them."""


def settings() -> dict[str, Any]:
    """Return Keras' process-wide settings; none where Keras was not imported."""
    keras = sys.modules.get("keras")
    return {name: getattr(keras.config, name)() for name in _SETTINGS} if keras else {}


def apply_settings(options: Mapping[str, Any]) -> None:
    """Make settings of another process those of this one; what it did not say is as in a new process."""
    import keras

    for name, value in {**_SETTINGS, **options}.items():
        getattr(keras.config, f"set_{name}")(value)
    keras.config.set_dtype_policy(keras.config.floatx())  # Keras keeps the policy that followed from an earlier floatx


def restart_names() -> None:
    """Let Keras number unnamed objects from the start, as in a new process; a worker serves one job after another."""
    if "keras" in sys.modules:
        # Private, there since Keras 3.0 and tested: the public clear_session imports torch's compiler, for seconds.
        from keras.src.utils.naming import reset_uids

        reset_uids()


# --- options of the trainer ------------------------------------------------------------------------------------------

NO_SCHEDULER = (
    "scheduler= drives torch optimizers. Give the Keras optimizer a schedule, for example "
    "keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(...)), or pass optimizer= a torch.optim class."
)
NO_STEP_FN = "step_fn= needs a torch model. Give the Keras model a compute_loss of its own, or use add_loss."
NO_SAMPLE = (
    "no loss was given, the model was not compiled, and the data shows no target before it is read (it is a stream, or "
    "has no single target). Call model.compile(loss=...), or pass loss=."
)


@dataclass(frozen=True, slots=True)
class Portable:
    """An object of Keras' own as its config, which every backend can read."""

    config: dict[str, Any]

    def __str__(self) -> str:
        return json.dumps(_essence(self.config), default=str)


def portable(option: Any) -> Any:
    """Replace Keras' own objects in an option by their configs."""
    if isinstance(option, Mapping):
        return {key: portable(value) for key, value in option.items()}
    if isinstance(option, (list, tuple)):
        return [portable(value) for value in option]
    if not _is_keras_own(type(option)) or _custom_objects(option):
        return option
    from keras.saving import serialize_keras_object

    return Portable(serialize_keras_object(option))


def check_options(*, loss: Any, optimizer: Any, metrics: Any, scheduler: Any, step_fn: Any) -> None:
    """Refuse options that do not go with a Keras model. Raises ConfigError."""
    import keras

    if step_fn is not None:
        raise ConfigError(NO_STEP_FN)
    _check_words("loss", loss, keras.losses.get, "'sparse_categorical_crossentropy'")
    _check_words("metrics", metrics, keras.metrics.get, "'accuracy'")
    is_own = isinstance(optimizer, (str, keras.optimizers.Optimizer))
    if is_own:
        _check_words("optimizer", optimizer, keras.optimizers.get, "'adam'")
    else:
        check_optimizer(optimizer)
    if scheduler is not None and (is_own or optimizer is None):
        raise ConfigError(NO_SCHEDULER)
    check_scheduler(scheduler)


_COMPILE_WORDS = ("accuracy", "acc", "crossentropy", "ce")
"""Metrics that only compile() knows: it chooses by the loss."""


def _check_words(name: str, option: Any, get: Callable[[str], Any], example: str) -> None:
    if isinstance(option, Mapping):
        option = list(option.values())
    if isinstance(option, (list, tuple)):
        for item in option:
            _check_words(name, item, get, example)
    elif isinstance(option, str) and option not in _COMPILE_WORDS:
        try:
            get(option)
        except ValueError as error:
            raise ConfigError(
                f"{name}={option!r} is not known to Keras. Use one of its words, such as {example}, or an object."
            ) from error


def has_loss(model: Any) -> bool:
    """Tell whether the model brings a loss along."""
    config = model.get_compile_config() if getattr(model, "compiled", False) else {}
    return bool(config.get("loss")) or is_overridden(type(model), "compute_loss")


# --- objects of the user in a Keras model ----------------------------------------------------------------------------

_LIBRARIES = {"keras", "torch", "tensorflow", "jax", "jaxlib", "numpy", "h5py", "optree", "ml_dtypes"}


def _custom_objects(model: Any) -> dict[str, Any]:
    """Find the classes and functions of the user in a Keras model, under the names that its archive uses for them.

    Keras archives hold only names of what is not Keras' own.
    """
    from keras.saving import get_registered_name

    found: dict[str, Any] = {}
    lambdas = 0
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        definition = value if isinstance(value, (type, types.FunctionType)) else type(value)
        if _is_users(definition):
            if definition.__name__ == "<lambda>":
                name = f"lambda_{lambdas}"
                lambdas += 1
            else:
                name = get_registered_name(definition)
            if found.setdefault(name, definition) is not definition:
                raise ConfigError(f"two different objects of the model are called {name!r}. Rename one of them.")
        stack.extend(reversed(_contents(value)))
    return found


def _contents(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, (type, types.FunctionType, types.ModuleType, types.MethodType)):
        return []
    if _is_users(type(value)) or _is_keras_own(type(value)):
        return list(getattr(value, "__dict__", {}).values())
    return []


def _is_users(definition: Any) -> bool:
    top = (definition.__module__ or "").partition(".")[0]
    return top not in _LIBRARIES and top not in sys.stdlib_module_names


@contextmanager
def _named_lambdas(custom: Mapping[str, Any]) -> Iterator[None]:
    """Let Keras save lambdas by name, as other functions: their bytecode alone would not find their globals."""
    lambdas = {name: value for name, value in custom.items() if value.__name__ == "<lambda>"}
    for name, value in lambdas.items():
        value.__name__ = name
    try:
        yield
    finally:
        for value in lambdas.values():
            value.__name__ = "<lambda>"


def _check_framework(definition: Any, name: str) -> None:
    """Refuse code that uses a framework which Keras on torch cannot work with. Raises ConfigError."""
    functions = vars(definition).values() if isinstance(definition, type) else [definition]
    for function in functions:
        for key, value in variables(function) if isinstance(function, types.FunctionType) else ():
            module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            top = (module or "").partition(".")[0]
            if top in ("tensorflow", "jax"):
                raise ConfigError(
                    f"{name} of the model uses {key} of {top}, but the workers run Keras on torch. "
                    "Write it with keras.ops, and `import keras` for Keras' own names."
                )
