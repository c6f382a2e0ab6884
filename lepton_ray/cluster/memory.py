"""What a controller's process keeps outside of itself, in Ray's key-value store, for the process that replaces it."""

from __future__ import annotations

import pickle

from ray.experimental import internal_kv

from lepton_ray.cluster.order import Order

_NAMESPACE = b"lepton"
_PREFIX = "controller/"


def remember(actor: str, life: int, order: Order) -> None:
    """Keep which job the process of an actor has, and in which of its lives."""
    internal_kv._internal_kv_put(_PREFIX + actor, pickle.dumps((life, order)), overwrite=True, namespace=_NAMESPACE)


def recall(actor: str) -> tuple[int, Order] | None:
    """Return what was kept."""
    found = internal_kv._internal_kv_get(_PREFIX + actor, namespace=_NAMESPACE)
    return None if found is None else pickle.loads(found)  # made by `remember`


def forget(actor: str) -> None:
    """Keep nothing: the job is over."""
    internal_kv._internal_kv_del(_PREFIX + actor, namespace=_NAMESPACE)
