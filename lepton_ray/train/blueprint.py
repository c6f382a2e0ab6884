"""Decide how a model travels: packed in the driver, built in the workers, weights put back into the user's object.

A torch module travels as itself, a Keras model of any backend as an archive of architecture and weights, anything else
as the function that makes it. The driver may run Keras on TensorFlow and have no torch, so torch and Keras are imported
by the functions that meet a model of theirs, and only then.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import pickle
import random
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lepton_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lepton_ray.train.model import Model

FACTORY_HINT = "hand over a function without arguments that makes the model in the worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model on its way to the workers."""

    kind: Literal["module", "factory", "keras"]
    payload: bytes
    facts: dict[str, Any]
    """What `describe` says of it."""
    keras_config: dict[str, Any] = field(default_factory=dict)
    """Keras' process-wide settings in the driver, such as the float type of losses and metrics."""


def pack(model: Any) -> Blueprint:
    """Make a model ready to travel: an `nn.Module`, a Keras model, or a function or class that makes one.

    Raises ConfigError for a model that cannot be sent or trained.
    """
    match _framework(model):
        case "torch":
            _check_module(model)
            return Blueprint(kind="module", payload=_save_module(model), facts=_module_facts(model))
        case "keras":
            _check_keras(model)
            return Blueprint(
                kind="keras", payload=_save_keras(model), facts=_keras_facts(model), keras_config=_keras_config()
            )
        case _:
            _check_factory(model)
            return Blueprint(
                kind="factory", payload=dumps(model, "model"), facts=_factory_facts(model), keras_config=_keras_config()
            )


def build(blueprint: Blueprint, device: torch.device, seed: int) -> Model:
    """Make the model of a blueprint in a worker. A factory's random numbers depend on `seed` only.

    Raises ConfigError when it cannot be made here.
    """
    from lepton_ray.train.model import TorchModel

    if blueprint.keras_config and (blueprint.kind == "keras" or "keras" in sys.modules):
        _apply_keras_config(blueprint.keras_config)
    if blueprint.kind == "module":
        return TorchModel(_load_module(blueprint.payload), device)
    if blueprint.kind == "keras":
        from lepton_ray.train import keras as worker_keras

        return worker_keras.KerasModel(worker_keras.load(blueprint.payload, blueprint.facts, device), device)
    model = _call_factory(blueprint, seed)
    match _framework(model):
        case "torch":
            _check_module(model)
            return TorchModel(model, device)
        case "keras":
            from lepton_ray.train import keras as worker_keras

            _check_keras(model)
            return worker_keras.KerasModel(model, device)
        case _:
            raise ConfigError(
                f"model={blueprint.facts['class']}() returned {_kind(model)}; "
                "expected a torch.nn.Module or a Keras model."
            )


def restore_into(user_model: Any, state: Mapping[str, Any]) -> None:
    """Put trained weights into the user's own object, which keeps its device and its backend.

    state: what `Model.state()` named, torch tensors or numpy arrays: by name for an `nn.Module`, by position for Keras.
    Raises ConfigError when the object is not the model that was trained.
    """
    if _framework(user_model) == "keras":
        _restore_keras(user_model, state)
    else:
        _restore_module(user_model, state)


def describe(model: Any) -> dict[str, Any]:
    """Return what makes a model the same one: class, parameters, a sha256 of its structure; for Keras, `compile()`.

    model: a Blueprint, or anything that `pack` takes. JSON-able, and free of weights' values. What a factory will make
    is not known before it is called: its count and sha256 are None.
    """
    if isinstance(model, Blueprint):
        return model.facts
    match _framework(model):
        case "torch":
            return _module_facts(model)
        case "keras":
            return _keras_facts(model)
        case _:
            return _factory_facts(model)


def dumps(value: Any, name: str) -> bytes:
    """Pickle the user's code and data, definitions of `__main__` and notebooks by value.

    name: the option that holds it. Raises ConfigError that names the part which cannot be pickled.
    """
    try:
        return _cloudpickle().dumps(value)
    except Exception as error:  # a __reduce__ of the user may raise anything
        raise _unpicklable(value, name, error) from error


def weight_names(model: Any) -> list[str]:
    """Name the weights of a Keras model by position and by a path that does not depend on what was made before it."""
    return [f"{i:04d}:{stable_path(v.path)}" for i, v in enumerate(model.weights)]


def stable_path(path: str) -> str:
    """Shorten a Keras variable's path to layer and variable, without the numbers that Keras appends as it counts."""
    return "/".join(re.sub(r"(_\d+)+(?=_|$)", "", part) for part in path.split("/")[-2:])


# --- kinds of model --------------------------------------------------------------------------------------------------


def _framework(model: Any) -> Literal["torch", "keras"] | None:
    """Tell whose model this is by the modules of its classes. Keras first: on torch, its models are modules."""
    modules = [c.__module__ for c in type(model).__mro__]
    tops = {module.partition(".")[0] for module in modules}
    if "tf_keras" in tops or any(module.startswith("tensorflow.python.keras") for module in modules):
        raise ConfigError(
            f"model={_kind(model)} is a Keras 2 model, which runs on TensorFlow only. "
            "Unset TF_USE_LEGACY_KERAS (or import keras in place of tf_keras) and make it with Keras 3."
        )
    if "keras" in tops:
        if not any(c.__name__ == "Model" and c.__module__.startswith("keras.") for c in type(model).__mro__):
            raise ConfigError(f"model={_kind(model)} is a part of a Keras model. Wrap it: keras.Sequential([...]).")
        return "keras"
    return "torch" if "torch.nn.modules.module" in modules else None


def _kind(value: Any) -> str:
    """Name a value by its class, for people."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def _facts(name: str, tensors: Sequence[tuple[str, Sequence[int], str, bool]], parameters: int) -> dict[str, Any]:
    """tensors: name, shape, type and whether it is trained."""
    lines = "\n".join(f"{path} {list(shape)} {dtype} {trained}" for path, shape, dtype, trained in tensors)
    return {"class": name, "parameters": parameters, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


# --- factories -------------------------------------------------------------------------------------------------------


def _check_factory(factory: Any) -> None:
    if not callable(factory):
        raise ConfigError(
            f"model={_kind(factory)}: expected a torch.nn.Module, a Keras model, or a function without arguments "
            "that returns one."
        )
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # built-in callables may have no signature
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
    if missing:
        name = _factory_name(factory)
        raise ConfigError(
            f"model={name} needs {', '.join(missing)}; the workers call it without arguments. "
            f"Pass functools.partial({name}, {missing[0]}=...) or a lambda, or an instance of it if it is a class."
        )


def _factory_name(factory: Any) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__qualname__", None) or _kind(factory)


def _factory_facts(factory: Any) -> dict[str, Any]:
    return {"class": _factory_name(factory), "parameters": None, "sha256": None}


def _call_factory(blueprint: Blueprint, seed: int) -> Any:
    import numpy as np
    import torch

    random.seed(seed)  # the seeds of Keras' initializers come from here
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
    factory = pickle.loads(blueprint.payload)  # made by this package, in the user's own driver
    return factory()


# --- torch -----------------------------------------------------------------------------------------------------------

_WRAPPERS = {
    "OptimizedModule": "is the result of torch.compile. Pass the module that you compiled (._orig_mod)",
    "DistributedDataParallel": "is already distributed. Pass the module inside it (.module)",
    "DataParallel": "is already distributed. Pass the module inside it (.module)",
    "FullyShardedDataParallel": "is already distributed. Pass the module that you wrapped",
}


def _check_module(module: Any) -> None:
    """Refuse what cannot be trained. Raises ConfigError."""
    for path, child in module.named_modules():
        name = f"model.{path}" if path else "model"
        for cls in type(child).__mro__:
            if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPERS:
                raise ConfigError(f"{name} (a {cls.__name__}) {_WRAPPERS[cls.__name__]}.")
        if any(c.__module__.startswith("keras.") for c in type(child).__mro__):
            raise ConfigError(
                f"{name} (a {_kind(child)}) is a Keras layer in a torch module, which would not switch its dropout and "
                "BatchNorm between training and evaluation. Make the whole model with Keras or with torch."
            )
    parameters = list(module.named_parameters())
    for path, tensor in [*parameters, *module.named_buffers()]:
        if type(tensor).__name__.startswith("Uninitialized"):
            raise ConfigError(f"model.{path} has no shape yet. Call the model once on a batch before you hand it over.")
        if tensor.is_meta:
            raise ConfigError(f"model.{path} is on the meta device and has no values. Instead, {FACTORY_HINT}.")
    if not parameters:
        raise ConfigError(f"model={_kind(module)} has no parameters: there is nothing to train.")
    if not any(p.requires_grad for _, p in parameters):
        raise ConfigError(f"model={_kind(module)}: all parameters are frozen. Set requires_grad on some.")


def _save_module(module: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(module, buffer, pickle_module=_cloudpickle())
    except Exception as error:  # a __reduce__ of the user may raise anything
        raise _unpicklable(module, "model", error) from error
    return buffer.getvalue()


def _load_module(payload: bytes) -> Any:
    import torch

    # To the CPU first: a driver with a GPU may have workers without. Trusted: it comes from the user's own driver.
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)


def _module_tensors(module: Any) -> dict[str, Any]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _module_facts(module: Any) -> dict[str, Any]:
    tensors = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in _module_tensors(module).items()]
    return _facts(type(module).__qualname__, tensors, sum(p.numel() for p in module.parameters()))


def _restore_module(module: Any, state: Mapping[str, Any]) -> None:
    import torch

    own = _module_tensors(module)
    _check_names(module, {name: tuple(t.shape) for name, t in own.items()}, state)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.as_tensor(state[name]))


def _check_names(model: Any, own: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> None:
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"the trained weights do not fit {_kind(model)}: {name} has shape {given.get(name, 'none')} there and "
            f"{own.get(name, 'none')} in the model; {len(wrong)} tensors differ. Pass the model that was trained."
        )


# --- Keras -----------------------------------------------------------------------------------------------------------

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


def _check_keras(model: Any) -> None:
    """Refuse what cannot be trained on torch in several copies. Raises ConfigError."""
    if not model.built or not model.weights:
        raise ConfigError(
            f"model={_kind(model)} has no weights yet. "
            "Add keras.Input(shape) as its first layer, or call it once on a batch."
        )
    if not model.trainable_weights:
        raise ConfigError(f"model={_kind(model)}: all layers are frozen. Set trainable=True on those to be trained.")
    for method in ("train_step", "test_step"):
        if is_overridden(type(model), method):
            raise ConfigError(
                f"model={_kind(model)} has its own {method}, which is written for one process. "
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


def _save_keras(model: Any) -> bytes:
    """Return a pickle of (archive of the model, pickled objects of the user that it names)."""
    from keras.saving import save_model

    custom = _custom_objects(model)
    with _named_lambdas(custom), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        try:
            save_model(model, path)
        except Exception as error:  # get_config of the user's layers may raise anything
            raise ConfigError(
                f"model={_kind(model)} cannot be saved by Keras: {error}\n"
                f"Give its own layers a get_config, or {FACTORY_HINT}."
            ) from error
        config = zipfile.ZipFile(path).read("config.json").decode()
        named = {name: value for name, value in custom.items() if json.dumps(name) in config}
        for name, value in named.items():
            _check_framework(value, name)
        return pickle.dumps((path.read_bytes(), dumps(named, "model")))


def _keras_facts(model: Any) -> dict[str, Any]:
    trained = {id(v) for v in model.trainable_weights}
    named = zip(weight_names(model), model.weights)
    tensors = [(name, tuple(v.shape), str(v.dtype), id(v) in trained) for name, v in named]
    facts = _facts(type(model).__qualname__, tensors, sum(_size(v.shape) for v in model.weights))
    if getattr(model, "compiled", False):
        with _named_lambdas(_custom_objects(model)):
            config = {name: model.get_compile_config().get(name) for name in _COMPILE_OPTIONS}
        facts["compile"] = _essence(json.loads(json.dumps(config, default=str)))
    return facts


_COMPILE_OPTIONS = ("loss", "loss_weights", "optimizer", "metrics", "weighted_metrics")


def _size(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _essence(config: Any) -> Any:
    """Take from a Keras config what differs between backends (modules) and what counts up in a process (`sgd_1`)."""
    if isinstance(config, dict):
        return {
            key: re.sub(r"_\d+$", "", value) if key == "name" and isinstance(value, str) else _essence(value)
            for key, value in config.items()
            if key not in ("module", "registered_name")
        }
    return [_essence(item) for item in config] if isinstance(config, list) else config


def _restore_keras(model: Any, state: Mapping[str, Any]) -> None:
    names = weight_names(model)
    _check_names(model, {name: tuple(v.shape) for name, v in zip(names, model.weights)}, state)
    model.set_weights([_to_numpy(state[name]) for name in names])


def _to_numpy(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if "bfloat16" in str(tensor.dtype):  # unknown to numpy
            tensor = tensor.float()
        return tensor.numpy()
    return tensor


_KERAS_OPTIONS = ("floatx", "epsilon", "image_data_format")


def _keras_config() -> dict[str, Any]:
    keras = sys.modules.get("keras")
    return {name: getattr(keras.config, name)() for name in _KERAS_OPTIONS} if keras else {}


def _apply_keras_config(options: Mapping[str, Any]) -> None:
    import keras

    for name, value in options.items():
        getattr(keras.config, f"set_{name}")(value)


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
        for key, value in _variables(function) if isinstance(function, types.FunctionType) else ():
            module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            top = (module or "").partition(".")[0]
            if top in ("tensorflow", "jax"):
                raise ConfigError(
                    f"{name} of the model uses {key} of {top}, but the workers run Keras on torch. "
                    "Write it with keras.ops, and `import keras` for Keras' own names."
                )


# --- what cannot be pickled ------------------------------------------------------------------------------------------


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError:
        from ray import cloudpickle
    return cloudpickle


def _unpicklable(value: Any, name: str, error: Exception) -> ConfigError:
    path, part = _culprit(value, name, set()) or (name, value)
    advice = "Make it inside the function that uses it"
    if name == "model":
        advice = f"Make it where it is used, or {FACTORY_HINT}"
    return ConfigError(f"{path} (a {_kind(part)}) cannot be sent to the workers: {error}. {advice}.")


def _culprit(value: Any, name: str, seen: set[int]) -> tuple[str, Any] | None:
    """Find the innermost part that cannot be pickled, or None when only a part on the way to `value` cannot."""
    seen.add(id(value))
    meets_itself = False
    for part_name, part in _parts(value, name):
        if id(part) in seen:
            meets_itself = True
        elif not _pickles(part) and (found := _culprit(part, part_name, seen)):
            return found
    return None if meets_itself else (name, value)


def _pickles(value: Any) -> bool:
    try:
        _cloudpickle().dumps(value)
    except Exception:  # noqa: BLE001 - a __reduce__ of the user may raise anything
        return False
    return True


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a value is made of, named as a user would reach it."""
    if isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((f"{name}({part})", item) for part, item in _partial_parts(value))
    elif isinstance(value, types.MethodType):
        yield f"{name}.__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from ((f"{name}: its variable {key}", item) for key, item in _variables(value))
    elif isinstance(value, type):
        yield from ((f"{name}.{key}", item) for key, item in vars(value).items() if not key.startswith("__"))
    else:
        fields = dict(getattr(value, "__dict__", {}))
        for group in ("_modules", "_parameters", "_buffers"):  # where an nn.Module keeps what looks like attributes
            if isinstance(fields.get(group), dict):
                fields.update(fields.pop(group))
        yield from ((f"{name}.{key}", item) for key, item in fields.items())


def _partial_parts(value: functools.partial[Any]) -> Iterator[tuple[str, Any]]:
    yield "function", value.func
    yield from ((f"argument {i}", item) for i, item in enumerate(value.args))
    yield from value.keywords.items()


def _variables(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield the variables that a function takes from around it."""
    found = inspect.getclosurevars(function)
    yield from found.nonlocals.items()
    yield from found.globals.items()
