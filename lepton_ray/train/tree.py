"""Take trees apart into tensors by name and JSON, and put them together again, exactly.

A tree is anything made of dicts, lists, tuples, tensors and JSON scalars, as every state_dict is. The JSON is Python's
(NaN and Infinity stand for themselves), so that every float comes back bit for bit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lepton_ray.errors import CheckpointError

_DICTS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}


# Any here and below: a state_dict is a tree of whatever its owner put in
def flatten(tree: Any, root: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for `tree`, exact down to key types and tuples; its tensors are added to `tensors`.

    root: how the names of its tensors, and its errors, begin. Raises CheckpointError that names what cannot be kept.
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, Tensor):
        name = root
        while name in tensors:
            name += "'"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, float):  # numpy.float64: the same number with the same arithmetic
        return float(tree)
    if type(tree) is list:
        return [flatten(item, f"{root}/{i}", tensors) for i, item in enumerate(tree)]
    if type(tree) is tuple:
        return {"$tuple": [flatten(item, f"{root}/{i}", tensors) for i, item in enumerate(tree)]}
    if type(tree) is dict and all(type(key) is str and not key.startswith("$") for key in tree):
        return {key: flatten(item, f"{root}/{key}", tensors) for key, item in tree.items()}
    for mark, kind in _DICTS.items():
        if type(tree) is kind:
            return {
                mark: [
                    [flatten(key, f"{root} (a key)", tensors), flatten(item, f"{root}/{key}", tensors)]
                    for key, item in tree.items()
                ]
            }
    raise CheckpointError(
        f"{root} is a {type(tree).__module__}.{type(tree).__qualname__}, which a checkpoint cannot hold. "
        "It holds tensors, dicts, lists, tuples, str, int, float, bool and None: convert it to one of these."
    )


def unflatten(tree: Any, tensor: Callable[[str], Any]) -> Any:
    """Rebuild what `flatten` took apart. tensor: gives the tensor of a name."""
    if isinstance(tree, list):
        return [unflatten(item, tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (mark, value), *_ = tree.items()
        if mark == "$tensor":
            return tensor(value)
        if mark == "$tuple":
            return tuple(unflatten(item, tensor) for item in value)
        if mark in _DICTS:
            return _DICTS[mark]({unflatten(key, tensor): unflatten(item, tensor) for key, item in value})
    return {key: unflatten(item, tensor) for key, item in tree.items()}
