"""Controllers: one for a job whoever asks first, spare ones, and those whose driver or process goes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from torch.utils.data import Dataset

from lepton_ray import ConfigError, DistributedTrainer, Job, RunFailed
from lepton_ray.cluster import connect
from lepton_ray.cluster.controller import Controller
from lepton_ray.cluster.names import answer
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.cluster.worker import _check_folder
from lepton_ray.prepare import with_place
from lepton_ray.storage import Folder
from tests.api.scripts.processes import ROOT, kill, records, until

pytestmark = pytest.mark.slow

X, Y = np.zeros((8, 3), np.float32), np.zeros((8, 1), np.float32)


def trainer(storage: str, name: str, data: Any = (X, Y), **options: Any) -> DistributedTrainer:
    return DistributedTrainer(torch.nn.Linear(3, 1), data, name=name, storage=storage, loss="mse", **options)


def overview() -> dict[str, Any]:
    return dict(answer(scheduler().overview.remote(), "the scheduler"))


def test_two_drivers_of_one_name_share_one_run(ray_cluster: None, storage: str) -> None:
    torch.manual_seed(0)
    both = [trainer(storage, "shared") for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda each: each.submit().wait(60), both)
    assert first.receipt == second.receipt
    assert [len(records(storage, "shared", kind)) for kind in ("header", "admitted", "ended")] == [1, 1, 1]


def test_driver_of_another_configuration_is_refused_however_fast(ray_cluster: None, storage: str) -> None:
    both = [trainer(storage, "disputed", seed=seed) for seed in (0, 1)]

    def run(each: DistributedTrainer) -> int | str:
        try:
            return each.submit().wait(60).receipt.steps
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        steps, refusal = sorted(threads.map(run, both), key=str)
    assert steps == 1
    assert "another configuration" in str(refusal)


def test_run_of_that_name_in_another_folder_is_not_taken_for_this_one(ray_cluster: None, storage: str) -> None:
    long = {"epochs": 1_000_000}
    running = trainer(storage, "elsewhere", **long).submit()
    try:
        with pytest.raises(ConfigError, match="is under way in .*Use another name"):
            trainer(f"{storage}-2", "elsewhere", **long).submit()
    finally:
        running.cancel("enough")
    until(lambda: running.status()["outcome"] == "cancelled", "its end")


def test_next_job_takes_the_process_of_the_last_unless_that_is_dead(ray_cluster: None, storage: str) -> None:
    def run(name: str) -> tuple[int, Job]:
        job = trainer(storage, name).submit()
        pid = int(job.status()["pid"])
        job.wait(60)
        return pid, job

    run("makes-one-if-there-is-none")
    first, ended = run("first")
    second, _ = run("second")
    assert second == first
    with pytest.raises(RayActorError, match="serves the next job"):
        ray.get(ended._controller.events.remote(0))
    ended._controller.stop.remote("too late")  # harms nobody
    assert ended.status()["outcome"] == "finished"
    kill(second)
    third, _ = run("third")
    assert third != second


class Fragile(Dataset[Any]):
    """Can be sent, and cannot be made again where it arrives."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]

    def __setstate__(self, state: Any) -> None:
        raise OSError("no such licence server")


def test_data_that_cannot_be_unpickled_fail_the_run_in_words(ray_cluster: None, storage: str) -> None:
    data = Fragile()
    data.field = 1  # type: ignore[attr-defined]
    for _ in range(2):  # and the name can be used again
        with pytest.raises(RunFailed, match="no such licence server"):
            trainer(storage, "fragile", data).submit().wait(60)


def test_interrupted_warm_leaves_the_queue_and_frees_what_it_had(ray_cluster: None) -> None:
    environment = {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    in_use = ray.util.placement_group([{"CPU": 1}])
    ray.get(in_use.ready(), timeout=60)
    command = [sys.executable, "-m", "lepton_ray.cli", "warm", "--workers", "6"]
    with subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: any(job.startswith("warm-") for job in overview()["jobs"]), "the request")
        process.send_signal(signal.SIGINT)
        process.wait(60)
    until(lambda: not any(job.startswith("warm-") for job in overview()["jobs"]), "it to be withdrawn")
    ray.util.remove_placement_group(in_use)


def test_records_wait_for_a_controller_that_comes_back() -> None:
    """It must not take, and then drop, what the workers report while it does not know them yet."""

    async def ask_too_early() -> list[bool]:
        controller = Controller(None, lambda is_reusable: None, lambda order: None)
        asked = [controller.report(0, [{"event": "step", "step": 0, "generation": 1}]), controller.recorded(0, 1)]
        tasks = [asyncio.ensure_future(question) for question in asked]
        await asyncio.wait(tasks, timeout=0.1)
        return [task.done() for task in tasks]

    assert asyncio.run(ask_too_early()) == [False, False]


def test_stream_is_refused_where_workers_leave_no_cpu_to_read_it(ray_cluster: None, storage: str) -> None:
    import ray.data

    with pytest.raises(ConfigError, match="Ray Data needs"):
        trainer(storage, "greedy", num_workers=6).predict(ray.data.range(8))


def test_folder_that_the_controller_does_not_write_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    spec = trainer(str(tmp_path), "elsewhere")._prepared.spec
    spec = with_place(spec, "elsewhere", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="its journal is not there"):
        _check_folder(spec)
    Folder(spec.run_url).write("journal-00001.jsonl", b"")
    _check_folder(spec)


def test_local_ray_that_is_too_small_says_how_to_get_a_larger_one(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connect._own_rooms, ray.get_runtime_context().gcs_address, 2)
    assert not connect.connect(2)
    with pytest.raises(ConfigError, match=r"needs 3 CPUs.* has 2\. Call ray\.shutdown\(\)"):
        connect.connect(3)
