"""What becomes of a run whose storage is full: a real file system, small and filled to the brim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lepton_ray import RunFailed
from tests.faults.scene import LIMIT_S, STEPS_PER_EPOCH, Both, Happening, assert_nothing_lost, records, scene, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FILLER = "filler"


@pytest.fixture(scope="module")
def calm(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Return the weights of a run in which nothing happens."""
    return weights(scene(str(tmp_path_factory.mktemp("calm")), "calm").wait(LIMIT_S))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """Return a folder on a disk of 4 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk is mounted: that needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr}")
    try:
        yield str(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: str) -> None:
    """Write until there is no room for a byte."""
    with suppress(OSError), open(Path(disk, FILLER), "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0


def empty(disk: str) -> None:
    """Make room again."""
    Path(disk, FILLER).unlink()


@pytest.mark.parametrize("where", ["forward", "sum", "ballot", "checkpoint", "write"])
def test_a_full_disk_costs_checkpoints_and_no_step(
    where: str, small_disk: str, storage: str, calm: torch.Tensor
) -> None:
    """The journal is held and written when there is room; the checkpoints before are kept."""
    full = Happening(lambda: fill(small_disk), where, 0, STEPS_PER_EPOCH + 2, f"{storage}.full")
    room = Happening(lambda: empty(small_disk), "forward", 0, 3 * STEPS_PER_EPOCH, f"{storage}.room")
    job = scene(small_disk, "job", Both(full, room))
    result = job.wait(LIMIT_S)
    assert os.path.exists(full.flag)
    assert_nothing_lost(job, result, calm)
    assert [record["step"] for record in records(job, "checkpoint_failed")][:1] in ([10], [15])


def test_a_run_that_cannot_write_its_model_says_so(small_disk: str, storage: str, calm: torch.Tensor) -> None:
    full = Happening(lambda: fill(small_disk), "forward", 0, STEPS_PER_EPOCH + 2, f"{storage}.full")
    with pytest.raises(RunFailed, match="No space left on device"):
        scene(small_disk, "job", full).wait(LIMIT_S)
