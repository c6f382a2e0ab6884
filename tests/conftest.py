"""What all tests share: one local Ray for the session, and short ways to build small things."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine stretches an example beyond any limit that would mean something.
settings.register_profile("busy", deadline=None, print_blob=True)
settings.load_profile("busy")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start a local Ray with 6 CPUs for the whole session, with the processes that ours has."""
    import ray

    from lepton_ray.cluster.connect import _without_idle_services

    folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # short: Ray puts sockets into it
    with _without_idle_services():
        ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=False,
            namespace="lepton_ray",
            log_to_driver=False,
            _temp_dir=folder,
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """Return a folder for runs."""
    return str(tmp_path / "runs")
