"""A minute of a run with a fault every 15 s; `make soak` takes longer."""

from __future__ import annotations

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_run_uses_its_time_and_nothing_grows(ray_cluster: None, storage: str) -> None:
    soak(storage, 60).check()
