"""Start the scripts in `peers/` as a user would start them, each in a process of its own, and read their marks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
LIMIT_S = 300.0
"""Longest time that a run may take. Ray Train on a busy machine of two cores has needed two minutes."""
QUIET_CORES = 0.2


def script(name: str, *arguments: str) -> list[str]:
    """Return the command of a peer that starts its workers itself."""
    return [sys.executable, str(HERE / "peers" / name), *arguments]


def torchrun(name: str, workers: int, *arguments: str) -> list[str]:
    """Return the command of a peer whose workers are started by torchrun."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(workers)]
    return [*command, str(HERE / "peers" / name), *arguments]


@dataclass
class Running:
    """A run under way."""

    process: subprocess.Popen[bytes]
    start_s: float
    """Wall-clock time."""
    marks_file: Path
    log: Path

    def marks(self, name: str) -> list[dict[str, Any]]:
        """Return the marks of that name so far, oldest first."""
        if not self.marks_file.exists():
            return []
        lines = self.marks_file.read_text().splitlines()
        return [mark for mark in map(json.loads, lines) if mark["mark"] == name]

    def wait_for(self, name: str, count: int) -> list[dict[str, Any]]:
        """Wait until `count` processes have made a mark. Raises RuntimeError when the run ends before."""
        deadline_s = time.monotonic() + LIMIT_S
        while len(found := self.marks(name)) < count:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no {count} marks {name!r}:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)
        return found

    def wait(self) -> None:
        """Wait for the end. Raises RuntimeError when it is not a good one."""
        if self.process.wait(LIMIT_S) != 0:
            raise RuntimeError(f"exit code {self.process.returncode}:\n{self.log.read_text()[-4000:]}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for everything that is written; its path is short because Ray puts sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="lrb"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, *, address: str | None = None, **asked: object) -> Iterator[Running]:
    """Start a run, and see to it that nothing of it is left afterwards.

    address: of a running cluster. asked: what `Run.asked` reads, such as steps.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
        "PYTHONWARNINGS": "ignore",
        "BENCH_FOLDER": str(own),
        "BENCH_MARKS": str(own / "marks"),
        **{f"BENCH_{name.upper()}": str(value) for name, value in asked.items()},
        **_token(folder),
    }
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # users have their bytecode cached
    env.pop("RAY_ADDRESS", None)
    if address is not None:
        env["RAY_ADDRESS"] = address
    log = own / "log"
    start_s = time.time()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    run = Running(process, start_s, own / "marks", log)
    try:
        yield run
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that descends from it, first kindly."""
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for other in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.Error):
                other.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def _token(folder: Path) -> dict[str, str]:
    """Return the settings of Ray's token authentication, with a token of our own and not the account's."""
    path = folder / "token"
    if not path.exists():
        path.write_text(secrets.token_hex(32))
        path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[str]:
    """Start a cluster with `ray start --head`; give its address once it has come to rest."""
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--port", "0", "--disable-usage-stats",
        "--num-cpus", str(cpus), "--temp-dir", tempfile.mkdtemp(dir=folder),
    ]  # fmt: skip
    with running(command, folder) as head:
        deadline_s = time.monotonic() + LIMIT_S
        while "--address='" not in (said := head.log.read_text()) or "runtime started" not in said:
            if head.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the cluster did not start:\n{said}")
            time.sleep(0.1)
        settle(head.process.pid, deadline_s)
        yield said.split("--address='")[1].split("'")[0]


def settle(pid: int, deadline_s: float) -> None:
    """Wait until a process and its descendants use next to no CPU."""
    before = _cpu_s(pid)
    while time.monotonic() < deadline_s:
        time.sleep(1.0)
        after = _cpu_s(pid)
        if after - before < QUIET_CORES:
            return
        before = after


def _cpu_s(pid: int) -> float:
    total = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
