"""The workers of one run, as its controller reaches them: start, order about, watch, give back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lepton_ray.cluster.names import CALL_TIMEOUT_S, NAMESPACE, named_actor
from lepton_ray.cluster.order import Order
from lepton_ray.cluster.places import Held
from lepton_ray.cluster.vault import Vaults
from lepton_ray.cluster.worker import THREADS, Assignment, Formation, Worker
from lepton_ray.plan.adopt import At, Word
from lepton_ray.plan.events import Event, Failure, Form, Lost, Ready
from lepton_ray.plan.watch import silent

RESET_S = 5.0
"""A worker that needs longer to forget its job is ended."""
LAST_WORDS_S = 10.0
"""How long workers may take to write out what they are writing."""
WORD_S = 1.5
"""How long a controller that comes back waits for a worker's word."""
ALONE = 10
"""Nobody waits for a lone worker: its time limit is so many times that of several."""
PING_S = 0.25
"""Period of the look after silent workers."""

Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Crew:
    """The workers that a run holds, by number. All methods run on the controller's event loop."""

    def __init__(
        self,
        order: Order,
        own: Any,
        *,
        tell: Callable[[Event], None],
        write: Callable[[Sequence[dict[str, Any]]], None],
        spawn: Spawn,
    ) -> None:
        """own: the handle by which workers call the controller. tell, write: take events, and records."""
        self._order, self._own, self._tell, self._write, self._spawn = order, own, tell, write, spawn
        self.held: dict[int, Held] = {}
        """Their places."""
        self._actors: dict[int, Any] = {}
        self._built: set[int] = set()
        """Those that have the model."""
        self._nodes: dict[int, str] = {}
        """Ids of the nodes that they are on."""
        every = order.faults.mirror_every if order.mode == "train" and order.most else 0
        self._vaults = [Vaults(every, versions=min(order.size, 2)) for _ in range(order.size)]
        """Of each part of the model."""
        self._asked_s: dict[int, float] = {}
        """Since when an answer is waited for."""
        self._beats: dict[int, tuple[int | None, float]] = {}
        """Of a lone worker, how much it has done, and since when it has."""

    def __len__(self) -> int:
        return len(self._actors)

    def start(self, workers: Iterable[int], refs: Mapping[str, Any]) -> None:
        """Create the workers that are not warm yet, take the lease on all, and have them build the model."""
        self._look_for_nodes()
        for number in workers:
            held = self.held[number]
            actor = self._actors[number] = held.actor or new_worker(held)
            assignment = Assignment(
                worker=number,
                holder=self._own,
                lease_s=self._order.faults.lease_s,
                path=self._order.path,
                **refs,
            )
            self._spawn(self._answer(number, actor, actor.build.remote(assignment)))

    def _look_for_nodes(self) -> None:
        for vaults in self._vaults:
            self._spawn(vaults.look())

    async def words(self) -> dict[int, Word]:
        """Ask the workers in the places that are held where they stand."""
        self._look_for_nodes()
        words: dict[int, Word] = {}
        for number, held in self.held.items():
            actor = named_actor(held.name)
            if actor is None:
                continue
            self._actors[number] = actor
            self._built.add(number)
            try:
                words[number] = await asyncio.wait_for(actor.word.remote(), WORD_S)
            except (ActorUnavailableError, asyncio.TimeoutError):
                words[number] = Word(at=At.STARTING)
                self._built.discard(number)
            except RayError:
                del self._actors[number]
            with suppress(RayError, asyncio.TimeoutError):
                self._nodes[number] = await asyncio.wait_for(actor.ping.remote(), WORD_S)
        return words

    async def refs(self) -> dict[str, Any]:
        """Return what newcomers need, from a worker that has it; nothing if there is none."""
        for actor in [*self._actors.values()]:
            try:
                found: dict[str, Any] = await asyncio.wait_for(actor.share.remote(), CALL_TIMEOUT_S)
            except (RayError, asyncio.TimeoutError):
                continue
            if found:
                return found
        return {}

    def form(self, form: Form, since_step: int) -> None:
        """Have workers form a generation."""
        firsts = form.members[: self._order.size]
        found = [vaults.beside(self._nodes.get(first)) for vaults, first in zip(self._vaults, firsts)]
        mirrors = [each for each in found if each is not None]
        formation = Formation(
            form=form,
            size=self._order.size,
            group=f"{self._order.name}/{form.generation}/{os.getpid()}",
            since_step=since_step,
            collective_timeout_s=self._order.faults.collective_timeout_s,
            mirrors=mirrors if len(mirrors) == len(found) else None,
        )
        sources = (form.sources or {}).values()
        self.order(dict.fromkeys([*form.members, *sources]), "form", formation)

    def order(self, workers: Iterable[int], method: str, *args: Any) -> None:
        """Call a method of workers, whose answers are events."""
        for number in workers:
            actor = self._actors.get(number)
            if actor is not None:
                self._spawn(self._answer(number, actor, getattr(actor, method).remote(*args)))

    def outputs(self, workers: Iterable[int]) -> list[Any]:
        """Return references to what workers predicted."""
        return [self._actors[number].outputs.remote() for number in workers]

    async def _answer(self, number: int, actor: Any, answer: Any) -> None:
        """Turn a worker's answer, or its death, into an event."""
        try:
            found = await answer
        except RayError as error:
            if self._actors.get(number) is actor:
                self.lose(number, f"worker {number} {_what_happened(error)}")
            return
        if self._actors.get(number) is not actor:
            return
        match found:
            case None:
                pass
            case Failure():
                self._tell(Lost(number, found.message, found))
            case dict():
                self._built.add(number)
                self._nodes[number] = found.pop("node_id")
                self._write([{"event": "worker", **found}])
                self._tell(Ready(number))
            case _:
                self._tell(found)

    def lose(self, number: int, reason: str) -> None:
        """Take a worker for gone, and see to it that it is."""
        actor = self._actors.pop(number, None)
        self._beats.pop(number, None)
        if actor is not None:
            ray.kill(actor)
            self._tell(Lost(number, reason))

    # --- watching ----------------------------------------------------------------------------------------------------

    async def watch(self, members: Callable[[], Iterable[int]]) -> None:
        """Lose members that do not answer. members: those to be watched now."""
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(PING_S)
            late_s, looked_s = time.monotonic() - looked_s - PING_S, time.monotonic()
            self._beats = {n: (beats, since_s + max(0.0, late_s)) for n, (beats, since_s) in self._beats.items()}
            watched = {number for number in members() if number in self._actors}
            for number in [*self._asked_s]:
                if number not in watched:
                    del self._asked_s[number]
                else:
                    self._asked_s[number] += max(0.0, late_s)  # it is we who were asleep
            fresh = watched - self._asked_s.keys()
            self._asked_s |= dict.fromkeys(fresh, looked_s)
            for number in fresh:
                self._spawn(self._ping(number, self._actors[number]))
            for number, stuck_s in self._stuck(watched, looked_s):
                what = f"began nothing for {stuck_s:.0f} s ({ALONE} x Faults.collective_timeout_s)"
                self.lose(number, f"worker {number} answers, but {what}")
            ages = {number: looked_s - self._asked_s[number] for number in watched}
            for number in silent(ages, self._order.faults.silence_timeout_s):
                del self._asked_s[number]
                self.lose(number, f"worker {number} was silent for {ages[number]:.1f} s (Faults.silence_timeout_s)")

    async def _ping(self, number: int, actor: Any) -> None:
        try:
            beats = await actor.beats.remote()
        except RayError:
            return  # what it was asked before tells why
        if self._actors.get(number) is actor:
            self._asked_s.pop(number, None)
            if self._beats.get(number, (None, 0.0))[0] != beats:
                self._beats[number] = beats, time.monotonic()

    def _stuck(self, watched: Collection[int], now_s: float) -> list[tuple[int, float]]:
        """Name a lone worker that gets on with nothing, and for how long. Of several the others notice, in a sum."""
        if len(watched) != 1:
            self._beats.clear()
        found = [(number, now_s - since_s) for number, (beats, since_s) in self._beats.items() if beats is not None]
        return [(number, age_s) for number, age_s in found if age_s > ALONE * self._order.faults.collective_timeout_s]

    # --- the end -----------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Let the workers write out what they are writing."""
        calls = [actor.finish.remote() for number, actor in self._actors.items() if number in self._built]
        if calls:
            await asyncio.wait([asyncio.ensure_future(_quietly(call)) for call in calls], timeout=LAST_WORDS_S)
        for vaults in self._vaults:
            vaults.end()

    async def dismiss(self, workers: Iterable[int], heir: Any) -> dict[str, Any]:
        """Let go of workers; return the actors that are as good as new, by the names of their places.

        heir: who holds the lease on those; None to end all.
        """
        numbers = {self.held.pop(number).name: number for number in [*workers] if number in self.held}
        actors = {name: self._actors.pop(number, None) for name, number in numbers.items()}
        if heir is None:
            return {}
        built = {name: actor for name, actor in actors.items() if numbers[name] in self._built}
        fit = await asyncio.gather(*(_reset(actor, heir) for actor in built.values()))
        return {name: actor for (name, actor), is_fit in zip(built.items(), fit) if is_fit}


def new_worker(held: Held) -> Any:
    """Start a worker actor in its place."""
    resources = dict(held.slot.resources)
    return (
        ray.remote(Worker)
        .options(
            name=held.name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_concurrency=THREADS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(held.group),
        )
        .remote()
    )


async def _reset(actor: Any, heir: Any) -> bool:
    """Have a worker forget the job; return whether another job may use it."""
    if actor is None:
        return False
    try:
        return bool(await asyncio.wait_for(actor.reset.remote(heir, CALL_TIMEOUT_S), RESET_S))
    except (RayError, asyncio.TimeoutError):
        return False


async def _quietly(call: Any) -> None:
    try:
        await call
    except RayError:
        pass  # its death is known by other ways


def _what_happened(error: RayError) -> str:
    """Say in one line whether a worker died or a call of ours raised in it."""
    if isinstance(error, RayTaskError):
        return f"failed: {type(error.cause).__name__}: {error.cause}"
    return f"died: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
