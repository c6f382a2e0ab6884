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
import math
import pickle
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import cloudpickle

from lepton_ray.errors import ConfigError
from lepton_ray.train import keras_pack
from lepton_ray.train.keras_pack import TensorFacts
from lepton_ray.train.pickling import FACTORY_HINT, class_name, dumps, unpicklable

if TYPE_CHECKING:
    import torch

    from lepton_ray.train.model import Model


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
            return Blueprint(kind="module", payload=_save_module(model), facts=describe(model))
        case "keras":
            keras_pack.check(model)
            payload, settings = keras_pack.save(model), keras_pack.settings()
            return Blueprint(kind="keras", payload=payload, facts=describe(model), keras_config=settings)
        case _:
            _check_factory(model)
            payload, settings = dumps(model, "model"), keras_pack.settings()
            return Blueprint(kind="factory", payload=payload, facts=describe(model), keras_config=settings)


def build(blueprint: Blueprint, device: torch.device, seed: int) -> Model:
    """Make the model of a blueprint in a worker. A factory's random numbers depend on `seed` only.

    Raises ConfigError when it cannot be made here.
    """
    from lepton_ray.train.model import TorchModel

    if blueprint.kind == "keras":
        from lepton_ray.train import keras as worker_keras  # before anything else imports Keras: see keras_import
    if "keras" in sys.modules:  # an earlier job may have left other settings
        keras_pack.apply_settings(blueprint.keras_config)
    if blueprint.kind == "module":
        return TorchModel(_load_module(blueprint.payload), device)
    if blueprint.kind == "keras":
        return worker_keras.KerasModel(worker_keras.load(blueprint.payload, blueprint.facts, device), device)
    model = _call_factory(blueprint, seed)
    match _framework(model):
        case "torch":
            _check_module(model)
            return TorchModel(model, device)
        case "keras":
            from lepton_ray.train import keras as worker_keras

            keras_pack.check(model)
            return worker_keras.KerasModel(model, device)
        case _:
            raise ConfigError(
                f"model={blueprint.facts['class']}() returned {class_name(model)}; "
                "expected a torch.nn.Module or a Keras model."
            )


def restore_into(user_model: Any, state: Mapping[str, Any]) -> None:
    """Put trained weights into the user's own object, which keeps its device and its backend.

    state: what `Model.state()` named, torch tensors or numpy arrays: by name for an `nn.Module`, by position for Keras.
    Raises ConfigError when the object is not the model that was trained.
    """
    is_keras = _framework(user_model) == "keras"
    tensors = keras_pack.tensors(user_model) if is_keras else _module_tensors(user_model)
    _check_names(user_model, {name: shape for name, shape, _, _ in tensors}, state)
    (keras_pack.restore if is_keras else _restore_module)(user_model, state)


def describe(model: Any) -> dict[str, Any]:
    """Return what makes a model the same one: class, parameters, a sha256 of its structure; for Keras, `compile()`.

    model: a Blueprint, or anything that `pack` takes. JSON-able, and free of weights' values. What a factory will make
    is not known before it is called: its count and sha256 are None.
    """
    if isinstance(model, Blueprint):
        return model.facts
    match _framework(model):
        case "torch":
            parameters = sum(p.numel() for p in model.parameters())
            return _facts(model, _module_tensors(model), parameters)
        case "keras":
            tensors, compiled = keras_pack.tensors(model), keras_pack.compiled(model)
            facts = _facts(model, tensors, sum(math.prod(shape) for _, shape, _, _ in tensors))
            return facts if compiled is None else {**facts, "compile": compiled}
        case _:
            return {"class": _factory_name(model), "parameters": None, "sha256": None}


# --- kinds of model --------------------------------------------------------------------------------------------------


def _framework(model: Any) -> Literal["torch", "keras"] | None:
    """Tell whose model this is by the modules of its classes. Keras first: on torch, its models are modules."""
    modules = [c.__module__ for c in type(model).__mro__]
    tops = {module.partition(".")[0] for module in modules}
    if "tf_keras" in tops or any(module.startswith("tensorflow.python.keras") for module in modules):
        raise ConfigError(
            f"model={class_name(model)} is a Keras 2 model, which runs on TensorFlow only. "
            "Unset TF_USE_LEGACY_KERAS (or import keras in place of tf_keras) and make it with Keras 3."
        )
    if "keras" in tops:
        if not any(c.__name__ == "Model" and c.__module__.startswith("keras.") for c in type(model).__mro__):
            raise ConfigError(
                f"model={class_name(model)} is a part of a Keras model. Wrap it: keras.Sequential([...])."
            )
        return "keras"
    return "torch" if "torch.nn.modules.module" in modules else None


def _facts(model: Any, tensors: list[TensorFacts], parameters: int) -> dict[str, Any]:
    lines = "\n".join(f"{name} {list(shape)} {dtype} {trained}" for name, shape, dtype, trained in tensors)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"class": type(model).__qualname__, "parameters": parameters, "sha256": digest}


def _check_names(model: Any, own: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> None:
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"the trained weights do not fit {class_name(model)}: {name} has shape {given.get(name, 'none')} there and "
            f"{own.get(name, 'none')} in the model; {len(wrong)} tensors differ. Pass the model that was trained."
        )


# --- factories -------------------------------------------------------------------------------------------------------


def _check_factory(factory: Any) -> None:
    if not callable(factory):
        raise ConfigError(
            f"model={class_name(factory)}: expected a torch.nn.Module, a Keras model, or a function without arguments "
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
    return getattr(factory, "__qualname__", None) or class_name(factory)


def _call_factory(blueprint: Blueprint, seed: int) -> Any:
    import numpy as np
    import torch

    random.seed(seed)  # the seeds of Keras' initializers come from here
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
    keras_pack.restart_names()
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
                f"{name} (a {class_name(child)}) is a Keras layer in a torch module, which would not switch its "
                "dropout and BatchNorm between training and evaluation. Make the whole model with Keras or with torch."
            )
    parameters = list(module.named_parameters())
    for path, tensor in [*parameters, *module.named_buffers()]:
        if type(tensor).__name__.startswith("Uninitialized"):
            raise ConfigError(f"model.{path} has no shape yet. Call the model once on a batch before you hand it over.")
        if tensor.is_meta:
            raise ConfigError(f"model.{path} is on the meta device and has no values. Instead, {FACTORY_HINT}.")
    if not parameters:
        raise ConfigError(f"model={class_name(module)} has no parameters: there is nothing to train.")
    if not any(p.requires_grad for _, p in parameters):
        raise ConfigError(f"model={class_name(module)}: all parameters are frozen. Set requires_grad on some.")


def _save_module(module: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(module, buffer, pickle_module=cloudpickle)
    except Exception as error:  # a __reduce__ of the user may raise anything
        raise unpicklable(module, "model", error) from error
    return buffer.getvalue()


def _load_module(payload: bytes) -> Any:
    import torch

    # To the CPU first: a driver with a GPU may have workers without. Trusted: it comes from the user's own driver.
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)


def _module_tensors(module: Any) -> list[TensorFacts]:
    named = _named_tensors(module).items()
    return [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in named]


def _named_tensors(module: Any) -> dict[str, Any]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _restore_module(module: Any, state: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in _named_tensors(module).items():
            tensor.copy_(torch.as_tensor(state[name]))
