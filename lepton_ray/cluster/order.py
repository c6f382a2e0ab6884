"""A job as its controller needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lepton_ray.config import Elastic, Faults
from lepton_ray.plan.types import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What travels from the driver to the controller; values only."""

    name: str
    run_url: str
    mode: str
    workers: Elastic
    most: int
    """Workers that its steps can be shared among; 0 where it cannot go on with others than it began with."""
    slot: Slot
    environment: str
    faults: Faults
    has_lease: bool
    """The run ends when its driver falls silent."""
    generation: int
    """The last one of the run's earlier lives."""
    path: Sequence[str]
    """The driver's import path."""
    spare_cpus: int
    header: dict[str, Any] | None
    """What the journal of a new run begins with."""
    size: int = 1
    """Workers of a replica."""

    @property
    def is_resizable(self) -> bool:
        """It can go on with other numbers of workers than it began with."""
        return self.most > 0
