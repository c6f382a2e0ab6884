"""Start, watch and kill the processes of a run, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group_table

from lepton_ray import journal
from lepton_ray.cluster import launch
from lepton_ray.storage import Folder

ROOT = Path(__file__).parents[3]
LIMIT_S = 100.0


def until(found: Callable[[], Any], what: str, limit_s: float = LIMIT_S, every_s: float = 0.01) -> Any:
    """Return the first true value of `found`. For things that tell nobody, such as the end of a process."""
    deadline_s = time.monotonic() + limit_s
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"waited {limit_s:g} s for {what}"
        time.sleep(every_s)


class Driver:
    """A user's script in a process (and a process group) of its own, which has done its imports."""

    def __init__(self, verb: str, storage: str, name: str, *, address: str | None, **options: Any) -> None:
        """address: of a cluster; None: the script starts a Ray of its own."""
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if address is not None:
            environment["RAY_ADDRESS"] = address
        command = [sys.executable, str(ROOT / "tests/api/scripts/driver.py"), verb, storage, name, json.dumps(options)]
        self.errors = Path(storage) / f"{name}.stderr"
        self.errors.parent.mkdir(parents=True, exist_ok=True)
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def go(self) -> Driver:
        """Let the run begin."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.said()
        self.next_line()
        return self

    def next_line(self) -> None:
        """Let the script go on after it has waited for a line."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for the end; return what the script printed."""
        output, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, self.said()
        return dict(json.loads(output))

    def said(self) -> str:
        """Return what the script wrote to standard error."""
        return self.errors.read_text()

    def end(self) -> None:
        """Kill the script, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)


@contextmanager
def driver(verb: str, storage: str, name: str, **options: Any) -> Iterator[Driver]:
    """Give a driver that is gone afterwards."""
    made = Driver(verb, storage, name, **options)
    try:
        yield made
    finally:
        made.end()


def records(storage: str, name: str, event: str | None = None) -> list[dict[str, Any]]:
    """Read a run's journal, or those of its records that are of one kind."""
    found: list[Any] = journal.read(Folder(f"{storage}/{name}"))
    return [record for record in found if event in (None, record["event"])]


def saw(storage: str, name: str, event: str, count: int = 1, **fields: Any) -> Callable[[], bool]:
    """Return a question: does the journal hold `count` records like this?"""

    def ask() -> bool:
        found = [r for r in records(storage, name, event) if all(r.get(key) == value for key, value in fields.items())]
        return len(found) >= count

    return ask


def controller(name: str) -> Any:
    """Return the controller of a run, or None."""
    return launch.find(name)


def controller_pid(name: str) -> int:
    """Return the process of a run's controller."""
    return int(ray.get(controller(name).status.remote(), timeout=LIMIT_S)["pid"])


def worker_pids(storage: str, name: str) -> list[int]:
    """Return the processes of a run's newest life, by the number of the worker."""
    found = {r["worker"]: r["pid"] for r in records(storage, name, "worker")}
    return [found[number] for number in sorted(found)]


def kill(pid: int) -> None:
    """Send SIGKILL."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended (one that nobody has waited for counts as ended)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def groups() -> list[str]:
    """Name the placement groups of workers that exist now."""
    table = placement_group_table().values()
    return [g["name"] for g in table if g["state"] != "REMOVED" and g["name"].startswith("worker:")]


def steps(storage: str, name: str) -> list[int]:
    """Return the steps that made the model, in the order in which they were done."""
    made: list[int] = []
    for record in records(storage, name):
        match record["event"]:
            case "started" | "resumed":
                made = [step for step in made if step < record["step"]]
            case "step":
                made.append(record["step"])
    return made
