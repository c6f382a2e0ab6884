"""Memory that processes of one machine share, and the system calls that go with it. Knows nothing of groups.

A segment has no name: it is a memfd, which a peer of the same user opens through /proc/<pid>/fd/<fd>. So nothing is
left behind whoever dies, and the size of /dev/shm is no limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# futex, membarrier. Other machines have other numbers, and go without shared memory.
_CALL_NUMBERS = {"x86_64": (202, 324), "aarch64": (98, 283)}
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_MEMBARRIER_GLOBAL_EXPEDITED = 2

# x86-64 keeps the order of stores and the order of loads (TSO; string copies past the cache end with a fence of their
# own), so whoever sees a counter sees the data stored before it. AArch64 keeps neither: a barrier goes between.
IS_ORDERED = platform.machine() == "x86_64"


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Span(ctypes.Structure):
    _fields_ = [("address", ctypes.c_size_t), ("size_bytes", ctypes.c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)
_futex = ctypes.CDLL(None).syscall  # a library object of its own: each has its own idea of the arguments
_futex.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
]
_futex.restype = ctypes.c_long


def address_of(array: NDArray[Any]) -> int:
    """Return where the memory of an array begins."""
    try:  # half the time of the other way, which is half the time of a small sum
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # an array that is read-only, or empty
        address: int = array.__array_interface__["data"][0]
        return address


def missing() -> str | None:
    """Say what this system lacks for shared memory between processes; None when it lacks nothing."""
    if platform.machine() not in _CALL_NUMBERS:
        return f"a machine of type {platform.machine()}"
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return "a system without memfd and pidfd"
    if not IS_ORDERED and _membarrier() != 0:
        return "a system that refuses membarrier"
    return None


def sleep_while(address: int, value: int, limit_s: float) -> None:
    """Sleep while the 4 bytes at `address` (in any process that shares them) are `value`; it may end early."""
    limit = _Timespec(int(limit_s), int(limit_s % 1 * 1e9))
    _futex(_CALL_NUMBERS[platform.machine()][0], address, _FUTEX_WAIT, value, ctypes.addressof(limit), None, 0)


def wake(address: int) -> None:
    """Wake all who sleep at `address`."""
    _futex(_CALL_NUMBERS[platform.machine()][0], address, _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def offer_core() -> None:
    """Let other threads and processes run, if any wants to. Gives up the GIL, as `os.sched_yield` does not."""
    _libc.sched_yield()


def order() -> None:
    """Let no memory access of this thread pass this point, in either direction, as other processes see it."""
    _membarrier()


def _membarrier() -> int:
    # The kernel promises it for the calling thread too, and meets nobody else: no process of ours registers.
    return int(_libc.syscall(_CALL_NUMBERS[platform.machine()][1], _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0))


def read_process(pid: int, address: int, target: NDArray[np.uint8]) -> None:
    """Copy the memory of another process at `address` into `target`. Raises OSError."""
    own, size_bytes = address_of(target), target.nbytes
    done = 0
    while done < size_bytes:
        here, there = _Span(own + done, size_bytes - done), _Span(address + done, size_bytes - done)
        count = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        done += count


if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _libc.process_vm_readv.restype = ctypes.c_ssize_t


def copy(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Copy as bytes: numpy copies dtypes of its users field by field."""
    if target.size:  # numpy refuses even to write nothing into a read-only array
        target.view(np.uint8)[:] = source.view(np.uint8)


class _Map(mmap.mmap):
    """Mapped memory, which dies with the last array over it."""

    at_end: Callable[[], None] | None = None
    """Called before the memory is given back: something else may lie there right after."""

    def __del__(self) -> None:
        if self.at_end is not None:
            self.at_end()


class Segment:
    """A piece of memory that this process shares. Lives as long as somebody holds its `data`, or a view of it.

    Made by `create`, found by others with `attach(pid, descriptor, inode)`.
    """

    __slots__ = ("__weakref__", "address", "data", "descriptor", "inode", "map")

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.map = _Map(descriptor, size_bytes)
        self.descriptor, self.inode = descriptor, os.fstat(descriptor).st_ino
        self.data: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
        self.address = address_of(self.data)

    @classmethod
    def create(cls, size_bytes: int) -> Segment:
        """Make a segment of zeros, whole pages. Its `descriptor` stays open for others until it is closed."""
        descriptor = os.memfd_create("lepton_ray", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, -(-max(1, size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
            return cls(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, pid: int, descriptor: int, inode: int) -> Segment:
        """Map the segment of another process. Raises OSError, also when it is not the one that was meant."""
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.fstat(opened).st_ino != inode:
                raise FileNotFoundError(f"/proc/{pid}/fd/{descriptor} is not the segment of the peer")
            return cls(opened, 0)
        finally:
            os.close(opened)
