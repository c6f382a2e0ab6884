"""Encrypted connections: what they carry arrives, cannot be read on the way, and comes from nobody else."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lepton_ray.collective.calls import MAX
from lepton_ray.collective.group import Group
from lepton_ray.collective.post import Post
from lepton_ray.collective.ring import Ring
from lepton_ray.collective.tls import make_identity
from lepton_ray.errors import LeptonError, PeerLost

SECRET = b"of this group"
MARK = b"nobody else may read this"
LIMIT_S = 10.0


@pytest.fixture(scope="module")
def identity() -> bytes:
    return make_identity()


class Meeting:
    """Rendezvous of threads. relay: what stands between rank 0 and those who connect to it."""

    def __init__(self, world: int, relay: Callable[[bytes], bytes] = bytes) -> None:
        self._addresses, self._relay = [b""] * world, relay
        self._barrier = threading.Barrier(world)

    def of(self, rank: int) -> Callable[[bytes], Sequence[bytes]]:
        def exchange(address: bytes) -> Sequence[bytes]:
            self._addresses[rank] = self._relay(address) if rank == 0 else address
            self._barrier.wait(LIMIT_S)
            return self._addresses

        return exchange


def together(those: Sequence[Any], act: Callable[[Any], Any]) -> list[Any]:
    """Let all act at once; return what each returned or raised."""

    def attempt(each: Any) -> Any:
        try:
            return act(each)
        except LeptonError as error:
            return error

    with ThreadPoolExecutor(len(those)) as pool:
        return list(pool.map(attempt, those))


def ring_of(rank: int, world: int, identity: bytes | None, timeout_s: float = LIMIT_S) -> Ring:
    return Ring(rank, world, secret=SECRET, timeout_s=timeout_s, identity=identity)


@contextmanager
def joined(those: Sequence[Any], relay: Callable[[bytes], bytes] = bytes) -> Iterator[Sequence[Any]]:
    meeting = Meeting(len(those), relay)
    try:
        assert together(those, lambda each: each.form(meeting.of(each.rank))) == [None] * len(those)
        yield those
    finally:
        for each in those:
            each.close()


def use(ring: Ring) -> None:
    """Check operations of all sizes, whose bytes come in records of other sizes."""
    for count in (0, 1, 5, 3_001, 300_001):
        rows = np.arange(ring.world * count, dtype=np.float32).reshape(ring.world, count) % 97
        own = rows[ring.rank]
        ring.allreduce(total := own.copy())
        np.testing.assert_array_equal(total, rows.sum(0))
        np.testing.assert_array_equal(ring.allgather(own), rows)
        ring.broadcast(copy := own.copy(), 1)
        np.testing.assert_array_equal(copy, rows[1])
        ring.reduce(most := own.copy(), 0, MAX)
        np.testing.assert_array_equal(most, rows.max(0) if ring.rank == 0 else own)
        if ring.rank == 0:
            ring.send(own, 1)
            ring.send(own[:2], 1)
        elif ring.rank == 1:
            ring.recv(received := np.empty_like(own), 0)
            np.testing.assert_array_equal(received, rows[0])
            ring.recv(np.empty_like(own[:2]), 0)
        ring.barrier()


@pytest.mark.parametrize("world", [2, 3])
def test_operations_are_what_they_are_without(identity: bytes, world: int) -> None:
    with joined([ring_of(rank, world, identity) for rank in range(world)]) as rings:
        assert together(rings, use) == [None] * world


def test_ranks_on_several_nodes(identity: bytes) -> None:
    groups = [Group(rank, 3, secret=SECRET, identity=identity, node="abc"[rank]) for rank in range(3)]
    with joined(groups):
        assert together(groups, use) == [None] * 3
        assert {group.transport for group in groups} == {"tcp"}


class Relay:
    """Stands between two ranks, and keeps what it passes on."""

    def __init__(self) -> None:
        self.heard = bytearray()

    def __call__(self, address: bytes) -> bytes:
        host, port = address.decode().rsplit("|", 1)
        listener = socket.create_server((host, 0))
        threading.Thread(target=self._serve, args=(listener, (host, int(port))), daemon=True).start()
        return f"{host}|{listener.getsockname()[1]}".encode()

    def _serve(self, listener: socket.socket, target: tuple[str, int]) -> None:
        with listener:
            inner, outer = listener.accept()[0], socket.create_connection(target)
        for source, sink in ((inner, outer), (outer, inner)):
            threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.heard += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # they have ended it


@pytest.mark.parametrize("is_sealed", [True, False])
def test_nobody_on_the_way_can_read_it(identity: bytes, is_sealed: bool) -> None:
    relay = Relay()
    with joined([ring_of(rank, 2, identity if is_sealed else None) for rank in range(2)], relay) as rings:
        data = np.frombuffer(MARK * 100, np.uint8).copy()
        assert together(rings, lambda ring: ring.broadcast(data.copy())) == [None] * 2
    assert len(relay.heard) > data.nbytes
    assert (MARK in relay.heard) is not is_sealed


@pytest.mark.parametrize("wrong", ["other", "none"])
def test_who_knows_the_secret_only_is_refused(identity: bytes, wrong: str) -> None:
    rings = [ring_of(0, 2, identity, 1), ring_of(1, 2, make_identity() if wrong == "other" else None, 1)]
    meeting = Meeting(2)

    def form_and_sum(ring: Ring) -> None:
        ring.form(meeting.of(ring.rank))
        ring.allreduce(np.ones(3))

    errors = together(rings, form_and_sum)
    assert all(isinstance(error, LeptonError) for error in errors), errors
    for ring in rings:
        ring.close()


@pytest.mark.parametrize("count", [8, 3_000_000])
def test_a_rank_that_goes_is_missed_at_once(identity: bytes, count: int) -> None:
    with joined([ring_of(rank, 3, identity) for rank in range(3)]) as rings, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ring.allreduce, np.ones(count)) for ring in rings[1:]]
        time.sleep(0.05)  # anywhere in it
        gone_s = time.monotonic()
        rings[0].abort("told so")
        for each in waiting:
            assert isinstance(each.exception(LIMIT_S), PeerLost)
        assert time.monotonic() - gone_s < 1


def test_messages_by_tag(identity: bytes) -> None:
    posts = [
        Post(rank, 2, secret=SECRET, timeout_s=LIMIT_S, host="127.0.0.1", on_failure=str, identity=identity)
        for rank in range(2)
    ]
    sizes = [1, 70_000, 3, 900_000, 0, 17]

    def play(post: Post) -> list[bytes]:
        ended: list[threading.Event] = []
        views = []
        for tag, size in enumerate(sizes) if post.rank == 0 else reversed(list(enumerate(sizes))):
            view = memoryview(bytearray([tag + 1]) * size if post.rank == 0 else bytearray(size))
            ended.append(done := threading.Event())
            act = post.send if post.rank == 0 else post.receive
            act(view, 1 - post.rank, tag, lambda error, peer, done=done: done.set())
            views.append(view)
        assert all(done.wait(LIMIT_S) for done in ended)
        return [bytes(view) for view in views]

    with joined(posts):
        sent, received = together(posts, play)
    assert received[::-1] == sent


def test_without_the_package_it_is_refused_by_name() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from lepton_ray.collective.tls import make_identity\n"
        "from lepton_ray.errors import ConfigError\n"
        "try: make_identity()\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "lepton-ray[tls]" in done.stdout
