"""The scheduler actor: one per cluster, owner of all placement groups and of the pool of warm processes.

It knows which controller has which job, so that everybody finds a job by its name. It asks `plan.allocate` what to do
and does it. One placement group holds one replica, since Ray cannot resize them. Nothing here is durable: a scheduler
that starts asks the running controllers what they hold, and frees the groups that nobody holds. Workers that were warm
under a dead one end with its lease.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util import get_placement_group
from ray.util.placement_group import remove_placement_group

from lepton_ray.cluster.names import (
    CALL_TIMEOUT_S,
    CONTROLLER_PREFIX,
    SCHEDULER,
    SERVICE,
    actor_names,
    named_actor,
)
from lepton_ray.cluster.nodes import Nodes
from lepton_ray.cluster.places import Held, Places, free, group_names, new_place, node_of
from lepton_ray.plan.allocate import Grant, Refuse, Wait, Warm, admit, spots
from lepton_ray.plan.types import Node, Request

log = logging.getLogger(__name__)

POOL_S = 60.0
"""How long a finished job's workers are kept for the next one."""
IDLE_EXIT_S = 120.0
"""The scheduler ends when it had nothing to look after for so long; the next job starts another."""
ANSWER_S = 10.0
"""How long a controller may take to tell a scheduler that starts what it holds; then it is asked again."""
WATCH_S = 1.0
"""Period of the look after dead jobs and old workers."""
COMES_BACK_S = 3.0
"""Workers of a job that has finished are waited for so long; they need a moment to forget it."""
CONTROLLER_BACK_S = 1.0
"""A controller that ends is waited for so long: starting another takes as long, and nobody may read the end."""
GROW_S = 5.0
"""How long a job that wants more places waits in one call."""
PLACED_WITHIN_S = 5.0
"""Resources that we believe free are placed within so long, unless somebody else uses them."""


@dataclass(slots=True)
class _Job:
    controller: Any  # a Ray actor handle
    held: list[Held] = field(default_factory=list)
    spare_cpus: int = 0
    told: str = ""
    ends_by_s: float = 0.0
    """Its workers are expected back by then."""

    def tell(self, reason: str) -> None:
        """Tell the job why it waits, when that has changed."""
        if reason != self.told:
            self.told = reason
            self.controller.waits.remote(reason)


@dataclass(slots=True)
class _Spare:
    """A controller without a job, for the next one: starting a process takes half a second."""

    controller: Any  # a Ray actor handle
    environment: str
    expires_s: float


class Scheduler:
    """Admits jobs, first come first served. All methods run on one event loop."""

    def __init__(self, pool_s: float = POOL_S, idle_exit_s: float = IDLE_EXIT_S) -> None:
        self._pool_s, self._idle_exit_s = pool_s, idle_exit_s
        self._controllers: dict[str, Any] = {}
        self._jobs: dict[str, _Job] = {}
        """Those that wait for workers or hold some."""
        self._nodes = Nodes()
        self._pool: list[Held] = []
        self._spares: list[_Spare] = []
        self._spare_due_s: dict[str, float] = {}
        """Environment -> when a controller that ends should be a spare one."""
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._orphans = group_names()
        """Groups of a dead scheduler; until all controllers have said what they hold, nobody knows whose they are."""
        self._idle_since_s = time.monotonic()
        loop = asyncio.get_event_loop()
        self._found = loop.create_task(self._learn())
        self._watch = loop.create_task(self._look_after())

    async def ping(self) -> None:
        """Answer: whoever holds a lease on this actor learns that it lives."""

    async def find(self, job: str) -> Any:
        """Return the controller that has a job of this name, or None."""
        await self._found
        while (controller := self._controllers.get(job)) is not None:
            if await _is_alive(controller):
                return controller
            if self._controllers.get(job) is controller:
                del self._controllers[job]
        return None

    async def claim(self, order: Any, references: Sequence[Any], offered: Any) -> tuple[Any, bool] | None:
        """Have a controller begin a job; return it, and whether the job is new.

        order, references: what `Controller.begin` takes. offered: a controller without a job; when that is None a spare
        one gets the job, and None is returned if there is none of the order's environment.
        """
        if offered is None:
            await self._spare_back(order.environment)
        known = await self.find(order.name)  # nothing else runs between its last look and the entry below
        if known is not None:
            return known, False
        controller = offered
        if controller is None:
            spare = self._spare(order.environment)
            if spare is None:
                return None
            self._spares.remove(spare)
            controller = spare.controller
        self._controllers[order.name] = controller
        try:
            await controller.begin.remote(order, *references)
        except BaseException as error:  # it died, or the driver has given up
            controller.kill()
            if self._controllers.get(order.name) is controller:
                del self._controllers[order.name]
            if offered is None and isinstance(error, RayActorError):
                return None
            raise
        return controller, True

    async def keep_spare(self, job: str, ended: Any, spare: Any, environment: str, keep_s: float | None = None) -> None:
        """Free the name of a job that is over, and keep its controller's process for the next job.

        ended, spare: handles of that controller and of the next one in its process, which has no job yet. One spare
        controller of an environment is enough: a second one ends. keep_s: how long it is kept, POOL_S by default.
        """
        if self._controllers.get(job) == ended:
            del self._controllers[job]
        expires_s = time.monotonic() + (self._pool_s if keep_s is None else keep_s)
        kept = self._spare(environment)
        if kept is None:
            self._spares.append(_Spare(spare, environment, expires_s))
        else:
            kept.expires_s = max(kept.expires_s, expires_s)
            spare.kill()
        self._spare_due_s.pop(environment, None)
        self._changed.set()

    async def admit(self, request: Request, controller: Any) -> Places | Refuse:
        """Wait for the job's turn and for room; then return its places, or say why it can never run."""
        known = await self.find(request.job)
        if known is not None and known != controller:
            return Refuse(reason=f"another controller has {request.job}")
        self._controllers[request.job] = controller
        if request.job in self._jobs:  # of an earlier life; or it asks again, since our answer was lost
            await self.release(request.job)
        job = self._jobs[request.job] = _Job(controller, spare_cpus=request.spare_cpus)
        try:
            if self._turn.locked():
                job.tell(f"{request.job} waits for its turn, behind a job that came before it")
            async with self._turn:  # asyncio's lock is fair: this is the queue
                return await self._grant(request, job)
        except BaseException:
            if self._jobs.get(request.job) is job:
                await self.release(request.job)
            raise

    async def grow(self, request: Request, controller: Any) -> Places:
        """Give a job that was admitted before more places, up to request.most, or none, after a while.

        Jobs that wait to be admitted come first.
        """
        await self._found
        self._controllers[request.job] = controller
        job = self._jobs.setdefault(request.job, _Job(controller, spare_cpus=request.spare_cpus))
        deadline_s = time.monotonic() + GROW_S
        while self._jobs.get(request.job) is job:
            self._changed.clear()
            if not self._turn.locked():
                await self._nodes.knock()
                decision = admit(request, self._view(), self._warm())
                if isinstance(decision, Grant):
                    async with self._turn:
                        places = await self._place(request, job, decision)
                    if places:
                        return Places(places=places, reason=decision.reason)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left_s, WATCH_S))
        return Places(places=[], reason="there is no room for more")

    async def held(self, job: str, controller: Any) -> list[Held]:
        """Return the places of a job, to its controller, which has come back."""
        await self._found
        self._controllers[job] = controller
        return list(self._jobs[job].held) if job in self._jobs else []

    async def put_back(self, job: str, names: Sequence[str], warm: dict[str, Any]) -> None:
        """Take over some of a job's places; those with a worker that is as good as new (name -> actor) are kept."""
        await self._found
        held = self._jobs[job].held if job in self._jobs else []
        for each in [each for each in held if each.name in names]:
            held.remove(each)
            each.actor = warm.get(each.name)
            each.expires_s = time.monotonic() + self._pool_s
            if each.actor is not None:
                self._pool.append(each)
            else:
                free(each)
        self._changed.set()

    async def give_back(self, job: str, warm: dict[str, Any], keep_s: float | None = None) -> None:
        """Take over a job's workers (name -> actor) for the next job; what is not among them is freed.

        keep_s: how long the workers are kept, POOL_S by default.
        """
        await self._found
        if job not in self._jobs:
            return
        for held in self._jobs[job].held:
            held.actor = warm.get(held.name)
            held.expires_s = time.monotonic() + (self._pool_s if keep_s is None else keep_s)
            if held.actor is not None:
                self._pool.append(held)
        self._jobs[job].held = [held for held in self._jobs[job].held if held.actor is None]
        await self.release(job)

    async def ending(self, job: str, environment: str) -> None:
        """Learn that a job's processes come back in a moment; the next job would rather have those than new ones."""
        self._spare_due_s[environment] = time.monotonic() + CONTROLLER_BACK_S
        if job in self._jobs:
            self._jobs[job].ends_by_s = time.monotonic() + COMES_BACK_S

    async def release(self, job: str) -> None:
        """Free all that a job still holds."""
        gone = self._jobs.pop(job, None)
        for held in gone.held if gone else []:
            free(held)
        self._changed.set()

    async def overview(self) -> dict[str, Any]:
        """Return the jobs and the warm workers, for people."""
        now = time.monotonic()
        return {
            "pid": os.getpid(),
            "jobs": {name: len(job.held) for name, job in self._jobs.items()},
            "spare_controllers": len(self._spares),
            "warm": [{"slot": str(held.slot), "seconds_left": held.expires_s - now} for held in self._pool],
        }

    async def _grant(self, request: Request, job: _Job) -> Places | Refuse:
        while self._jobs.get(request.job) is job:
            self._changed.clear()
            await self._nodes.knock()
            match admit(request, self._view(), self._warm()):
                case Refuse() as refusal:
                    await self.release(request.job)
                    return refusal
                case Grant(create=create) if create and self._comes_back():
                    pass  # warm workers are on their way
                case Grant() as grant:
                    places = await self._place(request, job, grant)
                    if places is not None:
                        return Places(places=places, reason=grant.reason)
                case Wait(reason=reason):
                    job.tell(reason)
            # Other users of the cluster free resources without telling us: look again by the clock as well.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
        return Refuse(reason="the job ended while it waited")

    def _spare(self, environment: str) -> _Spare | None:
        return next((spare for spare in self._spares if spare.environment == environment), None)

    async def _spare_back(self, environment: str) -> None:
        """Give a controller that ends a moment to become a spare one."""
        while self._spare(environment) is None:
            left_s = self._spare_due_s.get(environment, 0.0) - time.monotonic()
            if left_s <= 0:
                break
            self._changed.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)

    def _comes_back(self) -> bool:
        return any(job.ends_by_s > time.monotonic() for job in self._jobs.values())

    async def _place(self, request: Request, job: _Job, grant: Grant) -> list[Held] | None:
        """Do what was granted; None when that cannot be done now, and the next look will show why."""
        for held in [h for h in self._pool if h.name in grant.evict]:
            self._pool.remove(held)
            free(held)
        taken = [h for h in self._pool if h.name in grant.reuse]
        alive = await asyncio.gather(*(_is_alive(held.actor) for held in taken))
        for held, is_alive in zip(taken, alive):
            if held in self._pool:
                self._pool.remove(held)
            if not is_alive:
                free(held)
        if not all(alive):  # a warm worker died in the pool
            self._pool += [held for held, is_alive in zip(taken, alive) if is_alive]
            return None
        created = [new_place(request, node) for node in spots(self._view(taken), request.slot, grant.create)]
        try:
            await asyncio.wait_for(asyncio.gather(*(held.group.ready() for held in created)), PLACED_WITHIN_S)
        except asyncio.TimeoutError:
            for held in created:
                free(held)
            self._pool += taken
            job.tell(f"{request.job} waits: others on this cluster use what seemed free for {grant.create} new workers")
            return None
        for held in created:
            held.node = node_of(held)
        places = taken + created
        job.held += places
        if self._jobs.get(request.job) is not job:  # it ended meanwhile
            for held in places:
                free(held)
        return places

    def _view(self, taken: Sequence[Held] = ()) -> list[Node]:
        """List the nodes with what is free on them. taken: places that are about to be given away."""
        held = [*taken, *self._pool, *(held for job in self._jobs.values() for held in job.held)]
        return self._nodes.view(held, sum(job.spare_cpus for job in self._jobs.values() if job.held))

    def _warm(self) -> list[Warm]:
        """List the warm workers that may be given to a job."""
        return [
            Warm(worker=h.name, slot=h.slot, environment=h.environment) for h in self._pool if self._nodes.is_fit(h)
        ]

    async def _learn(self) -> None:
        """Ask the controllers what they hold; when all have answered, free the groups that nobody holds."""
        names = [name for name in actor_names() if name.startswith(CONTROLLER_PREFIX)]
        if all(await asyncio.gather(*map(self._ask, names))):
            held = {held.name for job in self._jobs.values() for held in job.held}
            for name in self._orphans - held:
                with suppress(ValueError):
                    remove_placement_group(get_placement_group(name))
            self._orphans.clear()

    async def _ask(self, name: str) -> bool:
        """Ask one controller; return whether all is known of it."""
        host = named_actor(name)
        if host is None:
            return True
        try:
            controller = await asyncio.wait_for(host.current.remote(), ANSWER_S)
            job, held = await asyncio.wait_for(controller.places.remote(), ANSWER_S)
        except (ActorUnavailableError, asyncio.TimeoutError):
            return False
        except RayActorError:
            return True
        if job and job not in self._controllers:
            self._controllers[job] = controller
            if held:
                self._jobs[job] = _Job(controller, held)
        return True

    async def _look_after(self) -> None:
        await self._found
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self._look()
            except Exception:
                log.exception("the scheduler will look again in a moment")

    async def _look(self) -> None:
        """Free what dead jobs left and what nobody used; end when there is nothing left to look after."""
        if self._orphans:
            await self._learn()
        await asyncio.gather(*map(self.find, list(self._controllers)))
        for name in [name for name, job in self._jobs.items() if self._controllers.get(name) != job.controller]:
            await self.release(name)
        drained = self._nodes.drained()
        for job in self._jobs.values():
            leaving = [held.name for held in job.held if held.node in drained]
            if leaving:  # it is told until it has left
                job.controller.revoke.remote(leaving, "their node is being drained")
        now = time.monotonic()
        for held in [h for h in self._pool if h.expires_s < now or h.node in drained]:
            self._pool.remove(held)
            free(held)
        for spare in list(self._spares):
            is_alive = await _is_alive(spare.controller)
            spare.controller.stay.remote()
            if (spare.expires_s < now or not is_alive) and spare in self._spares:
                self._spares.remove(spare)
                spare.controller.kill()
        if self._controllers or self._jobs or self._pool or self._spares:
            self._idle_since_s = now
        elif now - self._idle_since_s > self._idle_exit_s:
            ray.kill(ray.get_runtime_context().current_actor)


async def _is_alive(actor: Any) -> bool:
    try:
        await asyncio.wait_for(actor.ping.remote(), CALL_TIMEOUT_S)
    except (ActorUnavailableError, asyncio.TimeoutError):
        return True  # slow is not dead; Ray tells us of the dead
    except RayActorError:
        return False
    return True


def scheduler(pool_s: float = POOL_S, idle_exit_s: float = IDLE_EXIT_S) -> Any:
    """Return the handle of the cluster's scheduler, which starts with these times if there is none."""
    options = {"name": SCHEDULER, "get_if_exists": True, **SERVICE}
    return ray.remote(Scheduler).options(**options).remote(pool_s, idle_exit_s)
