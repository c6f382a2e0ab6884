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
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from lepton_ray.cluster.names import CALL_TIMEOUT_S
from lepton_ray.cluster.scheduler import Held, Places, free, scheduler
from lepton_ray.cluster.worker import Assignment, new_worker
from lepton_ray.config import Faults
from lepton_ray.journal import Journal
from lepton_ray.plan import membership
from lepton_ray.plan.allocate import Refuse
from lepton_ray.plan.membership import Ask, Command, End, Event, Failure, Form, Outcome, Phase, Start, Stop, Train
from lepton_ray.plan.types import Request, Slot
from lepton_ray.storage import Folder

log = logging.getLogger(__name__)

ASK_AGAIN = 5
"""Schedulers that may die on a run before it gives up."""
RESET_S = 5.0
"""A worker that needs longer to forget its job is ended."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A job as its controller needs it."""

    name: str
    run_url: str
    mode: str
    num_workers: int
    slot: Slot
    environment: str
    faults: Faults
    has_lease: bool
    """The run ends when its driver falls silent."""
    generation: int
    """The last one of the run's earlier lives."""
    path: Sequence[str]
    """The driver's import path."""
    spare_cpus: int
    header: dict[str, Any] | None
    """What the journal of a new run begins with."""


class Controller:
    """One life of a run. All methods run on one event loop; `_advance` is the only writer of the state."""

    _order: Order

    def __init__(self, own: Any, end: Callable[[bool], Any]) -> None:
        """own: the handle that others call this by. end: see `ControllerHost`; the next life is what it returns."""
        self._own, self._end_life = own, end
        self._began = asyncio.Event()
        self._records: list[dict[str, Any]] = []
        self._forgotten = 0
        """Records that are in the journal only."""
        self._news, self._read, self._left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._journal: Journal | None = None
        self._refs: dict[str, Any] = {}
        self._places: list[Held] = []
        self._workers: list[Any] = []
        self._outputs: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver_seen_s = time.monotonic()
        self._is_over = False
        self._run: membership.Run | None = None
        self._recorded: dict[int, int] = {}
        """Steps that the journal holds the work of, per rank."""
        self._progress = asyncio.Event()
        self._waits_for = ""
        self._spawn(self._tick())

    # --- called by the driver ----------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """Answer: whoever holds a lease on this actor learns that it lives."""

    async def stay(self) -> None:
        """Wait on for a job."""
        self._driver_seen_s = time.monotonic()

    async def begin(self, order: Order, spec: Any, train_source: Any, test_source: Any) -> None:
        """Start the run. spec and sources are lists of one ObjectRef (so that Ray passes the reference), or of none."""
        self._order = order
        self._driver_seen_s = time.monotonic()
        limits = membership.Limits(admit_s=order.faults.admit_timeout_s, start_s=order.faults.start_timeout_s)
        self._run, commands = membership.begin(order.num_workers, limits, order.generation, time.monotonic())
        await self._watched(self._set_up(commands, spec=spec, train_source=train_source, test_source=test_source))
        self._began.set()

    async def _set_up(self, commands: Sequence[Command], **references: Sequence[Any]) -> None:
        if self._order.mode == "train":
            self._journal = Journal(Folder(self._order.run_url))
        if self._order.header is not None:
            self._write([{"event": "header", **self._order.header}])
        if self._journal:
            await asyncio.to_thread(self._journal.flush)  # workers and other drivers look for it
        sys.path[:0] = [entry for entry in self._order.path if entry not in sys.path]
        self._refs = {name: await self._keep(refs) for name, refs in references.items()}
        await self._obey(commands)

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
            "workers": len(self._workers),
            "path": self._order.run_url,
            "pid": os.getpid(),
            **({"reason": self._waits_for} if run and run.phase is Phase.WAITING and self._waits_for else {}),
            **{key: last[key] for key in ("step", "epoch", "train_loss", "samples_per_s") if key in last},
        }

    async def stop(self, reason: str) -> None:
        """Stop at the next step boundary, with a checkpoint."""
        await self._began.wait()
        await self._advance(membership.StopAsked(reason))

    async def outputs(self) -> list[Any]:
        """Return references to what the workers predicted."""
        return self._outputs

    async def places(self) -> tuple[str, list[Held]]:
        """Return the name of the job ("" before there is one) and what it holds, to a scheduler that starts."""
        if self._run is None:
            return "", []
        return self._order.name, [] if self._is_over else self._places

    async def waits(self, reason: str) -> None:
        """Take the scheduler's word on why the run has no workers yet."""
        if self._run is not None and self._run.phase is Phase.WAITING:
            self._waits_for = reason
            self._write([{"event": "phase", "phase": Phase.WAITING.value, "reason": reason}])

    async def close(self) -> None:
        """End this life: the driver has read how the run did. Returns when the name is free."""
        self._read.set()
        if self._is_over:
            await self._left.wait()

    # --- called by workers -------------------------------------------------------------------------------------------

    async def report(self, generation: int, records: list[dict[str, Any]]) -> None:
        """Take records from a worker of a generation; those of an old one are late and do not count."""
        if self._run is None or generation != self._run.generation:
            return
        self._write([{**record, "generation": generation} for record in records])
        for record in records:
            if record["event"] == "work":
                self._recorded[record["rank"]] = record["rows"][-1][0] + 1
                self._progress.set()

    async def recorded(self, generation: int, step: int) -> None:
        """Return when the journal holds, durably, what all workers of a generation did before `step`."""
        while self._run is not None and generation == self._run.generation:
            if all(self._recorded.get(rank, 0) >= step for rank in range(self._order.num_workers)):
                break
            self._progress.clear()
            await self._progress.wait()
        if self._journal:
            await asyncio.to_thread(self._journal.flush)

    # --- the state machine -------------------------------------------------------------------------------------------

    async def _advance(self, event: Event) -> None:
        assert self._run is not None
        before = self._run
        self._run, commands = membership.advance(before, event, time.monotonic())
        if self._run.phase is not before.phase:
            reason = {"reason": self._run.cancel_reason} if self._run.phase is Phase.STOPPING else {}
            self._write(
                [{"event": "phase", "phase": self._run.phase.value, "generation": self._run.generation, **reason}]
            )
        await self._obey(commands)

    async def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Ask():
                    self._spawn(self._ask())
                case Start():
                    self._start()
                case Form(generation):
                    self._form(generation)
                case Train():
                    self._each(Phase.TRAINING, [worker.train.remote() for worker in self._workers])
                case Stop():
                    for worker in self._workers:
                        worker.stop.remote()
                case End(outcome, failure, reason):
                    self._spawn(self._end(outcome, failure, reason))

    async def _ask(self) -> None:
        """Ask the scheduler; when it ends meanwhile, ask the next one."""
        order = self._order
        request = Request(
            job=order.name,
            workers=order.num_workers,
            slot=order.slot,
            environment=order.environment,
            spare_cpus=order.spare_cpus,
        )
        for attempt in range(ASK_AGAIN + 1):
            try:
                self._scheduler = scheduler()
                answer: Places | Refuse = await self._scheduler.admit.remote(request, self._own)
                break
            except RayActorError:
                if attempt == ASK_AGAIN or self._is_over:
                    raise
        if isinstance(answer, Refuse):
            await self._advance(membership.Refused(answer.reason))
            return
        self._places = answer.places
        if self._is_over:  # it was cancelled while the answer travelled
            await self._let_go(is_reusable=False)
            return
        self._write([{"event": "admitted", "reason": answer.reason}])
        await self._advance(membership.Granted())

    def _start(self) -> None:
        """Create the workers that are not warm yet, and take the lease on all."""
        self._workers = [held.actor or new_worker(held) for held in self._places]
        for worker in self._workers:
            worker.lend.remote(self._own, self._order.faults.lease_s)
        self._each(Phase.STARTING, [worker.prepare.remote() for worker in self._workers])

    def _form(self, generation: int) -> None:
        world = len(self._workers)
        self._each(
            Phase.FORMING,
            [
                worker.form.remote(
                    Assignment(
                        generation=generation,
                        rank=rank,
                        world=world,
                        group=f"{self._order.name}/{generation}/{os.getpid()}",
                        path=self._order.path,
                        collective_timeout_s=self._order.faults.collective_timeout_s,
                        **self._refs,
                    )
                )
                for rank, worker in enumerate(self._workers)
            ],
        )

    def _each(self, phase: Phase, answers: Sequence[Any]) -> None:
        """Turn every worker's answer, or its death, into an event."""
        for rank, answer in enumerate(answers):
            self._spawn(self._answer(rank, phase, answer))

    async def _answer(self, rank: int, phase: Phase, answer: Any) -> None:
        try:
            found = await answer
        except RayError as error:
            found = Failure(message=f"the worker of rank {rank} {_what_happened(error)}", rank=rank)
        if isinstance(found, Failure):
            await self._advance(membership.Broke(found))
            return
        if isinstance(found, dict):
            self._write([{"event": "worker", "rank": rank, **found}])
        await self._advance(membership.Ready(rank, phase))

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _end(self, outcome: Outcome, failure: Failure | None, reason: str | None) -> None:
        if outcome is Outcome.FINISHED and self._order.mode == "predict":
            self._outputs = [worker.outputs.remote() for worker in self._workers]
            # The driver fetches them, and sees what may have gone wrong with one.
            wait = functools.partial(ray.wait, num_returns=len(self._outputs), timeout=OUTPUTS_S, fetch_local=False)
            await asyncio.to_thread(wait, self._outputs)
        fields = {} if failure is None else {"failure": asdict(failure)}
        try:
            is_reusable = outcome is Outcome.FINISHED or (failure is not None and failure.is_users)
            if is_reusable:
                self._scheduler.ending.remote(self._order.name, self._order.environment)
            self._write([{"event": "ended", "outcome": outcome.value, "reason": reason, **fields}])
            if self._journal:
                self._journal.close()
        finally:
            await self._let_go(is_reusable)
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
                await self._scheduler.keep_spare.remote(order.name, self._own, self._end_life(True), order.environment)
        self._left.set()

    async def _let_go(self, is_reusable: bool) -> None:
        """Hand the workers that are as good as new to the pool; end all others."""
        if not self._places:
            if hasattr(self, "_scheduler"):
                self._scheduler.release.remote(self._order.name)
            return
        warm = {}
        if is_reusable:
            fit = await asyncio.gather(*(self._reset(worker) for worker in self._workers))
            warm = {held.name: worker for held, worker, ok in zip(self._places, self._workers, fit) if ok}
        try:
            await self._scheduler.give_back.remote(self._order.name, warm)
        except RayError:  # the scheduler is gone
            for held in self._places:
                free(held)

    async def _reset(self, worker: Any) -> bool:
        """Have a worker forget the job; return whether another job may use it."""
        try:
            is_fit = await asyncio.wait_for(worker.reset.remote(), RESET_S)
        except (RayError, asyncio.TimeoutError):
            return False
        if is_fit:
            worker.lend.remote(self._scheduler, CALL_TIMEOUT_S)
        return bool(is_fit)

    async def _tick(self) -> None:
        while not self._is_over:
            await asyncio.sleep(TICK_S)
            silent_s = self._silent_s()
            if self._run is None:
                if silent_s > JOBLESS_S:
                    self._end_life(False)
                continue
            if self._order.has_lease and silent_s > self._order.faults.lease_s:
                await self._advance(membership.StopAsked(f"the driver was silent for {silent_s:.0f} s"))
            await self._advance(membership.Tick())

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
            await self._advance(membership.Broke(failure))
            if not self._is_over:  # it failed while it ended
                self._write([{"event": "ended", "outcome": Outcome.FAILED.value, "failure": asdict(failure)}])


def _what_happened(error: RayError) -> str:
    """Say in one line whether a worker died or a call of ours raised in it."""
    if isinstance(error, RayTaskError):
        return f"failed: {type(error.cause).__name__}: {error.cause}"
    return f"died: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
