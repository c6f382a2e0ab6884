"""Import Keras into a worker without what it imports for others: torch's compiler and scikit-learn.

Keras' torch backend imports `torch._dynamo` only to say that two functions of its own must not be compiled, and its
wrappers for scikit-learn import that, which imports scipy: 4 of the 5 s of CPU time that `import keras` takes after
torch (measured with Keras 3.15 and torch 2.13). Whoever needs one of them later imports it as usual.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

Function = Callable[..., Any]


@contextmanager
def without_compiler_and_sklearn() -> Iterator[None]:
    """Let Keras, if it is imported first inside, find stand-ins for both; what is imported already stays."""
    compiler = ModuleType("torch._dynamo")
    compiler.disable = _disable  # type: ignore[attr-defined]
    stand_ins: dict[str, Any] = {compiler.__name__: compiler, "sklearn": None}  # None: `import` raises ImportError
    used = {} if "keras" in sys.modules else {k: v for k, v in stand_ins.items() if k not in sys.modules}
    sys.modules.update(used)
    try:
        yield
    finally:
        for name, stand_in in used.items():
            if name in sys.modules and sys.modules[name] is stand_in:
                del sys.modules[name]


def _disable() -> Callable[[Function], Function]:
    """Decorate as `torch._dynamo.disable()` does, from when on that has been imported: before, nothing is compiled."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            chosen = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
            return chosen(*args, **options)

        return call

    return decorate
