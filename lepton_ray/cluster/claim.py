"""What a run asks of the scheduler, gets, and gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError

from lepton_ray.cluster.crew import Crew, Spawn
from lepton_ray.cluster.order import Order
from lepton_ray.cluster.places import Places, free
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.plan.adopt import Word
from lepton_ray.plan.allocate import Refuse
from lepton_ray.plan.events import Event, Granted, Refused
from lepton_ray.plan.recover import workers_of
from lepton_ray.plan.types import Request

ASK_AGAIN = 5
"""Schedulers that may die on a run before it gives up."""


class Claim:
    """The places of one run. All methods run on the controller's event loop."""

    def __init__(
        self,
        order: Order,
        own: Any,
        crew: Crew,
        *,
        tell: Callable[[Event], None],
        write: Callable[[Sequence[dict[str, Any]]], None],
        spawn: Spawn,
    ) -> None:
        """For the arguments see `Crew`."""
        self._order, self._own, self._crew = order, own, crew
        self._tell, self._write, self._spawn = tell, write, spawn
        self.scheduler: Any = None
        """The one that was asked last."""
        self._wanted: frozenset[int] = frozenset()
        """Replicas that the scheduler is to give."""
        self._start = 1
        self._is_asking = self._is_admitted = self._is_over = False

    def want(self, replicas: frozenset[int], start: int) -> None:
        """Ask for replicas, and no longer for others. start: with so many the run begins."""
        self._wanted, self._start = replicas, start
        if replicas and not self._is_asking:
            self._is_asking = True
            self._spawn(self._ask())

    async def _ask(self) -> None:
        """Ask the scheduler for as long as replicas are wanted."""
        try:
            while self._wanted and not self._is_over:
                answer = await self._answer()
                if isinstance(answer, Refuse):
                    self._wanted = frozenset()
                    self._tell(Refused(answer.reason))
                    return
                await self._take(answer)
        finally:
            self._is_asking = False

    async def _answer(self) -> Places | Refuse:
        """Ask once; when the scheduler ends meanwhile, ask the next one."""
        order, wanted = self._order, len(self._wanted)
        request = Request(
            job=order.name,
            workers=order.size * (1 if self._is_admitted else min(self._start, wanted)),
            most=order.size * wanted,
            multiple=order.size,
            slot=order.slot,
            environment=order.environment,
            spare_cpus=order.spare_cpus,
        )
        for attempt in range(ASK_AGAIN + 1):
            try:
                self.scheduler = scheduler()
                ask = self.scheduler.grow if self._is_admitted else self.scheduler.admit
                answer: Places | Refuse = await ask.remote(request, self._own)
                return answer
            except RayActorError:
                if attempt == ASK_AGAIN or self._is_over:
                    raise
        raise AssertionError("not reached")

    async def _take(self, answer: Places) -> None:
        """Use the places that were given; those that nobody wants any more go back."""
        self._is_admitted = True
        size = self._order.size
        numbers = [] if self._is_over else sorted(self._wanted)[: len(answer.places) // size]
        workers = [worker for number in numbers for worker in workers_of(number, size)]
        surplus = answer.places[len(workers) :]
        if surplus:
            await self._put_back([held.name for held in surplus], {})
        if numbers:
            self._crew.held |= dict(zip(workers, answer.places))
            self._wanted -= set(numbers)
            names = {str(worker): held.name for worker, held in zip(workers, answer.places)}
            self._write([{"event": "admitted", "places": names, "reason": answer.reason}])
            self._tell(Granted(frozenset(numbers)))

    async def take_over(self, records: Iterable[Mapping[str, Any]]) -> dict[int, Word]:
        """Find the places that an earlier process of this controller was given; return what the workers in them say.

        records: of the journal.
        """
        numbers = {name: int(n) for r in records if r["event"] == "admitted" for n, name in r["places"].items()}
        self._is_admitted = bool(numbers)
        self.scheduler = scheduler()
        places = await self.scheduler.held.remote(self._order.name, self._own)
        size = self._order.size
        found = {numbers[each.name]: each for each in places if each.name in numbers}
        # Part of a replica is of no use.
        self._crew.held = held = {n: found[n] for n in found if found.keys() >= {*workers_of(n // size, size)}}
        stray = [each.name for each in places if numbers.get(each.name) not in held]
        if stray:
            await self._put_back(stray, {})
        return await self._crew.words()

    async def _put_back(self, names: Sequence[str], warm: dict[str, Any]) -> None:
        with suppress(RayError):  # a scheduler that starts learns what is held
            await self.scheduler.put_back.remote(self._order.name, names, warm)

    async def release(self, replica: int, *, is_whole: bool) -> None:
        """Give the places of a replica back, with its workers where they are as good as new."""
        workers = [worker for worker in workers_of(replica, self._order.size) if worker in self._crew.held]
        names = [self._crew.held[worker].name for worker in workers]
        if names:
            warm = await self._crew.dismiss(workers, self.scheduler if is_whole else None)
            await self._put_back(names, warm)

    async def end(self, is_reusable: bool) -> None:
        """Hand the workers that are as good as new to the pool; end all others."""
        self._is_over = True
        places = [*self._crew.held.values()]
        if self.scheduler is None:
            return
        if not places:
            self.scheduler.release.remote(self._order.name)
            return
        warm = await self._crew.dismiss([*self._crew.held], self.scheduler if is_reusable else None)
        try:
            await self.scheduler.give_back.remote(self._order.name, warm)
        except RayError:  # the scheduler is gone
            for held in places:
                free(held)
