"""Runs whose workers are killed and whose number is changed, at random."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress

from lepton_ray import Checkpoints, Job, RunFailed
from lepton_ray.result import Result
from tests.faults.scene import LIMIT_S, STEPS, scene

Act = Callable[[dict[int, int]], None]
"""What is done to a run, given the processes of its workers."""


def act_at(job: Job, acts: dict[int, Act]) -> None:
    """Follow a job to its end, and act at steps."""
    pids: dict[int, int] = {}
    for record in job.events():
        if record["event"] == "worker":
            pids[record["worker"]] = record["pid"]
        if record["event"] == "step":
            for step in [step for step in acts if step <= record["step"]]:
                acts.pop(step)(pids)


def disturbed(storage: str, name: str, seed: int) -> tuple[Job, Result]:
    """Run the small job of `scene` with four kills or resizes."""
    draw = random.Random(seed)

    def kill(pids: dict[int, int]) -> None:
        if pids:  # else all that are known were killed before
            with suppress(ProcessLookupError):
                os.kill(pids.pop(draw.choice([*pids])), signal.SIGKILL)

    def resize(workers: int) -> Act:
        def act(pids: dict[int, int]) -> None:
            with suppress(RunFailed):  # its records may have come late, and it is over
                job.resize(workers)

        return act

    job = scene(storage, name, num_workers=3, checkpoints=Checkpoints(every_steps=3))
    steps = sorted(draw.sample(range(1, STEPS - 1), 4))
    act_at(job, {step: kill if draw.random() < 0.6 else resize(draw.randint(1, 4)) for step in steps})
    return job, job.wait(LIMIT_S)
