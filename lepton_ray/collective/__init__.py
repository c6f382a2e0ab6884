"""Bytes between processes: `group` moves arrays, without ray and torch; `ray_group` puts it under Ray's API."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["abort", "allreduce", "empty", "explain", "register"]


def __getattr__(name: str) -> Any:  # Any: what a module gives
    """Load the functions for Ray at first use, so that importing this package imports neither ray nor torch."""
    if name in __all__:
        return getattr(importlib.import_module("lepton_ray.collective.ray_group"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
