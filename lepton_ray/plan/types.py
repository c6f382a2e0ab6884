"""Values that planners share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The resources of one worker on one node, as Ray counts them: {"CPU": 1, "GPU": 1}."""

    resources: Mapping[str, float]

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in sorted(self.resources.items()) if amount]
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster: all it has, and what is free now."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job asks of the scheduler."""

    job: str
    workers: int
    slot: Slot
    environment: str
    """Workers can be reused among jobs with an equal one (Ray's runtime environment, as text)."""
    most: int = 0
    """Workers that it takes if there is room for more; 0 for no more than `workers`."""
    multiple: int = 1
    """It takes only multiples of so many: the workers of a replica."""
    spare_cpus: int = 0
    """CPUs that must be left beside the workers, for Ray Data to read a stream."""
