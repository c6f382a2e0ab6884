"""Names by which processes find each other, and the time limits of calls among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util import list_named_actors

from lepton_ray.errors import WaitTimeout

NAMESPACE = "lepton_ray"
SCHEDULER = "scheduler"
CONTROLLER_PREFIX = "controller:"
"""What follows is random: a controller may start before it has a job. The scheduler knows whose is whose."""
SERVICE: Mapping[str, Any] = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.0001},
    "max_concurrency": 1000,
}
"""Options of the actors that run on one event loop and outlive whoever starts them. They live on the head: a cluster
does not outlive that, and the loss of another node then takes workers only."""
CALL_TIMEOUT_S = 30.0
"""Longest wait for an answer to a small question. A busy two-core machine has needed 10 s to start a process."""


def actor_names() -> Sequence[str]:
    """List our named actors on this cluster, or those that have only just ended."""
    found: Any = list_named_actors(all_namespaces=True)
    return [each["name"] for each in found if each["namespace"] == NAMESPACE]


def named_actor(name: str) -> Any:
    """Return the handle of one of our actors, or None."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except (ValueError, AssertionError):  # the second: Ray knows the name, but has already dropped the class
        return None


def answer(question: Any, of: str, limit_s: float = CALL_TIMEOUT_S) -> Any:
    """Return the answer to a call. Raises WaitTimeout that says who was silent, and whatever else ray.get raises."""
    try:
        return ray.get(question, timeout=limit_s)
    except GetTimeoutError:
        raise WaitTimeout(f"{of} did not answer within {limit_s:g} s") from None
