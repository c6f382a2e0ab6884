"""The kernel in C: the sums of numpy's way, built once, and done without where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lepton_ray.collective.kernel import addresses_of, sum_into_all

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler, as the kernel does"
)
PROBE = """
import logging, numpy as np
logging.basicConfig(level=logging.DEBUG)
from lepton_ray.collective.kernel import sum_into_all
kernels = [sum_into_all(np.dtype(kind)) for kind in ("f4", "f8", "f4")]
print([kernel is not None for kernel in kernels])
"""


def probe(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask for kernels in a process whose cache folder is this one."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", PROBE], env=own, capture_output=True, text=True, timeout=60, check=True
    )


@needs_compiler
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 1024, 5001])
def test_sums_have_the_bits_of_numpy(kind: str, world: int, count: int) -> None:
    kernel = sum_into_all(np.dtype(kind))
    assert kernel is not None
    arrays = [np.random.default_rng(rank).normal(size=count + 1).astype(kind)[1:] for rank in range(world)]
    expected = arrays[0].copy()
    for other in arrays[1:]:
        expected += other
    kernel(addresses_of([array.ctypes.data for array in arrays]), 0, count)
    assert all(np.array_equal(array, expected) for array in arrays)


def test_other_kinds_of_numbers_have_none() -> None:
    assert sum_into_all(np.dtype("i4")) is None
    assert sum_into_all(np.dtype([("bfloat16", "<i2")])) is None


@needs_compiler
def test_processes_that_come_together_build_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: probe(tmp_path).stdout, range(3)))
    assert said == ["[True, True, True]\n"] * 3
    (built,) = (tmp_path / "lepton_ray").glob("*.so")
    first = built.stat()
    probe(tmp_path)
    assert built.stat().st_mtime_ns == first.st_mtime_ns
    assert {path.suffix for path in (tmp_path / "lepton_ray").iterdir()} == {".so", ".lock"}


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"LEPTON_RAY_KERNEL": "0"}, "LEPTON_RAY_KERNEL=0"),
        ({"PATH": "/nowhere"}, "there is no C compiler"),
    ],
)
def test_without_it_numpy_does_the_work_and_that_is_said_once(
    environment: dict[str, str], why: str, tmp_path: Path
) -> None:
    done = probe(tmp_path, **environment)
    assert done.stdout == "[False, False, False]\n"
    assert done.stderr.count(why) == 1


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "lepton_ray").mkdir()
    (tmp_path / "lepton_ray").chmod(0o777)
    done = probe(tmp_path)
    assert done.stdout == "[False, False, False]\n"
    assert "others can write" in done.stderr
