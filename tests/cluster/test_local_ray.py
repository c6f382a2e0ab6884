"""What we switch off in a Ray of our own is there; tests/api/test_lifecycle.py looks which processes are left."""

from __future__ import annotations

import pytest

from lepton_ray.cluster.connect import SPARED


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, name, _ in SPARED])
def test_ray_has_what_we_switch_off(owner: object, name: str) -> None:
    assert callable(getattr(owner, name, None)), f"this Ray has no {name}: look for what it has instead"
