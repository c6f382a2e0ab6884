"""The nodes of the cluster as the scheduler sees them: what is free on each, and which are to be left alone.

Ray believes in a node that went dark for a minute more, and would place workers there meanwhile: whether one is there,
its raylet's port tells. A node that is drained (spot reclaim, `ray drain-node`, the autoscaler) will soon be gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

import ray
from ray._private.state import state

from lepton_ray.cluster.places import Held
from lepton_ray.plan.types import Node, Slot

KNOCK_S = 1.0
"""How long a raylet may take to accept a connection."""
KNOWN_S = 2.0
"""For so long it is not looked at again who accepts."""


class Nodes:
    """All methods run on the scheduler's event loop."""

    def __init__(self) -> None:
        self._dark: set[str] = set()
        self._knocked_s = -KNOWN_S
        self._draining: Mapping[str, int] = {}

    async def knock(self) -> None:
        """See which nodes answer."""
        if time.monotonic() - self._knocked_s < KNOWN_S:
            return
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) > 1:  # we are on one of them
            answers = await asyncio.gather(*(_accepts(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in alive))
            self._dark = {node["NodeID"] for node, is_there in zip(alive, answers) if not is_there}
        self._knocked_s = time.monotonic()

    def drained(self) -> set[str]:
        """List the nodes that are being drained, by id, anew."""
        self._draining = state.get_draining_nodes()  # Ray 2.60 has no public way
        return set(self._draining)

    def is_fit(self, held: Held) -> bool:
        """Tell whether the node of a place may be given work, as far as is known."""
        return held.node not in self._dark and held.node not in self._draining

    def view(self, held: Iterable[Held], reading: int) -> list[Node]:
        """List the nodes; what is free is what we have not given away, and nothing where nothing is to be placed.

        reading: CPUs that Ray Data uses, somewhere.
        """
        found = []
        for node in ray.nodes():
            if node["Alive"]:
                is_fit = node["NodeID"] not in self._dark and node["NodeID"] not in self._draining
                free = dict(node["Resources"]) if is_fit else {}
                found.append(
                    Node(name=node["NodeManagerAddress"], id=node["NodeID"], total=node["Resources"], free=free)
                )
        for each in held:
            _take(each.slot, [node for node in found if each.node in ("", node.id)])
        for _ in range(reading):
            _take(Slot(resources={"CPU": 1}), found)
        return found


def _take(slot: Slot, nodes: Iterable[Node]) -> None:
    """Take a slot from the first node that has room for it."""
    for node in nodes:
        if all(node.free.get(name, 0) >= amount for name, amount in slot.resources.items()):
            left = {name: node.free.get(name, 0) - amount for name, amount in slot.resources.items()}
            node.free.update(left)  # type: ignore[attr-defined]  # made above
            return


async def _accepts(address: str, port: int) -> bool:
    """Tell whether somebody listens there."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), KNOCK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
