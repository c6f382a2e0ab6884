"""What a run survives: real processes, real signals, at every place of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import lepton_ray
from lepton_ray import Batch, Checkpoints, ConfigError, Elastic, Faults, Job, RunFailed, Sync, WorkerFailed
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.result import Result
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import newest
from tests.faults.scene import (
    BATCH,
    LIMIT_S,
    MICROBATCHES,
    PATIENT,
    STEPS,
    STEPS_PER_EPOCH,
    Both,
    Happening,
    assert_nothing_lost,
    die,
    die_soon,
    exhaust,
    fail,
    freeze,
    hang,
    records,
    scene,
    wait_for,
    weights,
)
from tests.faults.schedules import act_at, disturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PLACES = ("forward", "backward", "sum", "ballot", "update", "evaluate")


@pytest.fixture(scope="module")
def calm(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Return the weights of a run in which nothing happens."""
    return weights(scene(str(tmp_path_factory.mktemp("calm")), "calm").wait(LIMIT_S))


def run(storage: str, what: Callable[[], None], where: str, worker: int, **options: Any) -> tuple[Job, Result]:
    happening = Happening(what, where, worker, STEPS_PER_EPOCH + 2, f"{storage}.happened")
    job = scene(storage, "job", happening, **options)
    result = job.wait(LIMIT_S)
    assert os.path.exists(happening.flag)
    return job, result


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("where", PLACES)
def test_a_worker_that_dies_costs_no_step(where: str, worker: int, storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, die, where, worker)
    assert_nothing_lost(job, result, calm)
    assert result.receipt.generations >= 2


@pytest.mark.parametrize("where", ["callback", "checkpoint", "write"])
def test_rank_0_that_dies_at_work_of_its_own_costs_no_step(where: str, storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, die, where, 0)
    assert_nothing_lost(job, result, calm)
    assert result.receipt.generations >= 2


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_that_dies_in_a_sum_or_a_ballot_costs_no_step(worker: int, storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, die_soon, "backward", worker)
    assert_nothing_lost(job, result, calm)


@pytest.mark.parametrize(
    ("where", "worker"),
    [
        ("forward", 0),
        ("forward", 1),
        ("update", 0),
        ("update", 1),
        ("sum", 1),
        ("ballot", 0),
        ("ballot", 1),
        ("write", 0),
    ],
)
def test_a_frozen_worker_is_given_up(where: str, worker: int, storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, freeze, where, worker, faults=Faults())
    assert_nothing_lost(job, result, calm)
    causes = [record["cause"] for record in records(job, "generation")]
    assert any("was silent" in cause for cause in causes), causes


@pytest.mark.parametrize(("workers", "redone", "limit_s"), [(1, 5, 0.5), (2, 0, 5.0)])
def test_a_worker_that_hangs_is_given_up(
    workers: int, redone: int, limit_s: float, storage: str, calm: torch.Tensor
) -> None:
    """It answers, so nothing but its work tells: that of a lone worker stands still, others wait for it in vain."""
    faults = replace(PATIENT, collective_timeout_s=limit_s)
    job, result = run(storage, hang, "forward", workers - 1, num_workers=workers, faults=faults)
    assert_nothing_lost(job, result, calm, redone=redone)
    if workers == 1:
        assert any("began nothing for" in record["what"].get("reason", "") for record in records(job, "told"))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_once_costs_no_step(where: str, storage: str, calm: torch.Tensor) -> None:
    """The kernel's or Ray's killer of greedy processes is a worker that dies; this is an allocation that fails."""
    job, result = run(storage, exhaust, where, 1)
    assert_nothing_lost(job, result, calm)


@pytest.mark.parametrize("where", ["forward", "backward", "evaluate"])
def test_an_error_that_does_not_come_again_costs_no_step(where: str, storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, fail, where, 1)
    assert_nothing_lost(job, result, calm)
    assert len(records(job, "worker")) == 2  # nobody was started anew


def test_an_error_in_the_midst_of_an_update_leaves_the_others_their_state(storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, fail, "update", 1)
    assert_nothing_lost(job, result, calm)


def test_an_error_of_a_callback_ends_the_run(storage: str, calm: torch.Tensor) -> None:
    with pytest.raises(WorkerFailed, match="what the user wrote"):
        run(storage, fail, "callback", 0)


def dying_when_saved(storage: str) -> Callable[[], None]:
    """Return what ends a process when the job has a checkpoint: it is written in the background."""

    def die_then() -> None:
        while newest(Folder(f"{storage}/job/checkpoints"))[0] is None:
            time.sleep(0.01)
        die()

    return die_then


def test_a_lone_worker_that_dies_is_replaced_and_goes_on_from_the_checkpoint(storage: str, calm: torch.Tensor) -> None:
    job, result = run(storage, dying_when_saved(storage), "forward", 0, num_workers=1)
    assert_nothing_lost(job, result, calm, redone=5)
    assert [record["step"] for record in records(job, "resumed")] == [5]


def test_when_all_die_the_run_goes_on_from_the_checkpoint(storage: str, calm: torch.Tensor) -> None:
    job = scene(storage, "job", Happening(lambda: time.sleep(1), "forward", 0, 8, f"{storage}.happened"))
    pids = {}
    for record in job.events():
        if record["event"] == "worker":
            pids[record["worker"]] = record["pid"]
        if record["event"] == "step" and record["step"] == 6:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            break
    result = job.wait(LIMIT_S)
    assert_nothing_lost(job, result, calm, redone=STEPS_PER_EPOCH)


def test_local_steps_go_on_from_the_checkpoint_as_if_nothing_had_happened(storage: str, ray_cluster: None) -> None:
    """The state of a worker that trains by itself dies with it, so all of them go back."""
    sync = Sync.local(steps=3)
    calm = weights(scene(storage, "calm", sync=sync).wait(LIMIT_S))
    job, result = run(storage, dying_when_saved(storage), "forward", 1, sync=sync)
    assert_nothing_lost(job, result, calm, redone=STEPS_PER_EPOCH)
    assert [record["step"] for record in records(job, "resumed")] == [5]


@pytest.mark.parametrize("workers", [1, 2])
def test_when_all_die_the_run_goes_on_from_the_mirror(workers: int, storage: str, calm: torch.Tensor) -> None:
    every, last = 4, 10
    faults = replace(PATIENT, mirror_every=every)
    rare = Checkpoints(every_steps=5 * STEPS)
    job = scene(storage, "job", num_workers=workers, pace_s=0.05 * workers, faults=faults, checkpoints=rare)
    act_at(job, {last: _kill_all})
    result = job.wait(LIMIT_S)
    assert_nothing_lost(job, result, calm, redone=every + 1)
    (resumed,) = records(job, "resumed")
    assert resumed["origin"] == "mirror"
    assert last - every <= resumed["step"] <= last + 2


def _kill_all(pids: dict[int, int]) -> None:
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)


def open_at_pause(job: Job, gate: str) -> None:
    """Let a run that is held go on, when it is to pause."""
    while not any(record["phase"] == "pausing" for record in records(job, "phase")):
        time.sleep(0.05)
    Path(gate).touch()


def test_a_run_is_resized_while_it_trains(storage: str, calm: torch.Tensor) -> None:
    job = scene(storage, "job", callbacks=[])
    act_at(job, {3: lambda pids: job.resize(1)})
    result = job.wait(LIMIT_S)
    assert (result.receipt.samples_lost, result.receipt.samples_repeated) == (0, 0)
    torch.testing.assert_close(weights(result), calm, rtol=1e-9, atol=1e-12)
    assert [record["workers"] for record in records(job, "generation")] == [[0, 1], [0]]


def test_a_reproducible_run_ends_with_the_bits_of_a_lone_worker(ray_cluster: None, storage: str) -> None:
    """Whoever died and whoever left: BatchNorm, dropout, clipping and a short last batch included."""
    batch = Batch(samples=BATCH, microbatches=MICROBATCHES, clip_norm=0.5)
    alone = scene(storage, "alone", num_workers=1, reproducible=True, batch=batch).wait(LIMIT_S)
    happening = Happening(die, "forward", 1, STEPS_PER_EPOCH + 2, f"{storage}.happened")
    job = scene(storage, "job", happening, num_workers=3, reproducible=True, batch=batch, pace_s=0.02)
    act_at(job, {2 * STEPS_PER_EPOCH: lambda pids: job.resize(1)})
    result = job.wait(LIMIT_S)
    assert os.path.exists(happening.flag)
    assert_nothing_lost(job, result, weights(alone))
    assert result.receipt.weights_sha256 == alone.receipt.weights_sha256
    assert result.metrics == alone.metrics
    sizes = [len(record["workers"]) for record in records(job, "generation")]
    assert (sizes[0], sizes[-1]) == (3, 1)
    assert len(sizes) >= 3


def test_newcomers_copy_the_state_of_a_sibling(storage: str, calm: torch.Tensor) -> None:
    """The run is held at a step until the newcomers are ready, so that they have steps to do."""
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 0, 4, f"{storage}.happened")
    job = scene(storage, "job", hold, num_workers=1, pace_s=0.03)
    wait_for(hold.flag)
    job.resize(3)
    open_at_pause(job, gate)
    result = job.wait(LIMIT_S)
    assert_nothing_lost(job, result, calm)
    assert [0] < records(job, "generation")[-1]["workers"] <= [0, 1, 2]
    assert not records(job, "resumed")


@pytest.mark.parametrize(
    "what", [pytest.param(die, id="dies"), pytest.param(freeze, id="freezes", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(("where", "worker"), [("lend", 0), ("borrow", 2), ("forming", 1)])
def test_a_worker_is_lost_while_a_newcomer_joins(
    where: str, worker: int, what: Callable[[], None], storage: str, calm: torch.Tensor
) -> None:
    """The one that gives its state away, the one that gets it, or another."""
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 0, 4, f"{storage}.held")
    lost = Happening(what, where, worker, -1 if worker == 2 else 4, f"{storage}.happened")
    job = scene(storage, "job", Both(hold, lost), pace_s=0.01)
    wait_for(hold.flag)
    job.resize(3)
    open_at_pause(job, gate)
    result = job.wait(LIMIT_S)
    assert os.path.exists(lost.flag)
    assert_nothing_lost(job, result, calm)


def test_an_elastic_run_takes_what_there_is(storage: str, calm: torch.Tensor) -> None:
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 0, 4, f"{storage}.happened")
    job = scene(storage, "job", hold, num_workers=Elastic(min=1, max=4), pace_s=0.03)
    open_at_pause(job, gate)  # those that are ready wait a moment for those that start
    result = job.wait(LIMIT_S)
    assert_nothing_lost(job, result, calm)
    sizes = [len(record["workers"]) for record in records(job, "generation")]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1


@pytest.mark.parametrize(
    ("workers", "found"), [(0, "from 1 to 4"), (5, "from 1 to 4"), (2, None)], ids=["none", "too many", "fits"]
)
def test_a_number_of_workers_that_a_run_cannot_have_is_refused(
    workers: int, found: str | None, storage: str, calm: torch.Tensor
) -> None:
    job = scene(storage, "job")
    if found is None:
        job.resize(workers)
    else:
        with pytest.raises(ConfigError, match=found):
            job.resize(workers)
    job.wait(LIMIT_S)
    with pytest.raises(RunFailed, match="over"):
        job.resize(1)


def test_failures_in_a_row_end_the_run(storage: str, calm: torch.Tensor) -> None:
    class Always(Happening):
        def __call__(self, where: str, step: int) -> None:
            if where == "forward" and step == self.step:
                raise ValueError(f"what the user wrote, time {time.monotonic()}")

    job = scene(storage, "job", Always(fail, "forward", 0, 7, ""), faults=replace(PATIENT, retries=2))
    with pytest.raises(RunFailed, match="Faults.retries"):
        job.wait(LIMIT_S)
    assert len(records(job, "generation")) == 3


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 20))])
def test_random_kills_and_resizes(seed: int, storage: str, calm: torch.Tensor) -> None:
    assert_nothing_lost(*disturbed(storage, "job", seed), calm, redone=STEPS)


@pytest.mark.parametrize("where", ["forward", "sum", "ballot", "write"])
def test_a_controller_that_dies_comes_back_and_its_workers_never_stop(
    where: str, storage: str, calm: torch.Tensor
) -> None:
    """A worker is held at a place until the controller is back, and goes on in the same generation."""
    gate = f"{storage}.gate"
    job = scene(storage, "job", Happening(lambda: wait_for(gate), where, 0, 8, f"{storage}.happened"))
    first = int(job.status()["pid"])
    wait_for(f"{storage}.happened")
    os.kill(first, signal.SIGKILL)
    until_back(job)
    Path(gate).touch()
    result = job.wait(LIMIT_S)
    assert_nothing_lost(job, result, calm)
    assert result.receipt.generations == 1


def test_a_controller_that_dies_in_a_resize_comes_back_to_it(storage: str, calm: torch.Tensor) -> None:
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 0, 4, f"{storage}.happened")
    job = scene(storage, "job", hold)
    first = int(job.status()["pid"])
    wait_for(hold.flag)
    job.resize(1)
    while not any(record["phase"] == "pausing" for record in records(job, "phase")):
        time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    until_back(job)
    Path(gate).touch()
    assert_nothing_lost(job, job.wait(LIMIT_S), calm)


def until_back(job: Job) -> None:
    """Wait until another process of the controller has taken over."""
    while (lives := [record["how"] for record in records(job, "began")]) != ["begin", "adopt"]:
        assert lives == ["begin"]
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_scheduler_that_dies_is_followed_by_one_that_can_resize(
    workers: int, storage: str, calm: torch.Tensor
) -> None:
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 0, 4, f"{storage}.happened")
    job = scene(storage, "job", hold, pace_s=0.01)
    wait_for(hold.flag)
    os.kill(ray.get(scheduler().overview.remote())["pid"], signal.SIGKILL)
    job.resize(workers)
    open_at_pause(job, gate)
    assert_nothing_lost(job, job.wait(LIMIT_S), calm)
    assert len(records(job, "generation")[1]["workers"]) == workers


@pytest.mark.parametrize("where", ["forward", "ballot", "write"])
def test_an_elastic_run_outlives_its_driver(where: str, storage: str, calm: torch.Tensor) -> None:
    gate = f"{storage}.gate"
    command = [sys.executable, "-m", "tests.faults.submit", storage, where]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=environment) as driver:
        wait_for(f"{storage}.happened")
        driver.kill()
    job = lepton_ray.attach("job")
    Path(gate).touch()
    assert_nothing_lost(job, job.wait(LIMIT_S), calm)


def test_a_controller_that_comes_back_replaces_who_died_meanwhile(storage: str, calm: torch.Tensor) -> None:
    gate = f"{storage}.gate"
    job = scene(storage, "job", Happening(lambda: wait_for(gate), "forward", 0, 8, f"{storage}.happened"))
    pids = {record["worker"]: record["pid"] for record in _until(job, "step")}
    wait_for(f"{storage}.happened")
    os.kill(int(job.status()["pid"]), signal.SIGKILL)
    os.kill(pids[1], signal.SIGKILL)
    Path(gate).touch()
    assert_nothing_lost(job, job.wait(LIMIT_S), calm)


def _until(job: Job, event: str) -> list[dict[str, Any]]:
    """Follow a job up to a record; return the records of its workers."""
    found = []
    for record in job.events():
        if record["event"] == "worker":
            found.append(record)
        if record["event"] == event:
            break
    return found
