"""Names, signals, leases, the pool and the queue, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import lepton_ray
from lepton_ray import ConfigError, Resources, RunCancelled, RunFailed
from lepton_ray.cluster.names import CONTROLLER_PREFIX, SCHEDULER, actor_names, named_actor
from lepton_ray.cluster.scheduler import scheduler
from tests.api.scripts.job import CLASSES, FEATURES, STEPS_PER_EPOCH, make_trainer
from tests.api.scripts.net import Net
from tests.api.scripts.processes import (
    controller,
    driver,
    groups,
    is_gone,
    kill,
    records,
    saw,
    steps,
    until,
    worker_pids,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

END = 3 * STEPS_PER_EPOCH
PACE_S = 0.03


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    """Return the address of the session's Ray."""
    return str(ray.get_runtime_context().gcs_address)


def overview() -> dict[str, Any]:
    """Ask the scheduler what it knows."""
    return dict(ray.get(scheduler().overview.remote(), timeout=30))


def is_left(name: str) -> bool:
    """Tell whether anything of a job is left on the cluster, its warm workers apart."""
    return controller(name) is not None or name in overview()["jobs"] or len(groups()) > len(overview()["warm"])


# --- names ------------------------------------------------------------------------------------------------------------


def test_second_driver_attaches_and_a_submitted_run_outlives_its_own(address: str, storage: str) -> None:
    name = "shared"
    gate = f"{storage}/gate"
    with (
        driver("submit", storage, name, address=address, gate=gate) as first,
        driver("train", storage, name, address=address, gate=gate) as second,
    ):
        first.go()
        until(saw(storage, name, "step"), "the first step")
        kill(first.process.pid)
        second.go()
        job = lepton_ray.attach(name)
        assert job.status()["phase"] == "training"
        until(second.said, "the second driver to follow")
        Path(gate).touch()
        result = job.wait(60)
        assert second.result() == {"sha256": result.receipt.weights_sha256, "steps": END}
    assert len(records(storage, name, "header")) == len(records(storage, name, "started")) == 1
    assert records(storage, name, "resumed") == []
    logs = Path(result.path, "logs")
    assert (logs / "worker-0.log").read_text().count("a forward of the user's model") == END  # of its own microbatch
    assert (logs / "worker-1.log").exists()


def test_finished_run_gives_its_result_without_a_cluster(ray_cluster: None, storage: str) -> None:
    name = "done"
    result = make_trainer(storage, name, workers=1).submit().wait(60)
    with driver("train", storage, name, address="127.0.0.1:1") as script:  # nobody is there
        assert script.go().result() == {"sha256": result.receipt.weights_sha256, "steps": END}
    with pytest.raises(ConfigError) as caught:
        make_trainer(storage, name, seed=12, batch=32).train()
    assert "seed: 11 before, 12 now" in str(caught.value)
    assert "batch.samples: 16 before, 32 now" in str(caught.value)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_with_a_checkpoint_and_leaves_nothing(address: str, storage: str) -> None:
    """tests/api/test_ray_job.py does the same with SIGTERM."""
    name = "stopped"
    shared_memory = set(os.listdir("/dev/shm"))
    with driver("train", storage, name, address=address, pace_s=PACE_S, every_steps=1000, workers=1) as script:
        script.go()
        until(saw(storage, name, "step", step=3), "a step")
        began_s = time.monotonic()
        os.killpg(script.process.pid, signal.SIGINT)
        assert script.process.wait(30) == 130
        took_s = time.monotonic() - began_s
    assert took_s < 10
    assert "stopped by SIGINT" in script.said()
    assert f"name='{name}' to go on" in script.said()
    assert "Traceback" not in script.said()
    done = steps(storage, name)
    assert records(storage, name, "checkpoint_saved")[-1]["step"] == len(done)
    pids = worker_pids(storage, name)
    until(lambda: all(is_gone(pid) for pid in pids), "the workers to end")
    until(lambda: not is_left(name), "the cluster to be free of the job")
    until(lambda: set(os.listdir("/dev/shm")) <= shared_memory, "others on this machine to unlink theirs")


def test_second_signal_ends_at_once_and_workers_end_when_their_controller_is_gone(address: str, storage: str) -> None:
    name = "impatient"
    with driver("train", storage, name, address=address, pace_s=20, lease_s=2, workers=1) as script:
        script.go()
        until(saw(storage, name, "phase", phase="training"), "the training")
        job = lepton_ray.attach(name)
        script.process.send_signal(signal.SIGINT)
        until(saw(storage, name, "phase", phase="stopping"), "the stop")
        began_s = time.monotonic()
        script.process.send_signal(signal.SIGINT)
        assert script.process.wait(30) == 130
        assert time.monotonic() - began_s < 10
    job._controller.kill()  # for good: Ray does not start it again
    with pytest.raises(RunFailed, match=f"controller of '{name}' died.* start the run again under its name"):
        job.wait(30)
    assert job.status()["outcome"] == "lost"
    pids = worker_pids(storage, name)
    until(lambda: all(is_gone(pid) for pid in pids), "the workers to end themselves", limit_s=20)
    until(lambda: not is_left(name), "the scheduler to free what the job held", limit_s=20)


def test_local_ray_has_no_idle_services_and_ends_with_its_driver(storage: str) -> None:
    """Ctrl-C in a terminal reaches every process of the group, Ray's own among them."""
    name = "local"
    shared_memory = set(os.listdir("/dev/shm"))
    options: dict[str, Any] = {"address": None, "pace_s": PACE_S, "every_steps": 1000, "workers": 1}
    with driver("train", storage, name, **options) as first, driver("train", storage, name, **options) as second:
        first.go()
        until(saw(storage, name, "step"), "a step")
        family = psutil.Process(first.process.pid).children(recursive=True)
        commands = [part for process in family for part in process.cmdline()]
        os.killpg(first.process.pid, signal.SIGINT)
        assert first.process.wait(30) == 130, first.said()
        saved = records(storage, name, "checkpoint_saved")[-1]
        second.go()
        until(saw(storage, name, "resumed", step=saved["step"]), "the second life")
        alive = psutil.Process(second.process.pid).children(recursive=True)
        agents = [process for process in alive if process.name().endswith("Agent")]
        second.process.kill()
        until(lambda: all(is_gone(p.pid) for p in family + alive if p not in agents), "Ray to end")
        for process in agents:  # these of Ray's own would end too, a minute later
            kill(process.pid)
    assert len(family) >= 5  # two of Ray, scheduler, controller, worker
    assert any(part.endswith("gcs_server") for part in commands)
    assert not any(part.endswith(("monitor.py", "dashboard.py")) for part in commands)
    until(lambda: set(os.listdir("/dev/shm")) <= shared_memory, "others on this machine to unlink theirs")


def test_run_stops_with_a_checkpoint_when_its_driver_is_killed(address: str, storage: str) -> None:
    name = "orphan"
    with driver("train", storage, name, address=address, pace_s=0.2, lease_s=2, workers=1) as script:
        script.go()
        until(saw(storage, name, "step", step=1), "a step")
        kill(script.process.pid)
        until(saw(storage, name, "ended", outcome="cancelled"), "the end of the run")
    assert "the driver was silent" in records(storage, name, "ended")[0]["reason"]
    assert records(storage, name, "checkpoint_saved")[-1]["step"] == len(steps(storage, name)) < END
    until(lambda: not is_left(name), "the cluster to be free of the job")


def test_cancelled_run_goes_on(ray_cluster: None, storage: str) -> None:
    name = "cancelled"
    job = make_trainer(storage, name, workers=1, model=Net(FEATURES, CLASSES, PACE_S)).submit()
    until(saw(storage, name, "step", step=5), "a step")
    job.cancel("enough for today")
    with pytest.raises(RunCancelled, match=f"{name} stopped: enough for today"):
        job.wait(30)
    assert job.status()["outcome"] == "cancelled"
    result = make_trainer(storage, name, workers=1, model=Net(FEATURES, CLASSES)).submit().wait(60)
    assert (result.receipt.steps, result.receipt.samples_lost, result.receipt.samples_repeated) == (END, 0, 0)
    log = Path(result.path, "logs", "worker-0.log").read_text()
    assert log.count("a forward of the user's model") == 2 * END  # of both microbatches, in both lives together


# --- leases -----------------------------------------------------------------------------------------------------------


def test_runs_go_on_without_the_scheduler_and_the_next_one_knows_them(ray_cluster: None, storage: str) -> None:
    make_trainer(storage, "warm", workers=1).submit().wait(60)
    gate = f"{storage}/gate"
    first = make_trainer(storage, "first", workers=1, resources=Resources(cpus=4), gate=gate).submit()
    until(saw(storage, "first", "step"), "a step")
    old = overview()
    assert old["jobs"]["first"] == 1
    assert len(old["warm"]) >= 1
    kill(old["pid"])
    until(lambda: is_gone(old["pid"]), "the scheduler to go")
    second = make_trainer(storage, "second", workers=1).submit()
    assert second.wait(60).receipt.steps == END
    new = overview()
    assert new["pid"] != old["pid"]
    assert new["jobs"]["first"] == 1
    assert first.status()["phase"] == "training"
    Path(gate).touch()
    assert first.wait(60).receipt.steps == END
    until(lambda: not is_left("first") and not is_left("second"), "nothing but warm workers to be left")


# --- the queue --------------------------------------------------------------------------------------------------------


def test_jobs_wait_their_turn_and_say_why(ray_cluster: None, storage: str) -> None:
    def reasons(name: str) -> Callable[[], list[str]]:
        return lambda: [r["reason"] for r in records(storage, name, "phase") if "reason" in r]

    four = {"workers": 1, "resources": Resources(cpus=4)}
    gate = f"{storage}/gate"
    running = make_trainer(storage, "running", gate=gate, **four).submit()
    until(saw(storage, "running", "step"), "a step")
    head = make_trainer(storage, "head", **four).submit()
    assert until(reasons("head"), "a reason") == ["head waits for 1 x (4 CPU); there is room for 0 now"]
    small = make_trainer(storage, "small", workers=1).submit()
    assert "behind a job that came before it" in until(reasons("small"), "a reason")[0]
    assert head.status()["phase"] == small.status()["phase"] == "waiting"
    assert "waits for 1 x" in head.status()["reason"]
    head.cancel("not needed any more")
    with pytest.raises(RunCancelled, match="not needed"):
        head.wait(30)
    assert small.wait(60).receipt.steps == END
    Path(gate).touch()
    assert running.wait(60).receipt.steps == END
    assert records(storage, "head", "admitted") == []


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_next_job_reuses_warm_workers_and_replaces_dead_ones(
    ray_cluster: None, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text("SCALE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def scale(batch: Any) -> Any:
        import own_module

        print(f"scale {own_module.SCALE}")
        return batch

    def run(name: str, cpus: float = 1.25) -> int:
        """Use one worker, of a size that no other test has left; return its process."""
        options = {"workers": 1, "resources": Resources(cpus=cpus)}
        make_trainer(storage, name, transform=scale, **options).submit().wait(60)
        until(lambda: name not in overview()["jobs"], "the worker to be given back")
        return worker_pids(storage, name)[0]

    pid = run("one")
    (tmp_path / "own_module.py").write_text("SCALE = 22\n")
    assert run("two") == pid
    log = Path(storage, "two", "logs", "worker-0.log").read_text()
    assert "scale 22" in log
    assert "scale 1\n" not in log
    kill(pid)
    until(lambda: is_gone(pid), "the worker to go")
    fresh = run("three")
    assert fresh != pid
    assert run("large", cpus=6) != fresh
    until(lambda: is_gone(fresh), "the evicted worker to end")


def has_job(name: str) -> bool:
    """Tell whether an actor is a controller that has, or has just had, a job."""
    actor = named_actor(name) if name.startswith(CONTROLLER_PREFIX) else None
    try:
        return actor is not None and ray.get(ray.get(actor.current.remote()).places.remote(), timeout=30)[0] != ""
    except ray.exceptions.RayActorError:
        return False


def test_nothing_is_left_when_the_pool_time_is_over(ray_cluster: None, storage: str) -> None:
    until(lambda: not any(map(has_job, actor_names())), "earlier runs to have left a spare controller")
    before = set(actor_names())
    kill(overview()["pid"])
    until(lambda: named_actor(SCHEDULER) is None, "Ray to notice")
    scheduler(pool_s=1, idle_exit_s=1)
    make_trainer(storage, "last", workers=1).submit().wait(60)
    pids = worker_pids(storage, "last")
    until(lambda: all(is_gone(pid) for pid in pids), "the worker to end")
    until(lambda: not groups() and named_actor(SCHEDULER) is None, "the scheduler to end")
    assert set(actor_names()) <= before  # a spare controller of the scheduler that was killed ends within a minute
