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

    def __init__(self) -> None:
        self._at = (0, -1)
        self._data = np.empty(0, np.uint8)

    def keep(self, generation: int, step: int, data: NDArray[np.uint8]) -> None:
        """Hold a state in the place of an older one; what comes late from an earlier generation is not held."""
        if (generation, step) > self._at:
            # What Ray hands over may end with the worker that sent it.
            self._at, self._data = (generation, step), np.array(data)

    def step(self) -> int:
        """Return the step of the state; -1 before there is one."""
        return self._at[1]

    def data(self) -> NDArray[np.uint8]:
        """Return the state."""
        return self._data


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledVaults:
    """The vaults of a run, as a worker fills and reads them; see `train.mirror.Mirrors`."""

    vaults: Sequence[Any]
    """Handles; the first one is filled."""
    every: int
    rest: float

    def keep(self, generation: int, step: int, data: NDArray[np.uint8]) -> None:
        ray.get(self.vaults[0].keep.remote(generation, step, data), timeout=10 * CALL_TIMEOUT_S)

    def fetch(self, above: int) -> tuple[int, NDArray[np.uint8]] | None:
        found = {}
        for vault in self.vaults:
            with suppress(RayError, GetTimeoutError):  # it went with its node
                found[ray.get(vault.step.remote(), timeout=CALL_TIMEOUT_S)] = vault
        newest = max(found, default=-1)
        if newest <= above:
            return None
        with suppress(RayError, GetTimeoutError):
            return newest, ray.get(found[newest].data.remote(), timeout=10 * CALL_TIMEOUT_S)
        return None


class Vaults:
    """The vaults of a run, as its controller makes them."""

    def __init__(self, every: int | None) -> None:
        """every: `Faults.mirror_every`."""
        self._every = every
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
                self._vaults = [(node, _new(node)), *self._vaults][:MOST]
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


def _new(node: str) -> Any:
    """Start a vault; where its node is lost, Ray starts an empty one on another."""
    place = NodeAffinitySchedulingStrategy(node, soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 2, "scheduling_strategy": place}
    return ray.remote(Vault).options(**options).remote()
