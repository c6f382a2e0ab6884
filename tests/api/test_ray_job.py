"""`ray job submit` against a cluster that asks for a token, as README tells, from the root of the repository."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.scripts.processes import ROOT, kill, records, saw, steps, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LIMIT_S = 120


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now, away from those that Ray gives to its workers."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 8000, 32000):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Start a head with token authentication; give the environment of a shell whose venv is activated."""
    with tempfile.TemporaryDirectory(prefix="lr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        gcs, dashboard, client, agent = free_ports(4)
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        shell = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": folder,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_DISABLE_USAGE_STATS": "1",
        }
        options = {
            "port": gcs,
            "dashboard-port": dashboard,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "num-cpus": 3,
            "temp-dir": f"{folder}/ray",
            "include-dashboard": "true",
        }
        log = Path(folder, "head.log")
        with log.open("wb") as output:
            head = subprocess.Popen(
                ["ray", "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())],
                env=shell,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            until(lambda: _answers(agent) or head.poll() is not None, "Ray's job agent", LIMIT_S, every_s=0.1)
            assert head.poll() is None, log.read_text()
            yield shell | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:  # it answers SIGTERM late, or on a busy machine not at all
            family = [head.pid, *(child.pid for child in psutil.Process(head.pid).children(recursive=True))]
            for pid in family:
                kill(pid)
            head.wait(LIMIT_S)


def _answers(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ray_job(shell: dict[str, str], *words: str) -> str:
    """Run `ray job ...` in the root of the repository, as one types it; return what it printed."""
    while True:
        done = subprocess.run(
            ["ray", "job", *words],
            cwd=ROOT,
            env=shell,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if "No available agent" not in done.stdout:  # it listens before the head knows it
            assert done.returncode == 0, done.stdout
            return done.stdout


def test_submitted_job_trains_and_its_run_stays(cluster: dict[str, str]) -> None:
    train = ["--working-dir", ".", "--", "python", "jobs/train_digits.py", "--workers", "2"]
    said = ray_job(cluster, "submit", *train, "--epochs", "2")
    assert "Test accuracy:" in said
    found = re.search(r"Run folder: +(\S+)", said)
    assert found is not None, said
    assert Path(found[1]).parent == Path(cluster["HOME"], "lepton_ray")
    assert Path(found[1], "model.safetensors").exists()
    packages = list(Path(cluster["HOME"], "ray").glob("session_*/runtime_resources/working_dir_files/*"))
    assert packages
    for package in (path for path in packages if path.is_dir()):
        left_out = {".venv", ".git", ".mypy_cache"} & {path.name for path in package.iterdir()}
        assert not left_out


def test_job_stop_acts_like_ctrl_c(cluster: dict[str, str], tmp_path: Path) -> None:
    storage, name = str(tmp_path), "stopped"
    endless = json.dumps({"epochs": 1_000_000, "callbacks": [], "scheduler": None}, separators=(",", ":"))
    command = ["python", "-m", "tests.api.scripts.driver", "train", storage, name, endless]
    said = ray_job(cluster, "submit", "--no-wait", "--working-dir", ".", "--", *command)
    job = re.search(r"raysubmit_\w+", said)
    assert job is not None, said
    until(saw(storage, name, "step", step=10), "a step", LIMIT_S)
    ray_job(cluster, "stop", job[0])
    until(saw(storage, name, "ended"), "the end of the run", LIMIT_S)
    ended: dict[str, Any] = records(storage, name, "ended")[0]
    assert (ended["outcome"], ended["reason"]) == ("cancelled", "stopped by SIGTERM")
    assert records(storage, name, "checkpoint_saved")[-1]["step"] == len(steps(storage, name))
    assert f"name='{name}' to go on" in ray_job(cluster, "logs", job[0])
