"""What a run survives of its hosts and of the network between them: real raylets, cut cables, pulled power cords.

Ray and the run have their default settings. Each test goes on with the cluster of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lepton_ray import journal
from lepton_ray.storage import Folder
from tests.faults import hosts
from tests.faults.hosts import Host, Hosts, until
from tests.faults.scene import STEPS_PER_EPOCH

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

WORKERS = 3
STRUCK = 1
"""The worker whose host something happens to."""
DETECTED_S = 2.0
"""A silent death is known after so long, on a machine that has time."""
PATIENCE = 5.0
"""How much longer a busy machine may take."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Return a cluster on which a run has trained undisturbed; the others are compared with that."""
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.hosts(WORKERS) as made:
        made.ask(storage=str(tmp_path_factory.mktemp("calm")), name="calm", where="", num_workers=WORKERS)
        assert not made.answer()["error"]
        yield made


class Scene:
    """A run on the cluster, at the moment when a worker has reached a place."""

    def __init__(self, cluster: Hosts, storage: str, where: str, worker: int = STRUCK, **options: Any) -> None:
        cluster.add(WORKERS - len(cluster.workers))
        self._cluster, self._folder, self._flag = cluster, Folder(f"{storage}/job"), Path(f"{storage}.job")
        happening = {"where": where, "worker": worker, "step": STEPS_PER_EPOCH + 2}
        cluster.ask(storage=storage, name="job", num_workers=WORKERS, **happening, **options)
        until(self._flag.exists, f"worker {worker} at {where}")
        record = next(record for record in self.records("worker") if record["worker"] == worker)
        self.host = cluster.of(record["node"])
        self.pid = self.host.outside(record["pid"])
        self.struck_s = time.time()

    def records(self, event: str) -> list[dict[str, Any]]:
        return [record for record in journal.read(self._folder) if record["event"] == event]

    def go_on(self) -> None:
        """Let the worker go on, or what is left of it."""
        Path(f"{self._flag}.go").touch()

    def end(self) -> None:
        """Wait for the end: nothing is lost, nothing is doubled, and the model is that of the calm run."""
        self.go_on()
        error = self._cluster.answer()["error"]
        assert not error, error

    def known_s(self) -> float:
        """Return after how long the run knew."""
        known = [r["t"] for r in self.records("phase") if r["phase"] == "settling" and r["t"] >= self.struck_s]
        return float(known[0] - self.struck_s)

    def lost(self) -> None:
        """Know that the host is gone for good."""
        self.host.end()
        self._cluster.workers.remove(self.host)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (Host.power_off, "forward"),
        (Host.power_off, "sum"),
        (Host.power_off, "ballot"),
        (Host.cut, "backward"),
        (Host.cut, "ballot"),
        (Host.kill_raylet, "forward"),
    ],
    ids=["power off-forward", "power off-sum", "power off-ballot", "cut-backward", "cut-ballot", "raylet-forward"],
)
def test_a_host_that_is_lost_costs_no_step(
    fault: Callable[[Host], None], where: str, cluster: Hosts, storage: str
) -> None:
    scene = Scene(cluster, storage, where)
    fault(scene.host)
    scene.end()
    scene.lost()
    assert scene.known_s() < DETECTED_S + PATIENCE
    assert STRUCK not in scene.records("generation")[-1]["workers"]


def test_the_host_of_rank_0_goes_dark_in_a_checkpoint(cluster: Hosts, storage: str) -> None:
    scene = Scene(cluster, storage, "checkpoint", 0)
    scene.host.power_off()
    scene.end()
    scene.lost()


@pytest.mark.parametrize(("where", "worker"), [("sum", STRUCK), ("callback", 0)])
def test_a_worker_that_was_cut_off_for_a_while_has_no_part_any_more(
    where: str, worker: int, cluster: Hosts, storage: str
) -> None:
    """It comes back to a run that went on without it. Its steps do not count, and it ends."""
    scene = Scene(cluster, storage, where, worker)
    scene.host.cut()
    until(lambda: len(scene.records("generation")) > 1, "a generation without it")
    time.sleep(max(0.0, scene.struck_s + 3 - time.time()))
    scene.host.mend()
    scene.end()
    assert worker not in scene.records("generation")[-1]["workers"]
    until(lambda: not Path(f"/proc/{scene.pid}").exists(), "the end of the worker")


def test_one_of_two_that_do_not_reach_each_other_has_to_go(cluster: Hosts, storage: str) -> None:
    """Both answer the controller. They try again, and then one is given up."""
    scene = Scene(cluster, storage, "forward")
    other = next(record["node"] for record in scene.records("worker") if record["worker"] == STRUCK + 1)
    scene.host.cut_from(cluster.of(other))
    try:
        scene.end()
    finally:
        scene.host.repair()
        cluster.of(other).repair()
    assert len(scene.records("generation")[-1]["workers"]) == WORKERS - 1


def test_lost_packets_cost_no_step_and_no_worker(cluster: Hosts, storage: str) -> None:
    """One in twenty is lost, in forward and backward passes, sums, ballots, checkpoints and a resize."""
    scene = Scene(cluster, storage, "forward", resize=WORKERS - 1)
    scene.host.lose(5)
    try:
        scene.end()
    finally:
        scene.host.repair()
    assert [len(record["workers"]) for record in scene.records("generation")] == [WORKERS, WORKERS - 1]


def test_a_host_without_shared_memory_goes_on(cluster: Hosts, storage: str) -> None:
    """From the forward pass of a step on, in all that follows. What the workers share has no name in /dev/shm."""
    scene = Scene(cluster, storage, "forward", resize=WORKERS - 1)
    scene.host.fill_shm()
    scene.end()
    scene.lost()
    assert [len(record["workers"]) for record in scene.records("generation")] == [WORKERS, WORKERS - 1]


@pytest.mark.parametrize("resize", [None, WORKERS - 1], ids=["", "resize"])
@pytest.mark.parametrize("where", ["forward", "ballot"])
def test_a_run_goes_on_while_rays_head_is_away(where: str, resize: int | None, cluster: Hosts, storage: str) -> None:
    """It trains to its end; what it needs the head for waits until that is back."""
    if not hosts.has_redis():
        pytest.skip("without Redis a cluster does not outlive the process of its head: redis-server is not there")
    scene = Scene(cluster, storage, where, resize=resize)
    start_again = cluster.kill_gcs()
    scene.go_on()
    if resize is None:
        until(lambda: scene.records("trained"), "the end of the training")
    start_again()
    scene.end()
