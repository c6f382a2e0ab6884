"""Find out which ranks share memory, by trying it, and agree on it with all others over TCP.

Each rank tries to open what every other offers, and says whether it could, also when it could not. Those that reach
each other are a node. Names of machines say nothing about that, nor do addresses: containers may have either in common
without sharing memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import struct
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lepton_ray.collective import memory, shm
from lepton_ray.collective.calls import Array
from lepton_ray.collective.memory import Segment
from lepton_ray.collective.shm import SharedMemory
from lepton_ray.plan.transport import join

log = logging.getLogger(__name__)

_OFFER = struct.Struct("<16sqqq16sq")
_OPENED, _READ = 1, 2


class _Offer(NamedTuple):
    """What a rank shows of itself."""

    machine: bytes
    pid: int
    descriptor: int
    inode: int
    """Of its segment; 0 when it has none."""
    proof: bytes
    """A random number. The segment holds it, and so does the private memory of the process."""
    address: int
    """Of the latter."""


class Found(NamedTuple):
    """Where the ranks of a group are."""

    nodes: list[list[int]]
    """Ranks that reach each other's memory."""
    shared: SharedMemory | None
    """Between those of the own node; None where there is only one."""


def probe(
    rank: int,
    node: str,
    allgather: Callable[[Array], Array],
    *,
    timeout_s: float,
    watch: Callable[[], object],
) -> Found:
    """Agree with all ranks on who shares memory. Every rank goes through both exchanges, come what may.

    node: ranks with different ones share none. timeout_s, watch: as `SharedMemory`.
    """
    proof = np.frombuffer(secrets.token_bytes(16), np.uint8)
    own, why = _create()
    pidfds: dict[int, int] = {}
    try:
        if own is not None:
            own.data[shm.PROOF_AT : shm.PROOF_AT + proof.size] = proof
        place = (0, 0) if own is None else (own.descriptor, own.inode)
        address = proof.__array_interface__["data"][0]
        offer = _OFFER.pack(_machine(node), os.getpid(), *place, proof.tobytes(), address)
        offers = [_Offer(*_OFFER.unpack(row.tobytes())) for row in allgather(np.frombuffer(offer, np.uint8))]
        segments: dict[int, Segment] = {} if own is None else {rank: own}
        said = np.zeros(len(offers), np.uint8)
        why_not_read: str | None = None
        for peer, each in enumerate(offers):
            if peer == rank:
                said[peer] = _READ if own is None else _OPENED | _READ
            elif own is not None and each.machine == offers[rank].machine:
                refused = _open(peer, each, segments, pidfds)
                unread = _try_reading(each)
                said[peer] = (_OPENED if refused is None else 0) | (_READ if unread is None else 0)
                why, why_not_read = why or refused, why_not_read or unread
        answers = allgather(said)
        nodes = join((answers & _OPENED).astype(bool).tolist())
        mine = next(each for each in nodes if rank in each)
        if any(each.machine == offers[rank].machine for peer, each in enumerate(offers) if peer not in mine):
            _say_once("shared memory", why or "another rank could not use it", "TCP")
        # On all nodes, as some operations go the same way on all of them.
        can_read = all(bool(answers[a, b] & _READ) for each in nodes for a in each for b in each)
        if len(mine) == 1:
            return Found(nodes, None)
        if not can_read:
            _say_once("process_vm_readv", why_not_read or "another rank was refused", "copies in shared memory")
        shared = SharedMemory(
            mine.index(rank),
            [segments[peer] for peer in mine],
            [offers[peer].pid for peer in mine],
            {at: pidfds.pop(peer) for at, peer in enumerate(mine) if peer != rank},
            can_read=can_read,
            timeout_s=timeout_s,
            watch=watch,
            names=mine,
        )
        return Found(nodes, shared)
    finally:
        if own is not None:
            os.close(own.descriptor)  # whoever was to open it has done so
        for pidfd in pidfds.values():
            os.close(pidfd)


def _open(peer: int, offer: _Offer, segments: dict[int, Segment], pidfds: dict[int, int]) -> str | None:
    """Open what a peer offers; say what did not work."""
    if not offer.inode:
        return f"rank {peer} has none to share"
    try:
        # First the process, then its segment, which shows that the process is the one that made the offer.
        pidfds[peer] = os.pidfd_open(offer.pid)
        segments[peer] = Segment.attach(offer.pid, offer.descriptor, offer.inode)
    except OSError as error:
        return f"that of rank {peer} cannot be opened ({error})"
    if segments[peer].data[shm.PROOF_AT :][: len(offer.proof)].tobytes() != offer.proof:
        return f"that of rank {peer} is not the one that was offered"
    return None


def _try_reading(offer: _Offer) -> str | None:
    """Read a few bytes of a peer's private memory; say why that is not possible."""
    found: NDArray[np.uint8] = np.empty(16, np.uint8)
    try:
        memory.read_process(offer.pid, offer.address, found)
    except OSError as error:
        return f"refused ({error.strerror}; see ptrace(2), and /proc/sys/kernel/yama/ptrace_scope)"
    return None if found.tobytes() == offer.proof else "another process answers"


def _machine(node: str) -> bytes:
    """Tell this start of this machine, and this node of it, from all others."""
    return hashlib.sha256(_boot() + node.encode()).digest()[:16]


@cache
def _boot() -> bytes:
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


_saying = threading.Lock()  # a cache alone lets two threads in that come at the same time


def _say_once(way: str, why: str, instead: str) -> None:
    with _saying:
        _say(way, why, instead)


@cache
def _say(way: str, why: str, instead: str) -> None:
    log.warning("a group of this process does without %s: %s. It uses %s, which is slower.", way, why, instead)
