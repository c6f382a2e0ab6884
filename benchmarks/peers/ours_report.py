"""lepton_ray with one parameter and one worker: what a step costs with its records and without them, turn by turn.

Marks the seconds of a step in every other block, in which records are handed over, and in the blocks between, in which
they are dropped; the time inside each call of `report`; and when the driver heard of each step. Of a block the second
half is measured, so that what is still being sent does not fall into the wrong one.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from workload import Run, make_model, make_optimizer

from lepton_ray import DistributedTrainer

BLOCK_STEPS = 2000


class Watch:
    """Stands between a loop and its reporter."""

    def __init__(self, report: Callable[..., None]) -> None:
        self.report, self.is_on, self.works, self.half_s = report, True, 0, 0.0
        self.step_s: dict[bool, list[float]] = {True: [], False: []}
        self.calls: dict[int, tuple[float, float]] = {}

    def __call__(self, event: str, /, **fields: Any) -> None:
        start_s, start = time.time(), time.perf_counter()
        if self.is_on or event not in ("step", "work"):
            self.report(event, **fields)
        if event == "step" and self.is_on:
            self.calls[fields["step"]] = (start_s, time.perf_counter() - start)
        elif event == "work":  # one a step
            self.works += 1
            if self.works % BLOCK_STEPS == BLOCK_STEPS // 2:
                self.half_s = time.perf_counter()
            elif self.works % BLOCK_STEPS == 0:
                self.step_s[self.is_on].append((time.perf_counter() - self.half_s) / (BLOCK_STEPS // 2))
                self.is_on = not self.is_on
        elif event == "trained":
            run.mark("worker", with_records_s=self.step_s[True], without_s=self.step_s[False], calls=self.calls)


def make_watched(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer. This is called in the worker before its loop is made, which then reports to a `Watch`."""
    from lepton_ray.train.loop import Loop

    usual = Loop.__init__

    def init(self: Loop, *parts: Any, report: Callable[..., None], **more: Any) -> None:
        usual(self, *parts, report=Watch(report), **more)

    Loop.__init__ = init
    return make_optimizer(model)


if __name__ == "__main__":
    run = Run.asked()
    job = DistributedTrainer(
        model=make_model(run),
        train_data=run.data(),
        num_workers=run.workers,
        loss=run.loss,
        optimizer=make_watched,
        steps=run.steps,
        batch=run.batch * run.workers,
        storage=os.environ["BENCH_FOLDER"],
    ).submit()
    heard = {}
    for record in job.events():
        if record["event"] == "step":
            heard[record["step"]] = (record["t"], time.time())
    run.mark("driver", heard=heard)
    job.wait()
