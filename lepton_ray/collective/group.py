"""A group of processes that takes the fastest way between them that works: shared memory on one node, else TCP.

The choice is probed, not configured, and all ranks make the same one: each tries to open what every other offers, and
says over TCP whether it could, also when it could not. TCP connections stay for messages between two ranks, and as a
second witness of anybody's death.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import threading
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lepton_ray.collective import memory, shm
from lepton_ray.collective.calls import (
    ALLGATHER,
    ALLREDUCE,
    BARRIER,
    BROADCAST,
    REDUCE,
    REDUCE_SCATTER,
    SUM,
    Array,
    Reduction,
)
from lepton_ray.collective.memory import Segment
from lepton_ray.collective.mesh import Exchange
from lepton_ray.collective.ring import Ring
from lepton_ray.collective.shm import SharedMemory
from lepton_ray.plan.ring import chunk_bounds

log = logging.getLogger(__name__)

_OFFER = struct.Struct("<16sqqq16sq")
_OPENED, _READ = 1, 2


class _Offer(NamedTuple):
    """What a rank shows of itself."""

    boot: bytes
    pid: int
    descriptor: int
    inode: int
    """Of its segment; 0 when it has none."""
    proof: bytes
    """A random number. The segment holds it, and so does the private memory of the process."""
    address: int
    """Of the latter."""


class Group(Ring):
    """A `Ring` that goes through shared memory where all ranks can reach each other's."""

    _shared: SharedMemory | None = None

    def form(self, exchange: Exchange) -> None:
        super().form(exchange)
        if self.world > 1:
            try:
                self._probe()
                self._calls = 0  # those of the user are counted
            except BaseException as error:
                self._mesh.end(f"the group could not be formed: {error}")
                self._mesh.release()
                raise

    @property
    def transport(self) -> str:
        """Say how arrays travel: "shared memory", "tcp", or "none" in a group of one."""
        return "none" if self.world == 1 else "tcp" if self._shared is None else "shared memory"

    def limit(self, timeout_s: float) -> None:
        """Change how long operations wait without progress. Not while one runs."""
        self.timeout_s = timeout_s
        if self._shared is not None:
            self._shared.board.timeout_s = timeout_s

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """Make an array, in the group's memory where it has one. Its values are undefined.

        Arrays in the group's memory are reduced in place, without a copy. When the group has failed, a rank that does
        not know it yet may still write into them: make new ones in the next group.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        if self._shared is None:
            return np.empty(shape, dtype)
        return self._shared.holdings.empty(prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def allreduce(self, array: Array, op: Reduction = SUM) -> None:
        if self._shared is None:
            super().allreduce(array, op)
            return
        with self._operation(ALLREDUCE, array, op=op) as header:
            self._shared.allreduce(header, array, op)

    def allgather(self, array: Array) -> Array:
        if self._shared is None:
            return super().allgather(array)
        with self._operation(ALLGATHER, array) as header:
            return self._shared.allgather(header, array)

    def reducescatter(self, array: Array, op: Reduction = SUM) -> Array:
        if self._shared is None:
            return super().reducescatter(array, op)
        bounds = chunk_bounds(array.size, self.world)
        with self._operation(REDUCE_SCATTER, array, op=op) as header:
            self._shared.reducescatter(header, array, bounds, op)
        return array[bounds[self.rank] : bounds[self.rank + 1]]

    def broadcast(self, array: Array, root: int = 0) -> None:
        if self._shared is None:
            super().broadcast(array, root)
            return
        with self._operation(BROADCAST, array, root=root) as header:
            self._shared.broadcast(header, array, root)

    def reduce(self, array: Array, root: int = 0, op: Reduction = SUM) -> None:
        if self._shared is None:
            super().reduce(array, root, op)
            return
        with self._operation(REDUCE, array, root=root, op=op) as header:
            self._shared.reduce(header, array, root, op)

    def barrier(self) -> None:
        if self._shared is None:
            super().barrier()
            return
        nothing = np.empty(0, np.uint8)
        with self._operation(BARRIER, nothing) as header:
            self._shared.barrier(header)

    def _say_goodbye(self) -> None:
        if self._shared is not None:
            self._shared.board.leave()
        super()._say_goodbye()

    # --- formation

    def _probe(self) -> None:
        """Agree with all ranks whether shared memory is used. Every rank goes through both exchanges, come what may."""
        proof = np.frombuffer(secrets.token_bytes(16), np.uint8)
        own, why = _create()
        segments: dict[int, Segment] = {}
        pidfds: dict[int, int] = {}
        try:
            if own is not None:
                own.data[shm.PROOF_AT : shm.PROOF_AT + proof.size] = proof
                segments[self.rank] = own
            offers = self._exchange_offers(own, proof)
            if own is not None:
                why = self._open_all(offers, segments, pidfds)
            why_not_read = _try_reading([offer for rank, offer in enumerate(offers) if rank != self.rank])
            said = (_OPENED if why is None else 0) | (_READ if why_not_read is None else 0)
            answers = super().allgather(np.array([said], np.uint8))
            if not all(answers & _OPENED):
                if len({offer.boot for offer in offers}) == 1:
                    _say_once("shared memory", why or "another rank could not use it", "TCP")
                return
            can_read = bool(all(answers & _READ))
            if not can_read:
                _say_once("process_vm_readv", why_not_read or "another rank was refused", "copies in shared memory")
            shared = SharedMemory(
                self.rank,
                [segments[rank] for rank in range(self.world)],
                [offer.pid for offer in offers],
                pidfds,
                can_read=can_read,
                timeout_s=self.timeout_s,
                watch=self._mesh.look,
            )
            pidfds = {}
            self._mesh.attach(shared.board.end, shared.release)
            self._shared = shared
        finally:
            if own is not None:
                os.close(own.descriptor)  # whoever was to open it has done so
            for pidfd in pidfds.values():
                os.close(pidfd)

    def _exchange_offers(self, own: Segment | None, proof: NDArray[np.uint8]) -> list[_Offer]:
        address = proof.__array_interface__["data"][0]
        place = (0, 0) if own is None else (own.descriptor, own.inode)
        offer = _OFFER.pack(_boot(), os.getpid(), *place, proof.tobytes(), address)
        rows = super().allgather(np.frombuffer(offer, np.uint8))
        return [_Offer(*_OFFER.unpack(row.tobytes())) for row in rows]

    def _open_all(self, offers: Sequence[_Offer], segments: dict[int, Segment], pidfds: dict[int, int]) -> str | None:
        """Open what the peers offer; say what did not work."""
        for rank, offer in enumerate(offers):
            if rank == self.rank:
                continue
            if not offer.inode:
                return f"rank {rank} has none to share"
            try:
                # First the process, then its segment, which shows that the process is the one that made the offer.
                pidfds[rank] = os.pidfd_open(offer.pid)
                segments[rank] = Segment.attach(offer.pid, offer.descriptor, offer.inode)
            except OSError as error:
                return f"that of rank {rank} cannot be opened ({error})"
            if segments[rank].data[shm.PROOF_AT :][: len(offer.proof)].tobytes() != offer.proof:
                return f"that of rank {rank} is not the one that was offered"
        return None


@cache
def _boot() -> bytes:
    """Tell this start of this machine from all others."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", ""))
    except (OSError, ValueError):
        return secrets.token_bytes(16)


def _create() -> tuple[Segment | None, str | None]:
    """Make the own segment, or say why there is none."""
    lacking = memory.missing()
    if lacking is not None:
        return None, f"this is {lacking}"
    try:
        return Segment.create(shm.SEGMENT_BYTES), None
    except OSError as error:
        return None, f"it cannot be made ({error})"


def _try_reading(offers: Sequence[_Offer]) -> str | None:
    """Read a few bytes of every peer's private memory; say why that is not possible."""
    found = np.empty(16, np.uint8)
    for offer in offers:
        try:
            memory.read_process(offer.pid, offer.address, found)
        except OSError as error:
            return f"refused ({error.strerror}; see ptrace(2), and /proc/sys/kernel/yama/ptrace_scope)"
        if found.tobytes() != offer.proof:
            return "another process answers"
    return None


_saying = threading.Lock()  # a cache alone lets two threads in that come at the same time


def _say_once(way: str, why: str, instead: str) -> None:
    with _saying:
        _say(way, why, instead)


@cache
def _say(way: str, why: str, instead: str) -> None:
    log.warning("a group of this process does without %s: %s. It uses %s, which is slower.", way, why, instead)
