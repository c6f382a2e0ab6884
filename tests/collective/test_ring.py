"""The ring over real sockets, and what a group in shared memory does alike. Ranks are threads where that is honest,
processes where they must die or freeze."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from lepton_ray.collective import ring as ring_module
from lepton_ray.collective import row as row_module
from lepton_ray.collective import shm
from lepton_ray.collective.calls import MAX, MIN, PRODUCT, SUM, Array
from lepton_ray.collective.group import Group
from lepton_ray.collective.ring import Ring
from lepton_ray.errors import ConfigError, LeptonError, PeerLost, WaitTimeout
from lepton_ray.plan.ring import chunk_bounds

SECRET = b"of this group"
LARGE = 3_001  # elements: several pieces per chunk, and chunks of different sizes
HUGE = 300_001  # more than a socket takes at once
REFERENCE: dict[str, Callable[[Array], Array]] = {
    "sum": lambda rows: np.add.reduce(rows, 0, dtype=rows.dtype),
    "product": lambda rows: np.multiply.reduce(rows, 0, dtype=rows.dtype),
    "min": lambda rows: np.minimum.reduce(rows, 0),
    "max": lambda rows: np.maximum.reduce(rows, 0),
}


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Cut and go round the ring at a hundredth of the usual sizes: the same ways, with less to carry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_module, "_PIECE_BYTES", 4096)
        patch.setattr(ring_module, "_DIRECT_BYTES", 256)
        patch.setattr(shm, "SMALL_BYTES", 128)
        patch.setattr(shm, "COPY_BYTES", 256)
        patch.setattr(shm, "_BLOCK_BYTES", 4096)
        yield


class Meeting:
    """Rendezvous of threads; `on_complete` runs once all addresses are known and before anybody goes on."""

    def __init__(self, world: int, on_complete: Callable[[list[bytes]], object] | None = None) -> None:
        self.addresses = [b""] * world
        complete = None if on_complete is None else lambda: on_complete(self.addresses)
        self._barrier = threading.Barrier(world, complete, timeout=10)

    def of(self, rank: int) -> Callable[[bytes], Sequence[bytes]]:
        def exchange(address: bytes) -> Sequence[bytes]:
            self.addresses[rank] = address
            self._barrier.wait()
            return self.addresses

        return exchange


def play(rings: Sequence[Ring], act: Callable[[Ring], Any]) -> list[Any]:
    """Run `act` for all ranks at once; return results and, in their place, what was raised."""

    def guarded(ring: Ring) -> Any:
        try:
            return act(ring)
        except LeptonError as error:
            return error

    with ThreadPoolExecutor(len(rings)) as pool:
        return list(pool.map(guarded, rings))


@contextmanager
def group(world: int, timeout_s: float = 10, kind: type[Ring] = Ring) -> Iterator[list[Ring]]:
    meeting = Meeting(world)
    with ExitStack() as stack:
        rings = [stack.enter_context(closing(kind(rank, world, secret=SECRET))) for rank in range(world)]
        assert play(rings, lambda ring: ring.form(meeting.of(ring.rank))) == [None] * world
        for ring in rings:
            ring.limit(timeout_s)
        yield rings


@pytest.fixture(scope="module", params=[Ring, Group])
def kind(request: pytest.FixtureRequest) -> type[Ring]:
    found: type[Ring] = request.param
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def rings(request: pytest.FixtureRequest, kind: type[Ring]) -> Iterator[list[Ring]]:
    with group(request.param, kind=kind) as made:
        yield made


def inputs(world: int, count: int, dtype: str) -> Array:
    random = np.random.default_rng(count)
    values = random.integers(0, 4, (world, count)) if dtype != "bool" else random.integers(0, 2, (world, count))
    if dtype.startswith(("float", "complex")):
        return (values + 0.5 + random.random((world, count))).astype(dtype)
    return values.astype(dtype)


@pytest.mark.parametrize("rings", [2, 3, 4], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool"])
def test_allreduce_equals_numpy_with_the_same_bits_everywhere(rings: list[Ring], dtype: str) -> None:
    cases = [(op, inputs(len(rings), count, dtype)) for op in (SUM, PRODUCT, MIN, MAX) for count in (0, 1, 7, LARGE)]
    outputs = [rows.copy() for _, rows in cases]

    def act(ring: Ring) -> None:
        for (op, _), output in zip(cases, outputs):
            ring.allreduce(output[ring.rank], op)

    assert play(rings, act) == [None] * len(rings)
    tolerance = {"float16": 1e-2, "float32": 1e-5}.get(dtype, 1e-12)
    for (op, rows), output in zip(cases, outputs):
        expected = REFERENCE[op.name](rows)
        np.testing.assert_allclose(output[0].astype("float64"), expected.astype("float64"), rtol=tolerance)
        assert {row.tobytes() for row in output} == {output[0].tobytes()}


@pytest.mark.parametrize("count", [5, LARGE])
def test_all_ranks_agree_on_the_bits_of_what_has_no_order(rings: list[Ring], count: int) -> None:
    """Rounding, signed zeros and NaN payloads depend on the order of operands."""
    random = np.random.default_rng(1)
    for op in (SUM, MAX):
        rows = random.standard_normal((len(rings), count)) * 10.0 ** random.integers(-20, 20, (len(rings), count))
        rows[:, ::5] = np.where(random.random(rows[:, ::5].shape) < 0.5, 0.0, -0.0)
        for rank, row in enumerate(rows):
            row[1::5] = np.array([0x7FF8000000000000 + rank], np.uint64).view(np.float64)
        play(rings, lambda ring, rows=rows, op=op: ring.allreduce(rows[ring.rank], op))
        assert {row.tobytes() for row in rows} == {rows[0].tobytes()}


@pytest.mark.parametrize("count", [0, 1, 9, LARGE, HUGE])
def test_every_operation_equals_numpy(rings: list[Ring], count: int) -> None:
    world = len(rings)
    rows = inputs(world, count, "float64")
    bounds = chunk_bounds(count, world)

    def act(ring: Ring) -> None:
        own = rows[ring.rank].copy()
        ring.barrier()
        work = own.copy()
        ring.allreduce(work)
        np.testing.assert_allclose(work, rows.sum(0))
        np.testing.assert_array_equal(ring.allgather(own), rows)
        part = ring.reducescatter(own.copy(), SUM)
        np.testing.assert_allclose(part, rows.sum(0)[bounds[ring.rank] : bounds[ring.rank + 1]])
        for root in range(world):
            work = own.copy()
            ring.broadcast(work, root)
            np.testing.assert_array_equal(work, rows[root])
            work = own.copy()
            ring.reduce(work, root, MAX)
            np.testing.assert_array_equal(work, rows.max(0) if ring.rank == root else own)
        for source in range(world):
            for to in set(range(world)) - {source}:
                if ring.rank == source:
                    ring.send(own, to)
                elif ring.rank == to:
                    work = np.empty_like(own)
                    ring.recv(work, source)
                    np.testing.assert_array_equal(work, rows[source])

    assert play(rings, act) == [None] * world


def test_ranks_may_run_ahead_of_each_other() -> None:
    with group(3) as rings:
        results = [np.zeros(50) for _ in rings]

        def act(ring: Ring) -> None:
            for index in range(50):
                value = np.full(4, float(index * (ring.rank + 1)))
                if index % 3 == 0:
                    ring.broadcast(value, 0)  # its root does not wait for anybody
                else:
                    ring.allreduce(value)
                results[ring.rank][index] = value[-1]

        assert play(rings, act) == [None] * 3
        assert all((result == [i if i % 3 == 0 else 6 * i for i in range(50)]).all() for result in results)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda ring: ring.allreduce(np.zeros(4)), lambda ring: ring.allreduce(np.zeros(5))),
        (lambda ring: ring.allreduce(np.zeros(4)), lambda ring: ring.allreduce(np.zeros(4, np.int64))),
        (lambda ring: ring.allreduce(np.zeros(4)), lambda ring: ring.allreduce(np.zeros(4), MAX)),
        (lambda ring: ring.allreduce(np.zeros(4)), lambda ring: ring.allreduce(np.zeros(LARGE))),
        (lambda ring: ring.allreduce(np.zeros(LARGE)), lambda ring: ring.allreduce(np.zeros(LARGE + 1))),
        (lambda ring: ring.allreduce(np.zeros(4)), lambda ring: ring.barrier()),
        (lambda ring: ring.allgather(np.zeros(4)), lambda ring: ring.allreduce(np.zeros(4))),
    ],
    ids=["count", "dtype", "reduction", "small-large", "large", "call", "order"],
)
@pytest.mark.parametrize("world", [2, 3])
def test_different_calls_are_named_instead_of_mixed(
    world: int, first: Callable[[Ring], Any], second: Callable[[Ring], Any], kind: type[Ring]
) -> None:
    with group(world, kind=kind) as rings:
        errors = play(rings, lambda ring: first(ring) if ring.rank else second(ring))
        assert all(isinstance(error, (ConfigError, PeerLost)) for error in errors)
        assert any("must make the same calls in the same order" in str(error) for error in errors)


@pytest.mark.parametrize(
    "bad",
    [np.zeros((2, 2)), np.zeros(8)[::2], np.zeros(3, ">f8"), np.array([None])],
    ids=["2d", "stride", "endian", "object"],
)
def test_an_array_that_cannot_travel_is_refused_and_the_group_lives_on(bad: Array, kind: type[Ring]) -> None:
    with group(2, kind=kind) as rings:
        with pytest.raises(ConfigError, match="ascontiguousarray"):
            rings[0].allreduce(bad)
        assert play(rings, lambda ring: ring.barrier()) == [None, None]


@pytest.mark.parametrize("count", [8, 4_000_000])
def test_abort_from_another_thread_wakes_all_ranks_at_once(count: int, kind: type[Ring]) -> None:
    with group(4, timeout_s=30, kind=kind) as rings:

        def abort_once_all_wait() -> None:
            while not all(ring._operating.locked() for ring in rings[1:]):
                time.sleep(0.001)
            aborted_s.append(time.monotonic())
            rings[2].abort("the controller said so")

        aborted_s: list[float] = []
        thread = threading.Thread(target=abort_once_all_wait)
        thread.start()
        # Rank 0 never joins, so the three others wait until rank 2 is told to stop.
        errors = play(rings[1:], lambda ring: ring.allreduce(np.zeros(count)))
        assert time.monotonic() - aborted_s[0] < 5
        thread.join()
        assert [type(error) for error in errors] == [PeerLost] * 3
        assert "the controller said so" in str(errors[1])
        with pytest.raises(PeerLost, match="the controller said so"):
            rings[2].barrier()


def test_a_failure_far_away_unwinds_every_rank(kind: type[Ring]) -> None:
    with group(4, timeout_s=30, kind=kind) as rings:
        rings[0].close()
        began_s = time.monotonic()
        errors = play(rings[1:], lambda ring: ring.allreduce(np.zeros(LARGE)))
        assert time.monotonic() - began_s < 5
        assert [type(error) for error in errors] == [PeerLost] * 3


def test_a_rank_that_leaves_does_not_break_what_it_has_finished() -> None:
    with group(3, timeout_s=10) as rings:
        first = np.arange(LARGE, dtype=np.float64)
        copies = [first, np.zeros(LARGE), np.zeros(LARGE)]

        def act(ring: Ring) -> None:
            if ring.rank == 1:  # between root and rank 2, which waits while rank 0 has left already
                has_left.wait(10)
            ring.broadcast(copies[ring.rank], 0)
            if ring.rank == 0:
                ring.close()
                has_left.set()

        has_left = threading.Event()
        assert play(rings, act) == [None] * 3
        assert all((copy == first).all() for copy in copies)
        with pytest.raises(PeerLost, match="rank 0 has left the group"):
            rings[1].barrier()


def test_a_silent_peer_is_named_when_the_time_is_up() -> None:
    for count in (8, 4_000_000):
        with group(2, timeout_s=0.2) as rings, pytest.raises(WaitTimeout) as raised:
            rings[1].allreduce(np.zeros(count))
        assert str(raised.value) == "allreduce #1 on rank 1 of 2: nothing moved to or from rank 0 for 0.2 s"


def connect(address: bytes) -> socket.socket:
    host, port = address.decode().rsplit("|", 1)
    return socket.create_connection((host, int(port)), timeout=5)


def test_strangers_do_not_disturb_the_rendezvous() -> None:
    strangers: list[socket.socket] = []

    def intrude(addresses: list[bytes]) -> None:
        for said in (
            b"",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 9,
            b"lepton1\n" + bytes(3),
            b"lepton1\n\x01" + bytes(99),
        ):
            for address in addresses[:2]:
                strangers.append(connect(address))
                strangers[-1].sendall(said)
        strangers.extend(connect(addresses[0]) for _ in range(60))

    meeting = Meeting(3, intrude)
    rings = [Ring(rank, 3, secret=SECRET, timeout_s=10) for rank in range(3)]
    assert play(rings, lambda ring: ring.form(meeting.of(ring.rank))) == [None] * 3
    assert play(rings, lambda ring: ring.barrier()) == [None] * 3
    for each in [*rings, *strangers]:
        each.close()


def test_a_peer_with_another_secret_is_turned_down() -> None:
    meeting = Meeting(2)
    rings = [Ring(rank, 2, secret=SECRET + bytes([rank]), timeout_s=0.5) for rank in range(2)]
    errors = play(rings, lambda ring: ring.form(meeting.of(ring.rank)))
    assert "rank(s) [1]" in str(errors[0])
    assert "is not rank 0 of this group" in str(errors[1])


def test_a_formation_that_waits_can_be_aborted() -> None:
    meeting = Meeting(2)
    rings = [Ring(rank, 2, secret=SECRET, timeout_s=30) for rank in range(2)]

    def act(ring: Ring) -> None:
        if ring.rank == 0:
            ring.form(meeting.of(0))
        else:
            meeting.of(1)(b"nowhere")  # shows up and dies before it connects
            rings[0].abort("rank 1 died")

    errors = play(rings, act)
    assert isinstance(errors[0], PeerLost)
    assert "rank 1 died" in str(errors[0])


def _churn(pipe: Connection) -> None:
    """Form and end groups; report open descriptors and threads before and after."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    counts = []
    for index in range(51):
        with group(2, kind=Group if index % 3 else Ring) as rings:
            if index % 2:
                rings[0].abort()
            else:
                value = np.ones((2, 3))
                play(rings, lambda ring, value=value: ring.allreduce(value[ring.rank]))
                assert (value == 2).all()
        counts.append(count())
    pipe.send((counts[0], counts[-1]))


def test_a_new_group_forms_after_a_failure_and_nothing_leaks() -> None:
    """In a process of its own, where nobody else opens anything."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_churn, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(30)
    before, after = ours.recv()
    process.join()
    assert before == after


def test_importing_the_package_loads_neither_ray_nor_torch() -> None:
    code = "import sys, lepton_ray.collective, lepton_ray.collective.ring; print({'ray', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- ranks that die or freeze


def _member(rank: int, world: int, pipe: Connection, timeout_s: float) -> None:
    """Sum for ever; report what ended it."""
    ring = Ring(rank, world, secret=SECRET)

    def exchange(address: bytes) -> Sequence[bytes]:
        pipe.send(address)
        addresses: Sequence[bytes] = pipe.recv()
        return addresses

    ring.form(exchange)
    ring.limit(timeout_s)
    array = np.ones(1_000_000, np.float32)
    ring.allreduce(array)
    pipe.send("summing")
    try:
        while True:
            ring.allreduce(array)
    except LeptonError as error:
        pipe.send((type(error).__name__, str(error), time.monotonic()))


@contextmanager
def members(world: int, timeout_s: float) -> Iterator[tuple[list[Any], list[Connection]]]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    processes = [
        context.Process(target=_member, args=(rank, world, pipes[rank][1], timeout_s), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    ours = [pipe[0] for pipe in pipes]
    addresses = [pipe.recv() for pipe in ours]
    for pipe in ours:
        pipe.send(addresses)
    assert [pipe.recv() for pipe in ours] == ["summing"] * world
    try:
        yield processes, ours
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        for pair in pipes:
            for pipe in pair:
                pipe.close()


def test_all_survivors_of_a_killed_rank_notice_within_a_second() -> None:
    with members(4, timeout_s=30) as (processes, pipes):
        killed_s = time.monotonic()
        os.kill(processes[1].pid, signal.SIGKILL)
        for rank in (0, 2, 3):
            assert pipes[rank].poll(10)
            name, _, noticed_s = pipes[rank].recv()
            assert name == "PeerLost"
            assert noticed_s - killed_s < 1


def test_a_frozen_rank_ends_the_group_by_time() -> None:
    with members(2, timeout_s=0.5) as (processes, pipes):
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert pipes[0].poll(10)
        name, message, _ = pipes[0].recv()
        assert name == "WaitTimeout"
        assert "rank 1 for 0.5 s" in message
