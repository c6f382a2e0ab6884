"""A run, as the driver sees it: follow it, wait for it, stop it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from lepton_ray import journal
from lepton_ray.cluster import launch
from lepton_ray.cluster.connect import connect
from lepton_ray.cluster.names import answer
from lepton_ray.errors import ConfigError, RunCancelled, RunFailed, WaitTimeout, WorkerFailed
from lepton_ray.plan.events import Outcome, Phase
from lepton_ray.progress import Progress
from lepton_ray.result import Result, make_result
from lepton_ray.storage import Folder

COMES_BACK_S = 30.0
"""How long a controller whose process died is waited for."""


class Job:
    """A run that goes on by itself. Obtained from `DistributedTrainer.submit` or `attach`."""

    def __init__(
        self,
        name: str,
        path: str,
        controller: Any,
        model: Any = None,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        self.name, self.path = name, path
        self._controller, self._model, self._on_result = controller, model, on_result
        self._ended: dict[str, Any] | None = None

    @classmethod
    def finished(
        cls, name: str, path: str, ended: dict[str, Any], model: Any, on_result: Callable[[Result], None]
    ) -> Job:
        """Return a job whose run ended before, with the record of its end."""
        job = cls(name, path, None, model, on_result)
        job._ended = ended
        return job

    def __repr__(self) -> str:
        return f"Job({self.name!r}, path={self.path!r})"

    def status(self) -> dict[str, Any]:
        """Return phase, outcome, generation and the newest step's numbers."""
        if self._controller is not None:
            with suppress(RayActorError):
                return dict(answer(self._controller.status.remote(), self._who()))
        ended = self._ended or _end_of(journal.read(Folder(self.path)))
        return {
            "name": self.name,
            "phase": Phase.ENDED.value,
            "outcome": ended["outcome"] if ended else "lost",
            "path": self.path,
        }

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the run's journal records from now on or a little before, waiting for new ones until the run ends."""
        if self._ended is not None:
            yield self._ended
            return
        position, is_over = 0, False
        while not is_over:
            fresh, position, is_over = self._fetch(position)
            yield from fresh

    def wait(self, timeout_s: float | None = None) -> Result:
        """Wait for the end and return the result.

        Raises RunFailed (WorkerFailed when user code raised), RunCancelled, or WaitTimeout after timeout_s; the run
        goes on after the last.
        """
        return self._wait(timeout_s, show=lambda record: None)

    def follow(self, steps: int | None, epochs: int | None) -> Result:
        """Wait for the end with a progress line. Ctrl-C and SIGTERM stop run (with a checkpoint) and program."""
        with _stopping_on_signals(self) as stop, Progress(steps=steps, epochs=epochs) as progress:
            try:
                return self._wait(None, show=progress.show)
            except RunCancelled as error:
                if stop.signal is None:
                    raise
                progress.show({"event": "note", "text": f"{error} Run again with name={self.name!r} to go on."})
        raise SystemExit(128 + stop.signal)

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop at the next step boundary, with a checkpoint. Returns at once; `wait` then raises RunCancelled."""
        if self._controller is not None:
            with suppress(RayActorError):
                answer(self._controller.stop.remote(reason), self._who())

    def resize(self, workers: int) -> None:
        """Go on with another number of workers, as soon as they are there; training goes on meanwhile.

        Raises ConfigError for a number that the run cannot have; RunFailed when it is over.
        """
        if self._controller is None:
            raise RunFailed(f"{self.name} is over; it cannot be resized.")
        try:
            answer(self._controller.resize.remote(workers), self._who())
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError:
            raise RunFailed(f"{self.name} is over; it cannot be resized.") from None

    def collect(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """Wait for a job without a journal; return its records and what its workers predicted."""
        records: list[dict[str, Any]] = []
        is_over = False
        try:
            while not is_over:
                fresh, _, is_over = answer(self._controller.events.remote(len(records)), self._who())
                records += fresh
            if records[-1]["outcome"] != Outcome.FINISHED:
                self._conclude(records[-1])
            outputs = ray.get(answer(self._controller.outputs.remote(), self._who()))
        except RayError as error:
            raise RunFailed(f"{self.name} was lost: {type(error).__name__}: {error}") from error
        self._controller.close.remote()
        return records, outputs

    def _wait(self, timeout_s: float | None, show: Callable[[Mapping[str, Any]], None]) -> Result:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        position, is_over = 0, self._ended is not None
        while not is_over:
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise WaitTimeout(f"job {self.name!r} did not end within {timeout_s:g} s; it goes on. Wait again.")
            fresh, position, is_over = self._fetch(position)
            for record in fresh:
                show(record)
            if is_over:
                self._ended = fresh[-1]
        assert self._ended is not None
        return self._conclude(self._ended)

    def _fetch(self, position: int) -> tuple[list[dict[str, Any]], int, bool]:
        """Ask for records from `position` on; the controller answers within a few seconds, with or without any.

        Returns them, the next position, and whether the last of them is the end.
        """
        deadline_s = time.monotonic() + COMES_BACK_S
        try:
            while True:
                try:
                    fresh, after, is_over = answer(self._controller.events.remote(position), self._who())
                    return fresh, after, is_over
                except ActorUnavailableError:  # its process died, and Ray starts another
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.2)
        except RayActorError:
            ended = _end_of(journal.read(Folder(self.path)))
            if ended is None:
                raise RunFailed(
                    f"the controller of {self.name!r} died. Journal and checkpoints are in {self.path}; "
                    "start the run again under its name to go on."
                ) from None
            return [ended], position, True

    def _who(self) -> str:
        return f"the controller of {self.name!r}"

    def _conclude(self, ended: Mapping[str, Any]) -> Result:
        if self._controller is not None:
            with suppress(RayActorError):
                self._controller.close.remote()
        match Outcome(ended["outcome"]):
            case Outcome.FAILED:
                raise failure_error(ended["failure"], self.path)
            case Outcome.CANCELLED:
                raise RunCancelled(
                    f"{self.name} stopped: {ended['reason']}. Its checkpoint and journal are in {self.path}."
                )
        result = make_result(self.name, self.path, journal.read(Folder(self.path)), self._model)
        if self._on_result:
            self._on_result(result)
        return result


def _end_of(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record of the end, if the last life of a run came to one."""
    return records[-1] if records and records[-1]["event"] == "ended" else None


def failure_error(failure: Mapping[str, Any], path: str) -> RunFailed:
    """Turn a recorded failure into the error that the user sees."""
    where = f"Journal, worker logs and the last checkpoint are in {path}."
    rank, step = (-1 if failure[key] is None else failure[key] for key in ("rank", "step"))
    if failure["traceback"]:
        return WorkerFailed(failure["message"], rank, step, f"{failure['traceback']}\n\n{where}")
    place = ", ".join(f"{name} {number}" for name, number in (("rank", rank), ("step", step)) if number >= 0)
    return RunFailed(f"{failure['message']}{f' ({place})' if place else ''}\n{where}")


def attach(name: str) -> Job:
    """Find a running job from another process or a notebook.

    Raises ConfigError when no job of that name runs on the cluster of this process (see RAY_ADDRESS).
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"no cluster to find job {name!r} on. Set RAY_ADDRESS, or call ray.init(address=...) first.")
    connect(1)
    controller = launch.find(name)
    if controller is None:
        raise ConfigError(f"no job named {name!r} is running on this cluster.")
    return Job(name, answer(controller.status.remote(), f"the controller of {name!r}")["path"], controller)


class _Stop:
    signal: signal.Signals | None = None


@contextmanager
def _stopping_on_signals(job: Job) -> Iterator[_Stop]:
    """Let the first Ctrl-C or SIGTERM ask the job to stop, and the second one interrupt at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None or job._controller is None:
            raise SystemExit(128 + number)
        stop.signal = signal.Signals(number)
        job._controller.stop.remote(f"stopped by {stop.signal.name}")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
