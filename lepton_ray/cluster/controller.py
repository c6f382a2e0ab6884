"""The controller of one job: asks `plan.membership` what to do, does it, and writes the journal.

It is named and detached, so that it does not die with the driver. It may start before it has a job (see the scheduler's
spare ones), takes one, and ends with it. A driver that holds a lease (`train()`) must keep
asking for events; when it falls silent the run stops at the next step boundary, with a checkpoint.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError

from lepton_ray import journal
from lepton_ray.cluster.claim import Claim
from lepton_ray.cluster.crew import Crew
from lepton_ray.cluster.ledger import Ledger
from lepton_ray.cluster.order import Order
from lepton_ray.cluster.places import Held
from lepton_ray.errors import ConfigError, RunFailed
from lepton_ray.journal import Journal
from lepton_ray.plan.adopt import adopt
from lepton_ray.plan.events import (
    BETWEEN,
    Abort,
    Ask,
    Broke,
    Command,
    Committed,
    End,
    Event,
    Failure,
    Form,
    Limits,
    Outcome,
    Pause,
    Phase,
    Release,
    ResizeAsked,
    Revoked,
    Run,
    Start,
    Stop,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.membership import advance, begin
from lepton_ray.plan.record import began, of_generation, of_this_life, remembered, told
from lepton_ray.plan.replicas import is_there
from lepton_ray.storage import Folder

log = logging.getLogger(__name__)

LINGER_S = 30.0
"""How long an ended run waits for its driver to read the end."""
OUTPUTS_S = 600.0
"""How long predictions wait for their driver to fetch them all; this actor owns them."""
TICK_S = 0.5
JOBLESS_S = 60.0
"""A controller without a job ends when nobody has told it to stay for so long."""
HELD_RECORDS = 10_000
"""Newest records that are kept for whoever follows the run."""
EVENTS_WAIT_S = 5.0
"""How long a question for events may stay open."""


class Controller:
    """One life of a run. All methods run on one event loop; `_advance` is the only writer of the state."""

    _order: Order
    _crew: Crew
    _claim: Claim

    def __init__(
        self, own: Any, end: Callable[[bool], Any], keep: Callable[[Order], None], kept: Order | None = None
    ) -> None:
        """own: the handle that others call this by. end: see `ControllerHost`; the next life is what it returns.

        keep: holds an order for the process that comes when this one dies. kept: what it held.
        """
        self._own, self._end_life, self._keep_order = own, end, keep
        self._began = asyncio.Event()
        self._records: list[dict[str, Any]] = []
        self._forgotten = 0
        """Records that are in the journal only."""
        self._news, self._read, self._left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._journal: Journal | None = None
        self._refs: dict[str, Any] = {}
        self._outputs: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver_seen_s = time.monotonic()
        self._is_over = False
        self._run: Run | None = None
        self._ledger = Ledger()
        self._waits_for = ""
        self._spawn(self._tick())
        if kept is not None:
            self._spawn(self._come_back(kept))

    # --- called by the driver ----------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """Answer: whoever holds a lease on this actor learns that it lives."""

    async def stay(self) -> None:
        """Wait on for a job."""
        self._driver_seen_s = time.monotonic()

    async def begin(self, order: Order, spec: Any, train_source: Any, test_source: Any) -> None:
        """Start the run. spec and sources are lists of one ObjectRef (so that Ray passes the reference), or of none."""
        self._take_order(order)
        self._keep_order(order)
        await self._watched(self._set_up(spec=spec, train_source=train_source, test_source=test_source))
        self._began.set()

    def _take_order(self, order: Order) -> None:
        self._order = order
        self._driver_seen_s = time.monotonic()
        self._crew = Crew(order, self._own, tell=self._advance, write=self._write, spawn=self._spawn)
        self._claim = Claim(order, self._own, self._crew, tell=self._advance, write=self._write, spawn=self._spawn)

    async def _set_up(self, **references: Sequence[Any]) -> None:
        if self._order.mode == "train":
            self._journal = Journal(Folder(self._order.run_url))
        if self._order.header is not None:
            self._write([{"event": "header", **self._order.header}])
        if self._journal:
            await asyncio.to_thread(self._journal.flush)  # workers and other drivers look for it
        sys.path[:0] = [entry for entry in self._order.path if entry not in sys.path]
        self._refs = {name: await self._keep(refs) for name, refs in references.items()}
        self._begin("begin", self._plan())

    def _begin(self, how: str, arguments: dict[str, Any]) -> None:
        """Start the state machine, anew or where an earlier life of this left it."""
        self._run, commands = (begin if how == "begin" else adopt)(**arguments)
        self._write([began(how, arguments, commands)])
        self._obey(commands)
        self._spawn(self._crew.watch(self._watched_workers))

    async def _come_back(self, order: Order) -> None:
        """Take over the workers that an earlier process left: they went on training meanwhile."""
        self._take_order(order)
        await self._watched(self._take_over())
        self._began.set()

    async def _take_over(self) -> None:
        order = self._order
        if order.mode == "train":
            records = of_this_life(await asyncio.to_thread(journal.read, Folder(order.run_url)))
            self._journal = Journal(Folder(order.run_url))
            self._records = [dict(record) for record in records]
            for record in records:
                self._ledger.is_new(record)
        arguments = self._plan()
        now_s = arguments.pop("now_s")
        run = Run(**arguments)
        past = remembered(self._records)
        words = await self._claim.take_over(self._records)
        held = sorted({worker // order.size for worker in self._crew.held})
        self._begin("adopt", {"run": run, "past": past, "held": held, "words": words, "now_s": now_s})

    def _plan(self) -> dict[str, Any]:
        """Return what `plan.membership.begin` takes. Replicas that cannot be fewer wait for each other."""
        order, faults = self._order, self._order.faults
        size = order.size
        least = order.workers.min if order.is_resizable else order.workers.max
        return {
            "size": size,
            "least": 1 if order.is_resizable and order.workers.is_fixed else least // size,
            "start": least // size,
            "target": order.workers.max // size,
            "generation": order.generation,
            "limits": Limits(
                admit_s=faults.admit_timeout_s,
                start_s=faults.start_timeout_s,
                settle_s=faults.settle_timeout_s,
                retries=faults.retries,
            ),
            "now_s": time.monotonic(),
        }

    async def events(self, position: int) -> tuple[list[dict[str, Any]], int, bool]:
        """Wait a moment for records from `position` on; return them, the next position, and whether the run is over."""
        await self._began.wait()
        self._driver_seen_s = time.monotonic()
        wait_s = min(EVENTS_WAIT_S, self._order.faults.lease_s / 3)
        if self._forgotten + len(self._records) <= position and not self._is_over:
            self._news.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
            self._driver_seen_s = time.monotonic()
        fresh = self._records[max(0, position - self._forgotten) :]
        return fresh, self._forgotten + len(self._records), self._is_over

    async def status(self) -> dict[str, Any]:
        """Return phase, generation, outcome and the newest step record."""
        await self._began.wait()
        run = self._run
        last: dict[str, Any] = next((r for r in reversed(self._records) if r["event"] == "step"), {})
        return {
            "name": self._order.name,
            "phase": run.phase.value if run else Phase.WAITING.value,
            "outcome": run.outcome.value if run and run.outcome else None,
            "generation": run.generation if run else 0,
            "workers": len(run.members if run and run.members else self._crew),
            "target": run.target * run.size if run else None,
            "path": self._order.run_url,
            "pid": os.getpid(),
            **({"reason": self._waits_for} if run and run.phase is Phase.WAITING and self._waits_for else {}),
            **{key: last[key] for key in ("step", "epoch", "train_loss", "samples_per_s") if key in last},
        }

    async def stop(self, reason: str) -> None:
        """Stop at the next step boundary, with a checkpoint."""
        await self._began.wait()
        self._advance(StopAsked(reason))

    async def resize(self, workers: int) -> None:
        """Go on with another number of workers, as soon as they are there. Raises ConfigError."""
        await self._began.wait()
        order = self._order
        if self._is_over:
            raise RunFailed(f"{order.name} is over; it cannot be resized.")
        if not order.is_resizable:
            raise ConfigError(
                f"{order.name} cannot be resized: after local steps, and with a step_fn that steps its optimizers, the "
                "state of each worker is its own. Stop it, and start it under another name."
            )
        if not 1 <= workers <= order.most or workers % order.size:
            raise ConfigError(
                f"resize({workers}): expected a number of workers from {order.size} to {order.most}, the microbatches "
                "of a step (Batch(microbatches=...) of the trainer)."
            )
        self._advance(ResizeAsked(workers // order.size, f"resized to {workers} workers"))

    async def outputs(self) -> list[Any]:
        """Return references to what the workers predicted."""
        return self._outputs

    async def places(self) -> tuple[str, list[Held]]:
        """Return the name of the job ("" before there is one) and what it holds, to a scheduler that starts."""
        if self._run is None:
            return "", []
        return self._order.name, [] if self._is_over else [*self._crew.held.values()]

    async def waits(self, reason: str) -> None:
        """Take the scheduler's word on why the run has no workers yet."""
        if self._run is not None and self._run.phase is Phase.WAITING:
            self._waits_for = reason
            self._write([{"event": "phase", "phase": Phase.WAITING.value, "reason": reason}])

    async def revoke(self, names: Sequence[str], reason: str) -> None:
        """Take the scheduler's word that places must be left soon."""
        run = self._run
        if run is not None:
            numbers = sorted({worker // run.size for worker, held in self._crew.held.items() if held.name in names})
            fresh = [n for n in numbers if n in run.replicas and not run.replicas[n].is_revoked]
            if fresh:
                self._advance(Revoked(frozenset(fresh), f"replicas {fresh} must go: {reason}"))

    async def close(self) -> None:
        """End this life: the driver has read how the run did. Returns when the name is free."""
        self._read.set()
        if self._is_over:
            await self._left.wait()

    # --- called by workers -------------------------------------------------------------------------------------------

    async def report(self, worker: int, records: list[dict[str, Any]]) -> None:
        """Take records from a worker. One that was given up does not count any more."""
        await self._began.wait()  # a controller that comes back does not know yet who has a part in the run
        run = self._run
        if run is None or not is_there(run, worker):
            return
        fresh = [{"generation": run.generation, **record} for record in records]
        fresh = [record for record in fresh if self._ledger.is_new(record)]
        if fresh:
            self._write(fresh)
        newest = max((record["generation"] for record in fresh if record["event"] == "step"), default=0)
        if run.failed and newest:
            self._advance(Committed(newest))

    async def recorded(self, worker: int, step: int) -> None:
        """Return when the journal holds, durably, what was done before `step`. Raises for a worker that is out."""
        await self._began.wait()
        if self._run is None or not is_there(self._run, worker):
            raise ConfigError(f"worker {worker} has no part in the run any more; it must not write for it.")
        await self._ledger.reach(step)
        if self._journal:
            await asyncio.to_thread(self._journal.flush)

    # --- the state machine -------------------------------------------------------------------------------------------

    def _advance(self, event: Event) -> None:
        before, now_s = self._run, time.monotonic()
        if before is None:
            return
        self._run, commands = advance(before, event, now_s)
        if commands or self._run != before:
            self._write([told(event, now_s, commands)])
        if self._run.phase is not before.phase:
            reason = {"reason": self._run.cancel_reason} if self._run.phase is Phase.STOPPING else {}
            self._write(
                [{"event": "phase", "phase": self._run.phase.value, "generation": self._run.generation, **reason}]
            )
        self._obey(commands)

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Ask(replicas):
                    self._claim.want(replicas, self._run.start if self._run else 1)
                case Start(workers):
                    self._spawn(self._start(workers))
                case Form():
                    self._write([of_generation(command)])
                    self._crew.form(command, self._ledger.next_step)
                case Train(generation):
                    self._crew.order(self._members(), "train", generation)
                case Pause(generation):
                    self._crew.order(self._members(), "pause", generation)
                case Abort(generation, workers):
                    self._crew.order(workers, "abort", generation)
                case Stop():
                    self._crew.order(self._members(), "stop")
                case Release(replica, gone, reason):
                    self._write([{"event": "released", "replica": replica, "reason": reason}])
                    self._spawn(self._claim.release(replica, is_whole=not gone))
                case End(outcome, failure, reason):
                    self._spawn(self._end(outcome, failure, reason))

    async def _start(self, workers: Sequence[int]) -> None:
        """Start workers. What they need died with an earlier process of this controller, but others hold it too."""
        self._refs = self._refs or await self._crew.refs()
        if self._refs:
            self._crew.start(workers, self._refs)
        else:
            lost = f"the controller of {self._order.name!r} died, and all workers; start the run again under its name"
            self._advance(Broke(Failure(message=lost)))

    def _members(self) -> tuple[int, ...]:
        assert self._run is not None
        return self._run.members

    def _watched_workers(self) -> Sequence[int]:
        """List the workers that must answer at any moment."""
        run = self._run
        return [] if run is None or run.phase in (*BETWEEN, Phase.ENDED) else [*run.members, *run.lenders]

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _end(self, outcome: Outcome, failure: Failure | None, reason: str | None) -> None:
        if outcome is Outcome.FINISHED and self._order.mode == "predict":
            self._outputs = self._crew.outputs(self._members())
            # The driver fetches them, and sees what may have gone wrong with one.
            wait = functools.partial(ray.wait, num_returns=len(self._outputs), timeout=OUTPUTS_S, fetch_local=False)
            await asyncio.to_thread(wait, self._outputs)
        fields = {} if failure is None else {"failure": asdict(failure)}
        await self._crew.finish()
        try:
            is_reusable = outcome is Outcome.FINISHED or (failure is not None and failure.is_users)
            if is_reusable:
                self._claim.scheduler.ending.remote(self._order.name, self._order.environment)
            self._write([{"event": "ended", "outcome": outcome.value, "reason": reason, **fields}])
            if self._journal:
                self._journal.close()
        finally:
            await self._claim.end(is_reusable)
            await self._leave(is_reusable)

    async def _leave(self, is_reusable: bool) -> None:
        """End this life when the driver has read the end, or will not."""
        is_driver_gone = self._order.has_lease and self._silent_s() > self._order.faults.lease_s
        if not is_driver_gone:
            limit_s = OUTPUTS_S if self._outputs else LINGER_S
            await asyncio.wait([asyncio.create_task(self._read.wait())], timeout=limit_s)
        if not is_reusable:
            self._end_life(False)
        else:
            order = self._order
            with suppress(RayError):  # the scheduler is gone; the next life ends when nobody gives it a job
                await self._claim.scheduler.keep_spare.remote(
                    order.name, self._own, self._end_life(True), order.environment
                )
        self._left.set()

    async def _tick(self) -> None:
        while not self._is_over:
            await asyncio.sleep(TICK_S)
            silent_s = self._silent_s()
            if self._run is None:
                if silent_s > JOBLESS_S:
                    self._end_life(False)
                continue
            if self._order.has_lease and silent_s > self._order.faults.lease_s:
                self._advance(StopAsked(f"the driver was silent for {silent_s:.0f} s"))
            self._advance(Tick())

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _silent_s(self) -> float:
        return time.monotonic() - self._driver_seen_s

    async def _keep(self, refs: Sequence[Any]) -> Any:
        """Return a reference that lives as long as it must: a driver's own dies with the driver."""
        if not refs:
            return None
        return refs[0] if self._order.has_lease else ray.put(await refs[0])

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        """Put records into the journal and before whoever waits for them; the end is the last of them."""
        if self._is_over:
            return
        self._is_over = records[-1]["event"] == "ended"
        stamped = [{"t": round(time.time(), 3), **record} for record in records]
        self._records += stamped
        if len(self._records) > 2 * HELD_RECORDS:
            self._forgotten += len(self._records) - HELD_RECORDS
            self._records = self._records[-HELD_RECORDS:]
        self._news.set()
        if self._journal:
            self._journal.append_many(stamped)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._watched(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        """Let no error of our own end in silence: it fails the run."""
        try:
            await work
        except Exception as error:
            log.exception("the controller of %s failed", self._order.name)
            failure = Failure(message=f"controller: {type(error).__name__}: {error}")
            self._advance(Broke(failure))
            if not self._is_over:  # it failed while it ended
                self._write([{"event": "ended", "outcome": Outcome.FAILED.value, "failure": asdict(failure)}])
