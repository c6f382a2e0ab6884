"""A long run with a fault every 15 s: how much of its time does it use, and does anything grow?

python -m tests.faults.soak [--seconds 300] [--schedules 200]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lepton_ray import Batch, Checkpoints, Faults, Job, RunCancelled
from lepton_ray.verify import verify
from tests.faults.scene import LIMIT_S, STEPS, assert_nothing_lost, scene, weights
from tests.faults.schedules import disturbed

WORKERS = 4
PERIOD_S = 15.0
PACE_S = 0.02
"""Of a microbatch: the machine is to be idle for most of the time, or it would measure that."""
GOODPUT = 0.8
STRIKES = ("kill", "freeze", "controller")  # in turn


@dataclass(frozen=True)
class Held:
    """The most that a process of the run holds."""

    memory_mb: float
    descriptors: int
    threads: int
    shared_mb: float
    """Mapped of /dev/shm and of memory without a name."""


@dataclass(frozen=True)
class Report:
    """What a long run came to."""

    seconds: float
    steps: int
    step_time_s: float
    """Before the first fault."""
    faults: int
    goodput: float
    """Steps x undisturbed step time / time."""
    before: Held
    after: Held
    problems: list[str]
    """What `verify` found."""

    def check(self) -> None:
        """Raise AssertionError unless it went on and nothing grew."""
        before, after = self.before, self.after
        assert not self.problems, self.problems
        assert self.goodput >= GOODPUT, self
        assert after.memory_mb <= 1.15 * before.memory_mb + 30, self
        assert after.descriptors <= before.descriptors + 12, self
        assert after.threads <= before.threads + 6, self
        assert after.shared_mb <= before.shared_mb + 8, self


def soak(storage: str, seconds: float, seed: int = 0) -> Report:
    """Let a run train for so long, with a fault every PERIOD_S."""
    draw, struck = random.Random(seed), 0
    job = scene(
        storage,
        "soak",
        num_workers=WORKERS,
        pace_s=PACE_S,
        epochs=None,
        steps=10**6,
        batch=Batch(samples=33, microbatches=12),
        checkpoints=Checkpoints(every_steps=100),
        validate_every=200,
        callbacks=[],
        faults=Faults(),
    )
    pids: dict[int, int] = {}
    began_s = step_time_s = 0.0
    before = held([])
    for record in job.events():
        now_s = time.monotonic()
        if record["event"] == "worker":
            pids[record["worker"]] = record["pid"]
        if record["event"] != "step":
            continue
        if not began_s and len(pids) == WORKERS:
            began_s, first = now_s, record["step"]
        elif now_s > began_s + PERIOD_S * (struck + 1) and now_s < began_s + seconds - PERIOD_S / 2:
            if not struck:
                step_time_s = (now_s - began_s) / (record["step"] - first)
                before = held(pids.values())
            strike(job, pids, STRIKES[struck % len(STRIKES)], draw)
            struck += 1
        elif now_s > began_s + seconds:
            break
    else:
        job.wait(LIMIT_S)  # it tells what it failed with
    steps, took_s = record["step"] - first, now_s - began_s
    after = held(pids.values())
    job.cancel()
    with suppress(RunCancelled):
        job.wait(LIMIT_S)
    problems, _ = verify(job.path)
    return Report(took_s, steps, step_time_s, struck, steps * step_time_s / took_s, before, after, problems)


def strike(job: Job, pids: dict[int, int], what: str, draw: random.Random) -> None:
    """Let something happen to the run."""
    if what == "controller":
        os.kill(int(job.status()["pid"]), signal.SIGKILL)
        return
    alive = [worker for worker, pid in pids.items() if psutil.pid_exists(pid)]
    worker = draw.choice(alive)
    os.kill(pids.pop(worker), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def held(pids: Iterable[int]) -> Held:
    """Measure processes."""
    most = Held(0, 0, 0, 0)
    for pid in pids:
        with suppress(psutil.NoSuchProcess, OSError):
            process = psutil.Process(pid)
            found = Held(
                process.memory_info().rss / 1e6,
                process.num_fds(),
                process.num_threads(),
                _shared_bytes(pid) / 1e6,
            )
            most = Held(*(max(pair) for pair in zip(asdict(most).values(), asdict(found).values())))
    return most


def _shared_bytes(pid: int) -> int:
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/dev/shm/" in line or "/memfd:lepton_ray" in line:
            start, _, end = line.split()[0].partition("-")
            total += int(end, 16) - int(start, 16)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--schedules", type=int, default=200)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as storage:
        found = soak(storage, chosen.seconds)
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        found.check()
        calm = weights(scene(storage, "calm").wait(LIMIT_S))
        for seed in range(chosen.schedules):
            assert_nothing_lost(*disturbed(storage, f"run-{seed}", seed), calm, redone=STEPS)
            sys.stdout.write(f"schedule {seed}: nothing lost\n")


if __name__ == "__main__":
    main()
