"""A run that is killed at any moment and started again under its name makes the model that it would have made.

Here whole processes are killed; tests/train/test_loop.py lets a run fail at each of its records.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_ray.result import Result
from tests.api.scripts.job import STEPS_PER_EPOCH, make_trainer
from tests.api.scripts.processes import (
    controller,
    controller_pid,
    driver,
    is_gone,
    kill,
    records,
    saw,
    steps,
    until,
    worker_pids,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

END = 3 * STEPS_PER_EPOCH  # where EarlyStopping ends the run
PACE_S = 0.02


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    """Return the address of the session's Ray."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return what comes out when nothing happens."""
    return make_trainer(str(tmp_path_factory.mktemp("undisturbed")), "calm").submit().wait(100)


def assert_same(found: Result, expected: Result, storage: str) -> None:
    """Compare everything that a disturbance could change."""
    assert replace(found.receipt, generations=1) == expected.receipt
    assert (found.receipt.samples_lost, found.receipt.samples_repeated) == (0, 0)
    assert steps(storage, found.name) == list(range(found.receipt.steps))
    assert found.metrics == expected.metrics
    keep = [{k: v for k, v in epoch.items() if k != "samples_per_s"} for epoch in expected.history]
    assert [{k: v for k, v in epoch.items() if k != "samples_per_s"} for epoch in found.history] == keep


def kill_all(storage: str, name: str, driver_pid: int) -> None:
    """Kill what makes a run, workers first, in one go."""
    pids = [*worker_pids(storage, name), controller_pid(name), driver_pid]
    for pid in pids:
        kill(pid)
    until(lambda: all(is_gone(pid) for pid in pids), "the killed processes to go")
    until(lambda: controller(name) is None, "Ray to notice")


def lived(storage: str, name: str) -> int:
    """Count the lives of a run that came to train."""
    return len([record for record in records(storage, name) if record["event"] in ("started", "resumed")])


def is_writing(storage: str, name: str) -> bool:
    """Tell whether a checkpoint beyond the first is being written: a folder that has no manifest yet."""
    folder = f"{storage}/{name}/checkpoints"
    try:
        newest = max(os.listdir(folder))
        return newest > "step-00000008" and "manifest.json" not in os.listdir(f"{folder}/{newest}")
    except (FileNotFoundError, ValueError):
        return False


def test_undisturbed_run_stops_early_and_counts_as_finished(undisturbed: Result) -> None:
    assert undisturbed.receipt.steps == END
    last = records(str(Path(undisturbed.path).parent), undisturbed.name)[-1]
    assert (last["event"], last["outcome"]) == ("ended", "finished")


def test_killed_run_ends_with_the_same_model(undisturbed: Result, address: str, storage: str) -> None:
    name = "killed"
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("a checkpoint to be written", lambda: is_writing(storage, name)),
        ("some step", saw(storage, name, "step", step=chosen.randrange(20, END - 1))),
    ]
    with ExitStack() as scripts:  # all import at the same time, and go one after the other
        drivers = [
            scripts.enter_context(driver("train", storage, name, address=address, pace_s=PACE_S)) for _ in moments
        ]
        for script, (what, moment) in zip(drivers, moments):
            lives = lived(storage, name)
            script.go()
            until(lambda lives=lives: lived(storage, name) > lives, "the training to begin")
            until(moment, what, every_s=0.001)
            kill_all(storage, name, script.process.pid)
    result = make_trainer(storage, name, pace_s=PACE_S).submit().wait(100)
    assert lived(storage, name) >= len(moments)
    assert_same(result, undisturbed, storage)
