"""The sum of arrays in shared memory as a few lines of C, where a compiler is; everything works without it.

`kernel.c` is compiled once and kept in the user's cache folder, under the digest of what went into it. A group asks for
it when it forms, so that no operation waits for a compiler. LEPTON_RAY_KERNEL=0 in the environment does without.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Addresses = ctypes.Array[ctypes.c_void_p]
SumIntoAll = Callable[[Addresses, int, int], None]
"""Sum two arrays or more of one dtype, in their order, and write the sum into all of them: their addresses, and from
which element to which."""

_SOURCE = Path(__file__).with_name("kernel.c")
# Tried too: stores that go past the cache. They are no faster where the line has just been read.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_COMPILE_S = 30.0
_NAMES = {np.dtype(np.float32): "sum_float32", np.dtype(np.float64): "sum_float64"}


@cache
def sum_into_all(dtype: np.dtype) -> SumIntoAll | None:
    """Return the kernel for a dtype; None where there is none. The first call of a process may take half a second."""
    name, library = _NAMES.get(dtype), _library()
    if name is None or library is None:
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = (ctypes.c_void_p, *[ctypes.c_int64] * 3), None

    def apply(addresses: Addresses, start: int, stop: int) -> None:
        function(addresses, len(addresses), start, stop)

    return apply


def addresses_of(addresses: Sequence[int]) -> Addresses:
    """Make what a kernel takes."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("numpy sums in shared memory, without the kernel in C: %s", error)
        return None


def _built() -> Path:
    """Return the compiled kernel, made now if there is none. Raises OSError or SubprocessError when it cannot be."""
    if os.environ.get("LEPTON_RAY_KERNEL") == "0":
        raise OSError("LEPTON_RAY_KERNEL=0")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lepton_ray"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OSError(f"others can write {folder}, and what lies there would be run")
    text = "\n".join([platform.machine(), _processor(), *_FLAGS, _SOURCE.read_text()])
    built = folder / f"kernel-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles, those that start with it wait
        if not built.exists():
            _compile(built)
    return built


def _processor() -> str:
    """Return what the processor can do: machines that share a cache folder may differ in that."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(target: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler")
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / target.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        made.replace(target)  # so that nobody ever loads half of it
