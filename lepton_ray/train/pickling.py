"""Pickle the user's code and data for the workers, and name the part that cannot be pickled."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cloudpickle

from lepton_ray.errors import ConfigError

FACTORY_HINT = "hand over a function without arguments that makes the model in the worker"


def dumps(value: Any, name: str) -> bytes:
    """Pickle the user's code and data, definitions of `__main__` and notebooks by value.

    name: the option that holds it. Raises ConfigError that names the part which cannot be pickled.
    """
    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # a __reduce__ of the user may raise anything
        raise unpicklable(value, name, error) from error


def unpicklable(value: Any, name: str, error: Exception) -> ConfigError:
    """Return the error that names the part of `value` which cannot be pickled."""
    path, part = _culprit(value, name, set()) or (name, value)
    advice = "Make it inside the function that uses it"
    if name == "model":
        advice = f"Make it where it is used, or {FACTORY_HINT}"
    return ConfigError(f"{path} (a {class_name(part)}) cannot be sent to the workers: {error}. {advice}.")


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
        cloudpickle.dumps(value)
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
        yield from ((f"{name}: its variable {key}", item) for key, item in variables(value))
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


def variables(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield the variables that a function takes from around it."""
    found = inspect.getclosurevars(function)
    yield from found.nonlocals.items()
    yield from found.globals.items()


def class_name(value: Any) -> str:
    """Name a value by its class, for people."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
