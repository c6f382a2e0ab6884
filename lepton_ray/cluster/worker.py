"""The worker actor: one process, one device; between jobs it waits, warm, for the next.

Ray calls run on a few threads: `form` and `train` keep one of them busy, the others stay responsive. A worker builds
its copy of the model once, and takes it from generation to generation of its job.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from lepton_ray.cluster.logs import user_traceback, written_to
from lepton_ray.cluster.names import CALL_TIMEOUT_S
from lepton_ray.cluster.reporter import Reporter
from lepton_ray.cluster.vault import FilledVaults
from lepton_ray.errors import ConfigError, PeerLost, RunFailed, WaitTimeout, silent_peer
from lepton_ray.plan.adopt import At, Word
from lepton_ray.plan.events import Failure, Form, Formed, Left
from lepton_ray.storage import Folder

if TYPE_CHECKING:  # torch must not be imported before the process says so
    from lepton_ray.cluster.peers import RayPeers
    from lepton_ray.train.spec import TrainSpec

log = logging.getLogger(__name__)

THREADS = 8
"""Ray calls that may run at once: train, abort, ping, stop, and some to spare."""
AGAIN_S = 0.02
"""A group that is aborted while it forms may not be there yet: it is aborted again after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker needs to build its part of a job."""

    worker: int
    """Its number in the job."""
    holder: Any  # a handle of the controller
    lease_s: float
    """The worker ends when the holder was silent for so long."""
    spec: Any  # ObjectRef of a TrainSpec
    train_source: Any  # ObjectRef of a Source
    test_source: Any  # ObjectRef of a Source, or None
    path: Sequence[str]
    """The driver's import path, so that what it could import can be imported here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    """What a worker needs to take its place in a generation."""

    form: Form
    size: int
    """Workers of a replica."""
    group: str
    """A name for it, used once."""
    since_step: int
    """The first step that the journal has no record of."""
    collective_timeout_s: float
    mirrors: Sequence[FilledVaults] | None
    """By coordinate."""


class Worker:
    """Hosts one copy of a model, or a part of one. Calls come from the controller that holds the lease."""

    def __init__(self) -> None:
        os.environ["KERAS_BACKEND"] = "torch"  # must stand before anything imports keras
        self._holder: Any = None
        self._lease_s = 60.0
        self._imported = threading.Event()
        self._working = threading.Lock()
        """Held while a job forms or trains on one of the threads."""
        self._idle = threading.Event()
        self._idle.set()
        self._clear()
        threading.Thread(target=self._import, name="lepton-import", daemon=True).start()
        threading.Thread(target=self._watch, name="lepton-lease", daemon=True).start()

    def _clear(self) -> None:
        self._stop, self._pause = threading.Event(), threading.Event()
        self._assignment: Assignment | None = None
        self._spec: TrainSpec | None = None
        self._task: Any = None
        self._reporter: Reporter | None = None
        self._groups: list[RayPeers] = []
        """Those that it is in: of all workers first."""
        self._meeting = ""
        """The group that it forms, or formed last."""
        self._generation = 0
        """The newest that this worker was told of."""
        self._aborted = 0
        """The newest that it was told to leave."""
        self._outputs: list[Any] = []
        self._at = At.STARTING
        self._left_last: Left | None = None
        self._sources: dict[str, Any] = {}
        self._lent: dict[str, Any] = {}
        """References to spec and sources, of which this process is the owner."""

    def _import(self) -> None:
        """Load what every job needs, while the controller still sets things up."""
        try:
            import ray.util.collective  # noqa: F401
            import torch  # noqa: F401

            import lepton_ray.train.job  # noqa: F401
        finally:
            self._clean, self._path = set(sys.modules), list(sys.path)
            self._imported.set()

    def lend(self, holder: Any, lease_s: float) -> None:
        """Name who is to be alive for this process to go on."""
        self._holder, self._lease_s = holder, lease_s

    def ping(self) -> str:
        """Answer, with the id of the node: this process lives."""
        return str(ray.get_runtime_context().get_node_id())

    def beats(self) -> int | None:
        """Answer, with a number that rises while training gets on; None where nothing is to be done."""
        from lepton_ray.train.pulse import PULSE

        return PULSE.beats

    def prepare(self) -> None:
        """Wait until everything is imported."""
        self._imported.wait()

    # --- a job -------------------------------------------------------------------------------------------------------

    def build(self, assignment: Assignment) -> dict[str, Any] | Failure:
        """Make the model and what belongs to it; say where this is, or what went wrong."""
        self.lend(assignment.holder, assignment.lease_s)
        self._imported.wait()
        self._assignment = assignment
        try:
            from lepton_ray.train import job

            sys.path[:0] = [entry for entry in assignment.path if entry not in sys.path]
            spec: TrainSpec = ray.get(assignment.spec)
            _check_folder(spec)
            self._spec = spec = replace(spec, coordinate=assignment.worker % spec.size)
            self._reporter = Reporter(self._holder, assignment.worker)
            with self._logs():
                refs = {"train_source": assignment.train_source, "test_source": assignment.test_source}
                self._sources = {name: None if ref is None else ray.get(ref) for name, ref in refs.items()}
                self._task = job.Task(
                    spec,
                    **self._sources,
                    device=job.own_device(),
                    report=self._reporter.report,
                    record=self._record,
                    wish=self._stop.is_set,
                    pause=self._pause.is_set,
                )
        except BaseException as error:  # noqa: BLE001 - whatever user code raises ends the run, in words
            return self._failure(error)
        import torch

        self._at = At.READY
        return {
            "worker": assignment.worker,
            "node": ray.util.get_node_ip_address(),
            "node_id": self.ping(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(job.own_device()),
        }

    def form(self, formation: Formation) -> Formed | Left | None:
        """Take a place in a generation, or give the state to one. None when that is over already."""
        form = formation.form
        with self._at_work():
            if form.generation <= self._generation:
                return None
            self._generation, self._at, self._left_last = form.generation, At.FORMING, None
            self._stop.clear()
            self._pause.clear()
            try:
                with self._logs():
                    self._take_place(formation, form)
            except BaseException as error:  # noqa: BLE001 - as above
                return self._left(error)
            self._at = At.JOINED
            return Formed(self._number, form.generation, self._task.committed)

    def _take_place(self, formation: Formation, form: Form) -> None:
        settlement, sources = form.settlement, form.sources or {}
        holders = settlement.holders if settlement is not None else frozenset[int]()
        if settlement is not None and self._number in holders:
            self._task.settle(settlement.ballot if self._number in settlement.forward else None)
        self._leave_groups()
        if self._number in form.members:
            everybody, peers = None, self._meet(formation.group, form.members, formation)
            coordinate, size = self._number % formation.size, formation.size
            if size > 1:
                name, workers = f"{formation.group}/part-{coordinate}", form.members[coordinate::size]
                everybody, peers = peers, self._meet(name, workers, formation)
            self._task.join(
                peers,
                form.generation,
                is_fresh=settlement is None,
                since_step=formation.since_step,
                mirrors=formation.mirrors and formation.mirrors[coordinate],
                everybody=everybody,
            )
        for coordinate, source in sources.items():
            takers = [w for w in form.members if w % formation.size == coordinate and w not in holders]
            if takers and self._number in (source, *takers):
                self._copy(formation, f"{formation.group}/copy-{coordinate}", (source, *takers))

    def _copy(self, formation: Formation, name: str, workers: Sequence[int]) -> None:
        """Give the state of the training to others, or take it over; the first of the workers has it."""
        is_source = self._number == workers[0]
        peers = self._meet(name, workers, formation)
        (self._task.lend if is_source else self._task.borrow)(peers)
        self._groups.remove(peers)
        peers.close()

    def _meet(self, name: str, workers: Sequence[int], formation: Formation) -> RayPeers:
        """Form a group of workers, of which this is one."""
        from lepton_ray.cluster.peers import RayPeers

        assert self._spec is not None
        self._meeting = name
        peers = RayPeers(name, workers, self._number, formation.collective_timeout_s, tls=self._spec.sync.tls)
        self._groups.append(peers)
        return peers

    def _leave_groups(self) -> None:
        groups, self._groups = self._groups, []
        for peers in groups:
            try:
                peers.close()
            except Exception:  # what cannot be closed ends with the process
                log.exception("worker %s could not leave its group", self._number)

    def train(self, generation: int) -> Left | None:
        """Do the job until it ends, pauses or breaks. None when that generation is over already.

        Asked again, by a controller that has come back, it waits for the end of what goes on.
        """
        with self._at_work():
            if generation == self._generation and self._left_last is not None:
                return self._left_last
            if generation != self._generation or self._aborted >= generation:
                return None
            try:
                with self._logs():
                    is_end, self._outputs = self._task.run()
                if is_end and self._reporter is not None:
                    with suppress(RayActorError, WaitTimeout):
                        self._reporter.flush()
            except BaseException as error:  # noqa: BLE001 - as above
                return self._left(error)
            self._at = At.LEFT
            self._left_last = Left(self._number, generation, self._task.position(), is_end=is_end)
            return self._left_last

    def abort(self, generation: int) -> Left | None:
        """Break what this worker waits for in a generation; return where it stands, unless another call does."""
        if generation < self._generation:
            return None
        self._generation, self._aborted = generation, generation
        while not self._idle.wait(AGAIN_S):
            self._break()
        return self._left(PeerLost("aborted"))

    def _break(self) -> None:
        from lepton_ray.collective import ray_group

        for name in {self._meeting, *(peers.group for peers in self._groups)}:
            ray_group.abort(name)

    def stop(self) -> None:
        """Vote for a stop at the next ballot."""
        self._stop.set()

    def pause(self, generation: int) -> None:
        """Vote for a pause at the next ballot."""
        if generation == self._generation:
            self._pause.set()

    def word(self) -> Word:
        """Say where this worker stands, to a controller that has come back."""
        left = self._left_last if self._at is At.LEFT else None
        return Word(
            at=self._at,
            generation=self._generation,
            position=left.position if left is not None else None,
            is_end=left is not None and left.is_end,
        )

    def share(self) -> dict[str, Any]:
        """Return references to what newcomers need: those of the controller that died are gone with it."""
        if not self._lent and self._task is not None:
            parts = {"spec": self._spec, **self._sources}
            self._lent = {name: None if part is None else ray.put(part) for name, part in parts.items()}
        return self._lent

    def outputs(self) -> list[Any]:
        """Return the numbered blocks of a prediction."""
        return self._outputs

    def finish(self) -> None:
        """Write out what is being written: the job is over."""
        if self._reporter is not None:
            with suppress(RayActorError, WaitTimeout):
                self._reporter.close()
        if self._task is not None:
            with suppress(Exception):
                self._task.close()
        self._leave_groups()

    def reset(self, heir: Any, lease_s: float) -> bool:
        """Forget the job; return whether the process is as good as new for another.

        heir, lease_s: who is to be alive from now on for this process to go on.
        """
        if not self._working.acquire(blocking=False):
            return False
        try:
            self.finish()
            is_clean = self._forget()
            self.lend(heir, lease_s)
            return is_clean
        finally:
            self._working.release()

    def _forget(self) -> bool:
        self._clear()
        import gc

        import torch

        gc.collect()
        torch.set_default_dtype(torch.float32)
        torch.set_deterministic_debug_mode("default")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # The user's modules may change on disk before the next job, which must import them anew.
        own = [name for name in set(sys.modules) - self._clean if _is_user_module(name)]
        is_clean = all(str(sys.modules[name].__file__).endswith(".py") for name in own)
        for name in own:
            del sys.modules[name]
        sys.path[:] = self._path
        return is_clean

    # --- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _number(self) -> int:
        assert self._assignment is not None
        return self._assignment.worker

    @contextmanager
    def _at_work(self) -> Any:
        with self._working:
            self._idle.clear()
            try:
                yield
            finally:
                self._idle.set()

    def _left(self, error: BaseException) -> Left:
        """Break the group, so that the others notice, and say where this worker stands."""
        with suppress(Exception):
            self._break()
        self._at = At.LEFT
        position, failure = self._task.position(), self._failure(error)
        suspect = silent_peer(error)
        self._left_last = Left(self._number, self._generation, position, failure=failure, suspect=suspect)
        return self._left_last

    def _record(self, step: int) -> None:
        """Wait until the journal holds what all workers did before `step`. Raises where this worker is out."""
        assert self._reporter is not None
        self._reporter.flush()
        ray.get(self._holder.recorded.remote(self._number, step), timeout=CALL_TIMEOUT_S)

    def _watch(self) -> None:
        """End this process when the holder of its lease is gone: nobody else would."""
        import time

        answered_s = time.monotonic()
        while True:
            time.sleep(min(2.0, self._lease_s / 4))
            holder, is_dead = self._holder, False
            try:
                if holder is not None:
                    ray.get(holder.ping.remote(), timeout=self._lease_s)
                    answered_s = time.monotonic()
            except (ActorUnavailableError, GetTimeoutError):
                pass  # slow or cut off is not dead, until the lease has lapsed
            except RayActorError:
                is_dead = True
            if holder is self._holder and (is_dead or time.monotonic() - answered_s > self._lease_s):
                os._exit(1)

    def _failure(self, error: BaseException) -> Failure:
        """Say what went wrong, without a wall of Ray frames."""
        from lepton_ray.train.outbox import is_of_callback

        is_ours = isinstance(error, (ConfigError, RunFailed, PeerLost, WaitTimeout))
        return Failure(
            message=str(error) if is_ours else f"{type(error).__name__}: {error}",
            rank=self._groups[0].rank if self._groups else self._number,
            step=self._task.step if self._task is not None else None,
            traceback="" if is_ours else user_traceback(error),
            is_echo=isinstance(error, (PeerLost, WaitTimeout)),
            is_final=isinstance(error, (ConfigError, RunFailed)) or is_of_callback(error),
        )

    def _logs(self) -> Any:
        """Let what this process prints go to the run's folder."""
        assert self._spec is not None
        return written_to(Folder(self._spec.run_url).sub("logs"), f"worker-{self._number}")


def _check_folder(spec: TrainSpec) -> None:
    """Raise ConfigError where this node cannot write the run's folder, or has another folder of that name."""
    folder = Folder(spec.run_url)
    folder.probe()
    if spec.mode == "train" and not any(name.startswith("journal-") for name in folder.names()):
        raise ConfigError(
            f"{folder.url} on node {ray.util.get_node_ip_address()} is not the folder that the run's controller writes "
            "to: its journal is not there. storage= must be one disk that all nodes share, or a URL."
        )


def _is_user_module(name: str) -> bool:
    """Tell a module that lives in the user's folders from an installed one."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file or name.split(".")[0] == "lepton_ray":
        return False
    installed = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
    return not file.startswith(installed) and "site-packages" not in file
