"""Vaults: processes without a CPU of their own that hold the state of a run in the memory of their node.

The controller makes them, and they end with it. A vault lies on another node than the worker that fills it, where there
is one. That worker changes: then another node may get one, and the one before is asked as well for the newest state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.cluster.names import CALL_TIMEOUT_S
from lepton_ray.plan.recover import mirror_node

EVERY = 10
"""Steps between two mirrors of a run that did not ask for any."""
REST = 9.0
"""Such a run spends at most a tenth of the time on sending them."""
MOST = 2
NODES_S = 10.0


class Vault:
    """The actor."""

    def __init__(self, versions: int) -> None:
        """versions: states that are held; where several vaults together hold one, they need not be of one step."""
        self._versions = versions
        self._held: dict[int, NDArray[np.uint8]] = {}

    def keep(self, place: int, data: NDArray[np.uint8]) -> None:
        """Hold a state in the place of an older one; what comes late from an earlier generation is not held."""
        if place > max(self._held, default=-1):
            self._held[place] = np.array(data)  # what Ray hands over may end with the worker that sent it
            while len(self._held) > self._versions:
                del self._held[min(self._held)]

    def kept(self) -> list[int]:
        """Return the places of the states."""
        return [*self._held]

    def data(self, place: int) -> NDArray[np.uint8] | None:
        """Return the state of a place."""
        return self._held.get(place)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledVaults:
    """The vaults of a run, as a worker fills and reads them; see `train.mirror.Mirrors`."""

    vaults: Sequence[Any]
    """Handles; the first one is filled."""
    every: int
    rest: float

    def keep(self, place: int, data: NDArray[np.uint8]) -> None:
        ray.get(self.vaults[0].keep.remote(place, data), timeout=10 * CALL_TIMEOUT_S)

    def kept(self) -> Sequence[int]:
        found: list[int] = []
        for vault in self.vaults:
            with suppress(RayError, GetTimeoutError):  # it went with its node
                found += ray.get(vault.kept.remote(), timeout=CALL_TIMEOUT_S)
        return found

    def fetch(self, place: int) -> NDArray[np.uint8] | None:
        for vault in self.vaults:
            with suppress(RayError, GetTimeoutError):
                data: NDArray[np.uint8] | None = ray.get(vault.data.remote(place), timeout=10 * CALL_TIMEOUT_S)
                if data is not None:
                    return data
        return None


class Vaults:
    """The vaults of a run, or of a part of its model, as its controller makes them."""

    def __init__(self, every: int | None, versions: int) -> None:
        """every: `Faults.mirror_every`. versions: see `Vault`."""
        self._every, self._versions = every, versions
        self._vaults: list[tuple[str, Any]] = []
        """Nodes and handles; the newest comes first."""
        self._nodes: set[str] = set()

    async def look(self) -> None:
        """Learn which nodes there are; one that has gone since does no harm, see `_new`."""
        if self._every != 0:
            with suppress(RayError, asyncio.TimeoutError):
                self._nodes = await asyncio.wait_for(asyncio.to_thread(_living), NODES_S)

    def beside(self, own: str | None) -> FilledVaults | None:
        """Return the vaults for a worker on a node (None for an unknown one), which is to fill the newest; or none."""
        current = self._vaults[0][0] if self._vaults else None
        if own is not None and self._every != 0:
            node = mirror_node(own, self._nodes, current, is_asked=self._every is not None)
            if node is not None and node != current:
                self._vaults = [(node, _new(node, self._versions)), *self._vaults][:MOST]
        if not self._vaults:
            return None
        every, rest = (EVERY, REST) if self._every is None else (self._every, 0.0)
        return FilledVaults(vaults=[vault for _, vault in self._vaults], every=every, rest=rest)

    def end(self) -> None:
        """End them."""
        for _, vault in self._vaults:
            ray.kill(vault)
        self._vaults = []


def _living() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _new(node: str, versions: int) -> Any:
    """Start a vault; where its node is lost, Ray starts an empty one on another."""
    place = NodeAffinitySchedulingStrategy(node, soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 2, "scheduling_strategy": place}
    return ray.remote(Vault).options(**options).remote(versions)
