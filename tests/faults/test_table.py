"""The table of faults in docs/faults.md names tests that exist, and enough of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELLS = 60


@pytest.mark.slow
def test_every_test_that_the_table_names_exists() -> None:
    named = set()
    for name, parameters in re.findall(r"`(test_\w+)`((?: \[[^\]]*\])*)", (ROOT / "docs/faults.md").read_text()):
        named |= {f"{name}{each}" for each in re.findall(r"\[[^\]]*\]", parameters)} or {name}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "", "tests/faults", "tests/api"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    there = {line.rpartition("::")[2] for line in done.stdout.splitlines()}
    assert named <= there, sorted(named - there)
    assert len(named) >= CELLS
