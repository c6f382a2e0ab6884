"""The local Ray that we start ourselves: which of Ray's processes it has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lepton_ray.cluster.connect import SPARED

PROGRAM = """
import os, psutil, ray
from lepton_ray.cluster.connect import connect

assert connect(2), "a Ray of its own"
assert ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid()
print([part for child in psutil.Process().children(recursive=True) for part in child.cmdline()])
"""


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, name, _ in SPARED])
def test_ray_has_what_we_switch_off(owner: object, name: str) -> None:
    assert callable(getattr(owner, name, None)), f"this Ray has no {name}: look for what it has instead"


@pytest.mark.slow
def test_local_ray_works_without_idle_services() -> None:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    commands = done.stdout
    assert "gcs_server" in commands
    assert not any(service in commands for service in ("monitor.py", "dashboard.py"))
