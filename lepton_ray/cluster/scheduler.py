"""The scheduler actor: one per cluster, owner of all placement groups and of the pool of warm workers.

It asks `plan.allocate` what to do and does it. One placement group holds one replica, since Ray cannot resize them.
Nothing here is durable: after a restart, running jobs keep their workers, and the pool is empty.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from lepton_ray.cluster.connect import nodes
from lepton_ray.cluster.names import NAMESPACE, SCHEDULER
from lepton_ray.plan.allocate import Grant, Refuse, Wait, Warm, admit
from lepton_ray.plan.types import Node, Request, Slot

log = logging.getLogger(__name__)

POOL_S = 60.0
"""How long a finished job's workers are kept for the next one."""
IDLE_EXIT_S = 120.0
"""The scheduler ends when it had nothing to look after for so long; the next job starts another."""
WATCH_S = 1.0
"""Period of the look after dead jobs and old workers."""
PLACED_WITHIN_S = 5.0
"""Resources that we believe free are placed within so long, unless somebody else uses them."""


@dataclass(slots=True)
class Held:
    """A worker's place: its placement group, and the actor in it when it is warm."""

    name: str
    group: PlacementGroup
    slot: Slot
    environment: str
    actor: Any = None  # a Ray actor handle, which has no public type
    expires_s: float = 0.0


@dataclass(slots=True)
class _Job:
    controller: Any  # a Ray actor handle
    held: list[Held] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """What a controller gets: places, those with an actor first."""

    places: list[Held]
    reason: str


class Scheduler:
    """Admits jobs, first come first served. All methods run on one event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._pool: list[Held] = []
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._count = 0
        self._idle_since_s = time.monotonic()
        self._watch = asyncio.get_event_loop().create_task(self._look_after())

    async def ping(self) -> None:
        """Answer: whoever holds a lease on this actor learns that it lives."""

    async def admit(self, request: Request, controller: Any) -> Granted | Refuse:
        """Wait for the job's turn and for room; then return its places, or say why it can never run."""
        self._jobs.setdefault(request.job, _Job(controller))
        try:
            async with self._turn:  # asyncio's lock is fair: this is the queue
                return await self._grant(request)
        except asyncio.CancelledError:
            await self.release(request.job)
            raise

    async def give_back(self, job: str, warm: dict[str, Any], keep_s: float = POOL_S) -> None:
        """Take over a job's workers (name -> actor) for the next job; what is not among them is freed."""
        if job not in self._jobs:
            return
        for held in self._jobs[job].held:
            held.actor = warm.get(held.name)
            held.expires_s = time.monotonic() + keep_s
            if held.actor is not None:
                self._pool.append(held)
        self._jobs[job].held = [held for held in self._jobs[job].held if held.actor is None]
        await self.release(job)

    async def release(self, job: str) -> None:
        """Free all that a job still holds."""
        gone = self._jobs.pop(job, None)
        for held in gone.held if gone else []:
            _free(held)
        self._changed.set()

    async def overview(self) -> dict[str, Any]:
        """Return the jobs and the warm workers, for people."""
        now = time.monotonic()
        return {
            "jobs": {name: len(job.held) for name, job in self._jobs.items()},
            "warm": [{"slot": held.slot.key(), "seconds_left": held.expires_s - now} for held in self._pool],
        }

    async def _grant(self, request: Request) -> Granted | Refuse:
        while True:
            self._changed.clear()
            pool = [Warm(worker=h.name, slot=h.slot, environment=h.environment) for h in self._pool]
            match admit(request, self._nodes(), pool):
                case Refuse() as refusal:
                    await self.release(request.job)
                    return refusal
                case Grant() as grant:
                    places = await self._place(request, grant)
                    if places is not None:
                        return Granted(places=places, reason=grant.reason)
                case Wait(reason=reason):
                    log.info("%s", reason)
            # Other users of the cluster free resources without telling us: look again by the clock as well.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
            if request.job not in self._jobs:
                return Refuse(reason="the job ended while it waited")

    async def _place(self, request: Request, grant: Grant) -> list[Held] | None:
        """Do what was granted; None when somebody else holds the resources that we believed free."""
        for held in [h for h in self._pool if h.name in grant.evict]:
            self._pool.remove(held)
            _free(held)
        taken = [h for h in self._pool if h.name in grant.reuse]
        self._pool = [h for h in self._pool if h not in taken]
        created = [self._create(request) for _ in range(grant.create)]
        try:
            await asyncio.wait_for(asyncio.gather(*(held.group.ready() for held in created)), PLACED_WITHIN_S)
        except asyncio.TimeoutError:
            for held in created:
                _free(held)
            self._pool += taken
            return None
        places = taken + created
        if request.job in self._jobs:
            self._jobs[request.job].held = list(places)
        return places

    def _create(self, request: Request) -> Held:
        self._count += 1
        name = f"worker:{os.getpid()}-{self._count}"
        group = placement_group([dict(request.slot.resources)], name=name, lifetime="detached")
        return Held(name=name, group=group, slot=request.slot, environment=request.environment)

    def _nodes(self) -> list[Node]:
        """List the nodes; what is free is what we have not given away, spread as Ray would pack it."""
        found = [Node(name=n.name, total=n.total, free=dict(n.total)) for n in nodes()]
        used = [held.slot for job in self._jobs.values() for held in job.held] + [held.slot for held in self._pool]
        for slot in used:
            for node in found:
                free: Any = node.free
                if all(free.get(name, 0) >= amount for name, amount in slot.resources.items()):
                    for name, amount in slot.resources.items():
                        free[name] = free.get(name, 0) - amount
                    break
        return found

    async def _look_after(self) -> None:
        """Free what dead jobs left and what nobody used; end when there is nothing left to look after."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for name, job in list(self._jobs.items()):
                if not await _is_alive(job.controller):
                    await self.release(name)
            for held in [h for h in self._pool if h.expires_s < now]:
                self._pool.remove(held)
                _free(held)
            if self._jobs or self._pool:
                self._idle_since_s = now
            elif now - self._idle_since_s > IDLE_EXIT_S:
                ray.kill(ray.get_actor(SCHEDULER, namespace=NAMESPACE))


async def _is_alive(controller: Any) -> bool:
    try:
        await asyncio.wait_for(controller.ping.remote(), 30)
    except RayActorError:
        return False
    except asyncio.TimeoutError:
        return True  # slow is not dead; Ray tells us of the dead
    return True


def _free(held: Held) -> None:
    """End a place: removing the group ends the actor in it."""
    remove_placement_group(held.group)


def scheduler() -> Any:
    """Return the handle of the cluster's scheduler, which starts if need be."""
    return (
        ray.remote(Scheduler)
        .options(
            name=SCHEDULER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=1000,
        )
        .remote()
    )
