"""A run that is killed at any moment and started again under its name makes the model that it would have made."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from lepton_ray import RunCancelled, RunFailed
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
    assert found.receipt == expected.receipt
    assert (found.receipt.samples_lost, found.receipt.samples_repeated) == (0, 0)
    assert steps(storage, found.name) == list(range(found.receipt.steps))
    assert found.metrics == expected.metrics
    keep = [{k: v for k, v in epoch.items() if k != "samples_per_s"} for epoch in expected.history]
    assert [{k: v for k, v in epoch.items() if k != "samples_per_s"} for epoch in found.history] == keep


def kill_all(storage: str, name: str, driver_pid: int | None) -> None:
    """Kill what makes a run, workers first, in one go."""
    pids = [*worker_pids(storage, name), controller_pid(name)] + ([] if driver_pid is None else [driver_pid])
    for pid in pids:
        kill(pid)
    until(lambda: all(is_gone(pid) for pid in pids), "the killed processes to go")
    until(lambda: controller(name) is None, "Ray to notice")


def is_writing(storage: str, name: str) -> bool:
    """Tell whether a checkpoint beyond the first is being written: a folder that has no manifest yet."""
    folder = f"{storage}/{name}/checkpoints"
    try:
        newest = max(os.listdir(folder))
        return newest > "step-00000008" and "manifest.json" not in os.listdir(f"{folder}/{newest}")
    except (FileNotFoundError, ValueError):
        return False


def test_undisturbed_run_stops_early(undisturbed: Result) -> None:
    assert undisturbed.receipt.steps == END


def test_killed_run_ends_with_the_same_model(undisturbed: Result, address: str, storage: str) -> None:
    name = "killed"
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("the first step", saw(storage, name, "phase", phase="training")),
        ("a checkpoint to be written", lambda: is_writing(storage, name)),
        ("some step", saw(storage, name, "step", step=chosen.randrange(20, END - 1))),
    ]
    with ExitStack() as scripts:  # all import at the same time, and go one after the other
        drivers = [
            scripts.enter_context(driver("train", storage, name, address=address, pace_s=PACE_S)) for _ in moments
        ]
        for script, (what, moment) in zip(drivers, moments):
            script.go()
            until(moment, what, every_s=0.001)
            kill_all(storage, name, script.process.pid)
    result = make_trainer(storage, name, pace_s=PACE_S).submit().wait(100)
    assert len([r for r in records(storage, name) if r["event"] in ("started", "resumed")]) >= len(moments)
    assert_same(result, undisturbed, storage)


def test_first_checkpoint_holds_weights_that_nobody_seeded(ray_cluster: None, storage: str, tmp_path: Any) -> None:
    name = "unseeded"
    job = make_trainer(storage, name, is_seeded=False, pace_s=PACE_S, every_steps=1000).submit()
    until(saw(storage, name, "checkpoint_saved", step=0), "the first checkpoint")
    kill_all(storage, name, None)
    with pytest.raises(RunFailed, match="controller of 'unseeded' died.* under its name"):
        job.wait(30)
    copy = str(tmp_path / "copy")
    shutil.copytree(f"{storage}/{name}", f"{copy}/{name}")
    trainers = [make_trainer(s, name, is_seeded=False, pace_s=PACE_S, every_steps=1000) for s in (storage, copy)]
    results = [trainer.submit().wait(100) for trainer in trainers]
    assert results[0].receipt == results[1].receipt
    assert results[0].receipt.steps == END


def test_corrupt_checkpoint_is_named_and_the_one_before_taken(
    undisturbed: Result, ray_cluster: None, storage: str
) -> None:
    name = "corrupt"
    job = make_trainer(storage, name, pace_s=PACE_S).submit()
    until(saw(storage, name, "checkpoint_saved", step=8), "the second checkpoint")
    job.cancel()
    with pytest.raises(RunCancelled, match="corrupt stopped: cancelled"):
        job.wait(30)
    saved = [record["step"] for record in records(storage, name, "checkpoint_saved")]
    path = f"{storage}/{name}/checkpoints/step-{saved[-1]:08d}/state-0.safetensors"
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    result = make_trainer(storage, name, pace_s=PACE_S).submit().wait(100)
    refused = records(storage, name, "checkpoint_refused")
    assert [path in record["reason"] for record in refused] == [True]
    assert records(storage, name, "resumed")[-1]["step"] == saved[-2]
    assert_same(result, undisturbed, storage)
