"""Places of workers: one placement group for each replica, since Ray cannot resize them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from lepton_ray.plan.types import Request, Slot

GROUP_PREFIX = "worker:"


@dataclass(slots=True)
class Held:
    """A worker's place: its placement group, and the actor in it when it is warm."""

    name: str
    group: PlacementGroup
    slot: Slot
    environment: str
    actor: Any = None  # a Ray actor handle, which has no public type
    expires_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a controller gets: places, those with an actor first."""

    places: list[Held]
    reason: str


def new_place(request: Request) -> Held:
    """Reserve a place for a worker of a job; it is there when its group is ready."""
    name = f"{GROUP_PREFIX}{secrets.token_hex(6)}"
    group = placement_group([dict(request.slot.resources)], name=name, lifetime="detached")
    return Held(name=name, group=group, slot=request.slot, environment=request.environment)


def group_names() -> set[str]:
    """Name the placement groups that some scheduler made."""
    groups = placement_group_table().values()
    return {g["name"] for g in groups if g["name"].startswith(GROUP_PREFIX) and g["state"] != "REMOVED"}


def free(held: Held) -> None:
    """End a place: removing the group ends the actor in it."""
    remove_placement_group(held.group)
