"""Replicas of two workers: lost as a whole, committed together; a part of the model comes from a worker that has it.

The two train models of their own on the same samples, from other first weights. What is tested is all that does not
depend on how a model is divided: places, generations, the settle rule, copies, checkpoints and mirrors by part.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lepton_ray import Checkpoints, Faults, Job
from tests.faults.scene import (
    LIMIT_S,
    PATIENT,
    STEPS,
    STEPS_PER_EPOCH,
    Happening,
    Net,
    assert_nothing_lost,
    die,
    die_soon,
    fail,
    freeze,
    records,
    scene,
    wait_for,
)
from tests.faults.schedules import act_at
from tests.faults.test_faults import open_at_pause, until_back

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Parts = tuple[torch.Tensor, torch.Tensor]
OTHER = "part-1/model.safetensors"
"""The weights of the second part."""


def parts(job: Job) -> Parts:
    """Return the trained weights of both parts, each in one row."""
    found = []
    for name in ("model.safetensors", OTHER):
        net = Net(None)
        net.load_state_dict(load_file(Path(job.path, name)))
        found.append(torch.cat([tensor.double().flatten() for tensor in net.state_dict().values()]))
    return found[0], found[1]


@pytest.fixture(scope="module")
def calm(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Return the weights of a run in which nothing happens."""
    job = scene(str(tmp_path_factory.mktemp("calm")), "calm", num_workers=2, size=2)
    job.wait(LIMIT_S)
    return parts(job)


def check(job: Job, calm: Parts, *, redone: int = 0) -> None:
    """Check that nothing was lost, and that both parts are those of a calm run."""
    assert_nothing_lost(job, job.wait(LIMIT_S), calm[0], redone=redone)
    torch.testing.assert_close(parts(job)[1], calm[1], rtol=1e-9, atol=1e-12)


def run(storage: str, what: Callable[[], None], where: str, worker: int, faults: Faults = PATIENT) -> Job:
    happening = Happening(what, where, worker, STEPS_PER_EPOCH + 2, f"{storage}.happened")
    job = scene(storage, "job", happening, num_workers=4, size=2, faults=faults)
    job.wait(LIMIT_S)
    assert os.path.exists(happening.flag)
    return job


def test_each_part_is_that_of_replicas_of_one(storage: str, calm: Parts) -> None:
    """The first has the random numbers of a run that has no other part, the second others."""
    alone = scene(storage, "alone", model=lambda: Net(None), num_workers=1)
    alone.wait(LIMIT_S)
    net = Net(None)
    net.load_state_dict(load_file(Path(alone.path, "model.safetensors")))
    row = torch.cat([tensor.double().flatten() for tensor in net.state_dict().values()])
    torch.testing.assert_close(calm[0], row, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(calm[0], calm[1], rtol=1e-2)


@pytest.mark.parametrize(
    ("what", "where", "worker"),
    [
        pytest.param(die, "forward", 1, id="die-forward-1"),
        pytest.param(die, "backward", 2, id="die-backward-2", marks=pytest.mark.long),
        pytest.param(die_soon, "backward", 3, id="die_soon-backward-3", marks=pytest.mark.long),
        pytest.param(die, "sum", 0, id="die-sum-0", marks=pytest.mark.long),
        pytest.param(die, "sum", 3, id="die-sum-3"),
        pytest.param(die, "ballot", 1, id="die-ballot-1"),
        pytest.param(die, "ballot", 2, id="die-ballot-2"),
        pytest.param(die, "update", 3, id="die-update-3", marks=pytest.mark.long),
        pytest.param(die, "evaluate", 0, id="die-evaluate-0", marks=pytest.mark.long),
        pytest.param(die, "write", 1, id="die-write-1"),
        pytest.param(fail, "update", 1, id="fail-update-1"),
    ],
)
def test_a_worker_of_two_that_is_lost_costs_no_step(
    what: Callable[[], None], where: str, worker: int, storage: str, calm: Parts
) -> None:
    check(run(storage, what, where, worker), calm)


@pytest.mark.parametrize(("where", "worker"), [("ballot", 3), pytest.param("sum", 1, marks=pytest.mark.long)])
def test_a_frozen_worker_of_two_is_given_up(where: str, worker: int, storage: str, calm: Parts) -> None:
    job = run(storage, freeze, where, worker, faults=Faults())
    check(job, calm)
    assert any("was silent" in record["cause"] for record in records(job, "generation"))


def kill(pids: dict[int, int], workers: tuple[int, ...]) -> None:
    for worker in workers:
        os.kill(pids[worker], signal.SIGKILL)


def test_halves_of_two_replicas_make_a_whole(storage: str, calm: Parts) -> None:
    """Each replica loses a worker, but each part of the model is still held by one: it gives it to the newcomers."""
    job = scene(storage, "job", num_workers=4, size=2, pace_s=0.02)
    act_at(job, {8: lambda pids: kill(pids, (0, 3))})
    check(job, calm)
    assert not records(job, "resumed")


@pytest.mark.parametrize("origin", ["checkpoint", "mirror"])
def test_a_part_that_nobody_holds_comes_back_with_the_other_of_the_same_step(
    origin: str, storage: str, calm: Parts
) -> None:
    is_mirrored = origin == "mirror"
    faults = replace(PATIENT, mirror_every=4) if is_mirrored else PATIENT
    checkpoints = Checkpoints(every_steps=5 * STEPS if is_mirrored else 5)
    job = scene(storage, "job", num_workers=4, size=2, pace_s=0.05, faults=faults, checkpoints=checkpoints)
    act_at(job, {12: lambda pids: kill(pids, (1, 3))})
    check(job, calm, redone=10)
    (resumed,) = records(job, "resumed")
    assert resumed["origin"] == origin
    assert resumed["step"] in ((4, 8, 12) if is_mirrored else (5, 10))


@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.long)])
def test_a_run_is_resized_by_replicas(before: int, after: int, storage: str, calm: Parts) -> None:
    gate = f"{storage}.gate"
    hold = Happening(lambda: wait_for(gate), "forward", 1, 4, f"{storage}.happened")
    job = scene(storage, "job", hold, num_workers=before, size=2, pace_s=0.01)
    wait_for(hold.flag)
    job.resize(after)
    open_at_pause(job, gate)
    check(job, calm)
    assert [len(record["workers"]) for record in records(job, "generation")] == [before, after]
    assert not records(job, "resumed")


def test_a_controller_of_replicas_of_two_comes_back(storage: str, calm: Parts) -> None:
    gate = f"{storage}.gate"
    job = scene(storage, "job", Happening(lambda: wait_for(gate), "ballot", 1, 8, f"{storage}.happened"), size=2)
    wait_for(f"{storage}.happened")
    os.kill(int(job.status()["pid"]), signal.SIGKILL)
    until_back(job)
    Path(gate).touch()
    check(job, calm)
    assert len(records(job, "generation")) == 1
