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

from lepton_ray.plan.types import Node, Request, Slot

GROUP_PREFIX = "worker:"


@dataclass(slots=True)
class Held:
    """A worker's place: its placement group, and the actor in it when it is warm."""

    name: str
    group: PlacementGroup
    slot: Slot
    environment: str
    actor: Any = None  # a Ray actor handle, which has no public type
    node: str = ""
    """Id of the node that it is on, when that is known."""
    expires_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a controller gets: places, those with an actor first."""

    places: list[Held]
    reason: str


def new_place(request: Request, node: Node | None) -> Held:
    """Reserve a place for a worker of a job, on that node if it has room; it is there when its group is ready."""
    name = f"{GROUP_PREFIX}{secrets.token_hex(6)}"
    group = placement_group(
        [dict(request.slot.resources)],
        strategy="STRICT_PACK",  # it has one bundle; Ray takes a node's name under this strategy only
        name=name,
        lifetime="detached",
        _soft_target_node_id=node.id if node is not None else None,
    )
    return Held(name=name, group=group, slot=request.slot, environment=request.environment)


def node_of(held: Held) -> str:
    """Return the id of the node on which a place is, once it is there."""
    nodes: dict[int, str] = placement_group_table(held.group)["bundles_to_node_id"]
    return nodes[0]


def group_names() -> set[str]:
    """Name the placement groups that some scheduler made."""
    groups = placement_group_table().values()
    return {g["name"] for g in groups if g["name"].startswith(GROUP_PREFIX) and g["state"] != "REMOVED"}


def free(held: Held) -> None:
    """End a place: removing the group ends the actor in it."""
    remove_placement_group(held.group)
