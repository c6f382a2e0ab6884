"""The worker actor: one process, one device, one rank of a job; between jobs it waits, warm, for the next.

Ray calls run on a few threads: `train` keeps one of them busy for as long as the job lasts, the others stay
responsive.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lepton_ray.cluster.names import CALL_TIMEOUT_S, NAMESPACE
from lepton_ray.cluster.reporter import Reporter
from lepton_ray.cluster.scheduler import Held
from lepton_ray.errors import ConfigError, PeerLost, RunFailed, WaitTimeout
from lepton_ray.plan.membership import Failure
from lepton_ray.storage import Folder

if TYPE_CHECKING:  # torch must not be imported before the process says so
    import torch

    from lepton_ray.train.spec import TrainSpec

log = logging.getLogger(__name__)

THREADS = 4
"""Ray calls that may run at once: train, stop, and two to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker needs to take its place in a generation."""

    generation: int
    rank: int
    world: int
    group: str
    spec: Any  # ObjectRef of a TrainSpec
    train_source: Any  # ObjectRef of a Source
    test_source: Any  # ObjectRef of a Source, or None
    path: Sequence[str]
    """The driver's import path, so that what it could import can be imported here."""
    collective_timeout_s: float


class Worker:
    """Hosts one rank. Calls come from the controller that holds the lease."""

    def __init__(self) -> None:
        os.environ["KERAS_BACKEND"] = "torch"  # must stand before anything imports keras
        self._stop = threading.Event()
        self._working = threading.Lock()
        """Held while a job runs on one of the threads."""
        self._holder: Any = None
        self._lease_s = 60.0
        self._assignment: Assignment | None = None
        self._task: Any = None
        self._outputs: list[Any] = []
        self._imported = threading.Event()
        threading.Thread(target=self._import, name="lepton-import", daemon=True).start()
        threading.Thread(target=self._watch, name="lepton-lease", daemon=True).start()

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

    def ping(self) -> None:
        """Answer: the scheduler learns that this warm process lives."""

    def prepare(self) -> dict[str, Any]:
        """Wait until everything is imported; say where this is."""
        self._imported.wait()
        import torch

        return {
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(_device()),
        }

    def form(self, assignment: Assignment) -> Failure | None:
        """Join the group of a generation and build the model. Returns what went wrong, if anything."""
        self._assignment = assignment
        self._stop.clear()
        with self._guard("form") as caught:
            from lepton_ray.cluster.peers import RayPeers
            from lepton_ray.train import job

            sys.path[:0] = [entry for entry in assignment.path if entry not in sys.path]
            spec: TrainSpec = ray.get(assignment.spec)
            _check_folder(spec)
            with self._logs(spec, "form"):
                peers = RayPeers(
                    assignment.group, assignment.rank, assignment.world, timeout_s=assignment.collective_timeout_s
                )
                self._reporter = Reporter(self._holder, assignment.rank, assignment.generation)
                self._task = job.Task(
                    spec,
                    train_source=ray.get(assignment.train_source) if assignment.train_source is not None else None,
                    test_source=ray.get(assignment.test_source) if assignment.test_source is not None else None,
                    peers=peers,
                    device=_device(),
                    generation=assignment.generation,
                    report=self._reporter.report,
                    record=self._record,
                    wish=self._stop.is_set,
                )
            self._peers, self._spec = peers, spec
        return caught.failure

    def train(self) -> Failure | None:
        """Do the job to its end, or to a stop that all workers agreed on. Returns what went wrong, if anything."""
        with self._working:
            return self._train()

    def _train(self) -> Failure | None:
        with self._guard("train") as caught, self._logs(self._spec, "train"):
            self._outputs = self._task.run()
        with self._guard("report") as unreported, suppress(RayActorError, GetTimeoutError):
            self._reporter.close()
        failure = caught.failure or unreported.failure
        try:
            self._peers.close()
            self._task.close()
        except Exception:  # the work is done and on record; what cannot be closed ends with the process
            log.exception("rank %s could not leave its group", self._peers.rank)
        return failure

    def outputs(self) -> list[Any]:
        """Return the numbered blocks of a prediction."""
        return self._outputs

    def stop(self) -> None:
        """Vote for a stop at the next ballot."""
        self._stop.set()

    def reset(self) -> bool:
        """Forget the job; return whether the process is as good as new for another."""
        if not self._working.acquire(blocking=False):
            return False
        try:
            return self._forget()
        finally:
            self._working.release()

    def _forget(self) -> bool:
        self._task = self._assignment = None
        self._outputs = []
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

    def _record(self, step: int) -> None:
        """Wait until the journal holds what all workers did before `step`."""
        assert self._assignment is not None
        self._reporter.flush()
        ray.get(self._holder.recorded.remote(self._assignment.generation, step), timeout=CALL_TIMEOUT_S)

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

    @contextmanager
    def _guard(self, what: str) -> Any:
        """Turn an exception into a Failure that can be shown without a wall of Ray frames."""
        caught = _Caught()
        try:
            yield caught
        except (PeerLost, WaitTimeout) as error:
            caught.failure = self._failure(error, is_echo=True)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises ends the run, in words
            caught.failure = self._failure(error, is_echo=False)
        if caught.failure is not None and self._assignment is not None:
            with suppress(Exception):
                self._peers.abort()

    def _failure(self, error: BaseException, *, is_echo: bool) -> Failure:
        is_ours = isinstance(error, (ConfigError, RunFailed, PeerLost, WaitTimeout))
        return Failure(
            message=str(error) if is_ours else f"{type(error).__name__}: {error}",
            rank=self._assignment.rank if self._assignment else None,
            step=getattr(self._task, "step", None),
            traceback="" if is_ours else _user_traceback(error),
            is_echo=is_echo,
        )

    @contextmanager
    def _logs(self, spec: TrainSpec, what: Literal["form", "train"]) -> Any:
        """Let what this process prints go to the run's folder."""
        assert self._assignment is not None
        folder, name = Folder(spec.run_url).sub("logs"), f"rank-{self._assignment.rank}.log"
        if folder.is_local:
            path = os.path.join(folder.url, name)
            os.makedirs(folder.url, exist_ok=True)
        else:  # written at the end of each part; a life does not overwrite the one before
            name = f"rank-{self._assignment.rank}.{self._assignment.generation}.log"
            path = os.path.join(tempfile.gettempdir(), f"lepton_ray-{os.getpid()}-{spec.name}-{name}")
        sys.stdout.flush(), sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.dup2(target, 1), os.dup2(target, 2)
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            for descriptor in (*kept, target):
                os.close(descriptor)
            if not folder.is_local:
                with open(path, "rb") as file:
                    folder.write(name, file.read())
                if what == "train":
                    os.unlink(path)


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


@dataclass(slots=True)
class _Caught:
    failure: Failure | None = None


def _device() -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _check_folder(spec: TrainSpec) -> None:
    """Raise ConfigError where this node cannot write the run's folder, or has another folder of that name."""
    folder = Folder(spec.run_url)
    folder.probe()
    if spec.mode == "train" and not any(name.startswith("journal-") for name in folder.names()):
        raise ConfigError(
            f"{folder.url} on node {ray.util.get_node_ip_address()} is not the folder that the run's controller writes "
            "to: its journal is not there. storage= must be one disk that all nodes share, or a URL."
        )


def _user_traceback(error: BaseException) -> str:
    """Format a traceback from the first frame of the user's code on (all of it when there is none)."""
    frames = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    first = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(own)), 0)
    lines = ["Traceback (most recent call last, in the worker):\n", *traceback.format_list(frames[first:])]
    return "".join(lines + traceback.format_exception_only(error)).rstrip()


def _is_user_module(name: str) -> bool:
    """Tell a module that lives in the user's folders from an installed one."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file or name.split(".")[0] == "lepton_ray":
        return False
    installed = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
    return not file.startswith(installed) and "site-packages" not in file
