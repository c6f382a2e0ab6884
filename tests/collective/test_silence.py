"""A machine that acknowledges nothing is told from one that only does not read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import hosts

ROOT = Path(__file__).parents[2]
SCRIPT = """
import socket, subprocess, time
from lepton_ray.collective.links import Link
from lepton_ray.errors import PeerLost

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]

(near, far), (busy, reader) = pair(), pair()
dead, slow = Link(1, near), Link(2, busy)
while slow.send(bytes(1 << 16)):  # until it has no room any more, which it will not have again
    time.sleep(0.001)
rules = "add table inet t; add chain inet t in { type filter hook input priority 0; }; "
subprocess.run(["nft", rules + f"add rule inet t in tcp dport {far.getsockname()[1]} drop"], check=True)
dead.look()
dead.send(b"anybody there?")
until_s = time.monotonic() + 20
while time.monotonic() < until_s:
    slow.look()
    try:
        dead.look()
    except PeerLost as error:
        assert error.peer == 1
        print(error)
        break
    time.sleep(0.1)
else:
    raise SystemExit("nobody was found to be silent")
"""


@pytest.mark.slow
def test_a_machine_that_acknowledges_nothing_is_gone_and_one_that_does_not_read_is_not() -> None:
    if reason := hosts.missing():
        pytest.skip(reason)
    command = ["unshare", "--net", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "the machine of rank 1 has not answered for" in done.stdout
