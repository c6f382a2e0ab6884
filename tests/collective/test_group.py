"""Groups over shared memory: real processes, real memory, real deaths."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_ray.collective import memory, probe
from lepton_ray.collective.calls import MAX, MIN, PRODUCT, SUM, Array
from lepton_ray.collective.group import Group
from lepton_ray.collective.memory import Segment
from lepton_ray.errors import ConfigError, LeptonError, PeerLost, WaitTimeout
from lepton_ray.plan.ring import chunk_bounds
from tests.collective import members as there
from tests.collective.members import GROUPS, Member, array_like, form, members, repeat, together

WAYS = ["in place", "read", "staged"]
OPS = {op.name: op for op in (SUM, PRODUCT, MIN, MAX)}
DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64"]
SMALL, LARGE = 50, 100_003  # elements: copied; a few blocks
NOTICED_S = 0.5


@pytest.fixture(scope="module", params=[2, 3, 4])
def grouped(request: pytest.FixtureRequest) -> Iterator[list[Member]]:
    """Processes in a group whose sizes are small, so that small arrays take every way."""
    with members(request.param) as made:
        together(made, there.shrink)
        form(made)
        yield made


def rows_of(world: int, count: int, dtype: str) -> Array:
    """Return values whose reduction is exact, whatever the order."""
    values = np.random.default_rng(count).integers(1, 4, (world, count))
    return (values % 2 if dtype == "bool" else values).astype(dtype)


def check_all(rank_rows: Array, op: str, ways: list[str], root: int) -> None:
    """Compare every operation with numpy, on one rank."""
    group = GROUPS["group"]
    rank, world, count = group.rank, group.world, rank_rows.shape[1]
    way, own = ways[group.rank], rank_rows[group.rank]
    reduced = OPS[op].apply.reduce(rank_rows, 0, dtype=rank_rows.dtype)
    bounds = chunk_bounds(count, world)

    def fresh(*, is_written: bool = True) -> Array:
        array = array_like(group, own, way)
        array.flags.writeable = is_written
        return array

    array = fresh()
    group.allreduce(array, OPS[op])
    np.testing.assert_array_equal(array, reduced)
    np.testing.assert_array_equal(group.reducescatter(fresh(), OPS[op]), reduced[bounds[rank] : bounds[rank + 1]])
    array = fresh(is_written=rank == root)
    group.reduce(array, root, OPS[op])
    np.testing.assert_array_equal(array, reduced if rank == root else own)
    array = fresh(is_written=rank != root)
    group.broadcast(array, root)
    np.testing.assert_array_equal(array, rank_rows[root])
    array = fresh(is_written=False)
    np.testing.assert_array_equal(group.allgather(array), rank_rows)
    np.testing.assert_array_equal(array, own)
    check_lists(group, rank_rows, fresh, op)
    group.barrier()


def check_lists(group: Group, rank_rows: Array, fresh: Callable[..., Array], op: str) -> None:
    """Compare operations on a list of arrays, one for each rank, which lie anywhere, also upon each other."""
    world, rank = group.world, group.rank
    reduced = OPS[op].apply.reduce(rank_rows, 0, dtype=rank_rows.dtype)
    rows = [np.empty_like(reduced) if other % 2 else group.empty(reduced.size, reduced.dtype) for other in range(world)]
    group.allgather_into(rows, fresh(is_written=False))
    np.testing.assert_array_equal(rows, rank_rows)
    parts = [np.roll(rank_rows[rank], other) if other % 2 else fresh() for other in range(world)]
    copies = [part.copy() for part in parts]
    out = np.empty_like(reduced)
    group.reducescatter_into(out, parts, OPS[op])
    np.testing.assert_array_equal(out, np.roll(reduced, rank if rank % 2 else 0))
    np.testing.assert_array_equal(parts, copies)
    for at in (rank, (rank + 1) % world):  # in place, and where others still read
        rows[at][:] = rank_rows[rank]
        group.allgather_into(rows, rows[at])
        np.testing.assert_array_equal(rows, rank_rows)
        again = [part.copy() for part in copies]
        group.reducescatter_into(again[at], again, OPS[op])
        np.testing.assert_array_equal(again[at], out)


@given(
    count=st.integers(0, 40) | st.integers(0, 6000),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(sorted(OPS)),
    data=st.data(),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_operation_equals_numpy(
    grouped: list[Member], count: int, dtype: str, op: str, data: st.DataObject
) -> None:
    world = len(grouped)
    # Either all are alike, or some lie in the group's memory and others do not.
    mixed = st.lists(st.sampled_from(["in place", "read"]), min_size=world, max_size=world)
    ways = data.draw(st.sampled_from(WAYS).map(lambda way: [way] * world) | mixed)
    if dtype == "complex64" and op in ("min", "max"):
        op = "sum"
    together(grouped, check_all, rows_of(world, count, dtype), op, ways, data.draw(st.integers(0, world - 1)))


def sum_bits(count: int, way: str) -> bytes:
    """Sum what has no order: rounding, signed zeros and NaN payloads depend on the order of operands."""
    group = GROUPS["group"]
    random_ = np.random.default_rng(group.rank)
    own = random_.standard_normal(count) * 10.0 ** random_.integers(-20, 20, count)
    own[::5] = np.where(random_.random(own[::5].size) < 0.5, 0.0, -0.0)
    own[1::5] = np.array([0x7FF8000000000000 + group.rank], np.uint64).view(np.float64)
    array = array_like(group, own, way)
    group.allreduce(array)
    return array.tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_get_the_same_bits(grouped: list[Member], way: str) -> None:
    for count in (5, 31, 100, 3001):
        assert len(set(together(grouped, sum_bits, count, way))) == 1


def sums_of_threads(rounds: int) -> list[float]:
    """Use two groups from two threads each; operations of one group are in one order because each thread waits."""
    totals = []

    def use(name: str) -> float:
        group, total = GROUPS[name], 0.0
        for count in range(1, rounds):
            array = array_like(group, np.full(count * 7, 1.0, np.float32), WAYS[count % 2])
            group.allreduce(array)
            total += float(array.sum()) / array.size
        return total

    with ThreadPoolExecutor(2) as pool:
        totals += pool.map(use, ["group", "second"])
    return totals


def test_groups_live_side_by_side_in_threads_of_their_own(grouped: list[Member]) -> None:
    world = len(grouped)
    form(grouped[::-1], "second")
    assert together(grouped, sums_of_threads, 60) == [[59.0 * world] * 2] * world
    together(grouped, there.leave, "second")


def sums_in_turn(count: int) -> float:
    """Let several threads of a rank operate at once on one group: one after the other, all with equal calls."""
    group = GROUPS["group"]

    def use(_: int) -> float:
        array = np.ones(count)
        group.allreduce(array)
        return float(array[-1])

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(use, range(40)))


def test_one_operation_of_a_group_runs_at_a_time(grouped: list[Member]) -> None:
    assert together(grouped, sums_in_turn, 200) == [40.0 * len(grouped)] * len(grouped)


def send_around(count: int) -> None:
    group = GROUPS["group"]
    own, found = np.full(count, group.rank), np.empty(count, np.int64)
    after, before = (group.rank + 1) % group.world, (group.rank - 1) % group.world
    group.allreduce(np.ones(3))
    if group.rank == 0:
        group.send(own, after)
    group.recv(found, before)
    if group.rank:
        group.send(own, after)
    group.allreduce(np.ones(3000))
    assert (found == before).all()
    assert group.transport == "shared memory"


def test_messages_go_between_the_operations(grouped: list[Member]) -> None:
    together(grouped, send_around, 1000)


def free_and_make_again(rounds: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    group = GROUPS["group"]
    before = there.inventory()
    for count in range(rounds):
        array = group.empty(2000 + count)
        array[:] = 1
        part = array[count:]
        del array  # the view keeps its memory
        group.allreduce(part)
        assert (part == group.world).all()
        del part
    group.allreduce(np.ones(2000, np.float32))  # peers hear of the last freed segment
    return before, there.inventory()


def test_memory_of_arrays_that_nobody_holds_is_given_back(grouped: list[Member]) -> None:
    for before, after in together(grouped, free_and_make_again, 30):
        assert after[0] <= before[0] + 1 + len(grouped)
        assert after[2] <= before[2] + 1 + len(grouped)


# --- different calls


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("allreduce", 4), ("allreduce", 5)),
        (("allreduce", LARGE), ("allreduce", LARGE + 1)),
        (("allreduce", 4), ("allreduce", LARGE)),
        (("allreduce", LARGE), ("reduce", LARGE)),
        (("allgather", 4), ("broadcast", 4)),
        (("barrier", 4), ("allreduce", LARGE)),
    ],
    ids=lambda call: f"{call[0]}-{call[1]}",
)
def test_different_calls_are_named_by_every_rank(first: tuple[str, int], second: tuple[str, int]) -> None:
    with threads(3, timeout_s=20) as groups:

        def act(group: Group) -> None:
            operation, count = first if group.rank == 1 else second
            there.OPERATIONS[operation](group, np.zeros(count))

        for error in play(groups, act):
            assert isinstance(error, ConfigError)
            assert "must make the same calls in the same order" in str(error)


# --- death, abort, time


@pytest.mark.parametrize(
    ("operation", "count", "way"),
    [("allreduce", SMALL, "read"), ("barrier", 0, "read")]
    + [("allreduce", LARGE, way) for way in WAYS]
    + [(operation, LARGE, "read") for operation in ("allgather", "reducescatter", "broadcast", "reduce")]
    + [(operation, LARGE, "staged") for operation in ("allgather", "reduce")],
)
def test_all_survivors_of_a_killed_rank_notice_at_once(operation: str, count: int, way: str) -> None:
    with members(3) as those:
        form(those)
        for member in those:
            member.tell(repeat, operation, count, way)
        time.sleep(random.uniform(0.02, 0.06))  # anywhere in an operation
        killed_s = time.monotonic()
        those[1].kill()
        for member in (those[0], those[2]):
            name, text, noticed_s = member.result()
            assert name == "PeerLost", text
            assert noticed_s - killed_s < NOTICED_S


def test_a_rank_that_dies_before_it_comes_is_named() -> None:
    with members(3) as those:
        form(those)
        for member in those[1:]:
            member.tell(repeat, "allreduce", SMALL, "read")
        those[0].kill()
        texts = [member.result()[1] for member in those[1:]]
        assert any("the process of rank 0 has died" in text or "rank 0 closed its" in text for text in texts)


def test_a_frozen_rank_ends_the_group_by_time() -> None:
    with members(2) as those:
        form(those, timeout_s=0.4)
        for member in those:
            member.tell(repeat, "allreduce", LARGE, "in place")
        those[1].kill(signal.SIGSTOP)
        name, text, _ = those[0].result()
        assert name == "WaitTimeout"
        assert "nothing moved to or from rank 1 for 0.4 s" in text


def abort_soon(count: int) -> tuple[str, float, float]:
    """Abort a blocked operation from another thread."""
    group = GROUPS["group"]
    aborted_s = []

    def end() -> None:
        while not group._operating.locked():
            time.sleep(0.001)
        aborted_s.append(time.monotonic())
        group.abort("the controller said so")

    thread = threading.Thread(target=end)
    thread.start()
    try:
        group.allreduce(np.ones(count))
    except PeerLost as error:
        noticed_s = time.monotonic()
        thread.join()
        return str(error), aborted_s[0], noticed_s
    raise AssertionError("the operation was not ended")


@pytest.mark.parametrize("count", [SMALL, LARGE])
def test_abort_from_another_thread_wakes_all_ranks_at_once(count: int) -> None:
    with members(3) as those:
        form(those)
        those[2].tell(repeat, "allreduce", count * 2, "read")  # float32: as many bytes, but rank 0 never comes
        those[1].tell(abort_soon, count)
        text, aborted_s, noticed_s = those[1].result()
        assert "the controller said so" in text
        assert noticed_s - aborted_s < NOTICED_S / 2
        name, _, noticed_s = those[2].result()
        assert name in ("PeerLost", "ConfigError")
        assert noticed_s - aborted_s < NOTICED_S / 2


def test_a_rank_that_leaves_is_named_and_does_not_break_what_it_finished() -> None:
    with members(3) as those:
        form(those)
        together(those, check_all, rows_of(3, 100, "int64"), "sum", ["read"] * 3, 0)
        those[0].tell(there.leave)
        those[0].result()
        those[0].close()  # its process ends, too
        for member in those[1:]:
            member.tell(repeat, "allreduce", SMALL, "read")
        texts = [member.result()[1] for member in those[1:]]
        assert any("rank 0 has left the group" in text for text in texts)


@pytest.mark.slow
def test_groups_form_again_and_again_and_nothing_is_left() -> None:
    """Survivors form the next group at once, whoever died how, and what they hold stays the same."""
    with members(2) as those:
        counts = []
        for turn in range(40):
            victim = Member()
            ranks = [*those, victim]
            ranks = ranks[turn % 3 :] + ranks[: turn % 3]
            form(ranks)
            way = WAYS[turn % 3]
            for member in ranks:
                member.tell(repeat, "allreduce", [SMALL, LARGE][turn % 2], way)
            if turn % 4 == 3:
                those[0].kill(signal.SIGSTOP)  # freeze a survivor while another one dies
            victim.kill()
            if turn % 4 == 3:
                those[0].kill(signal.SIGCONT)
            assert [member.result()[0] for member in those] == ["PeerLost"] * 2
            victim.close()
            if turn % 2:
                together(those, there.leave)  # otherwise the next group just takes the place of this one
            counts.append(together(those, there.inventory))
        assert counts[0] == counts[-2]
        assert counts[1] == counts[-1]


def test_a_new_group_of_survivors_works_soon() -> None:
    with members(3) as those:
        took_s = []
        for turn in range(5):
            begun_s = time.monotonic()
            form(those, f"generation {turn}")
            took_s.append(time.monotonic() - begun_s)
        assert min(took_s) < 0.05


# --- where shared memory does not work


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    probe._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    probe._say.cache_clear()


class threads:
    """A group whose ranks are threads of this process; memory is shared just the same."""

    def __init__(self, world: int, timeout_s: float = 10) -> None:
        self.groups = [Group(rank, world, secret=there.SECRET) for rank in range(world)]
        self._timeout_s = timeout_s

    def __enter__(self) -> list[Group]:
        addresses, barrier = [b""] * len(self.groups), threading.Barrier(len(self.groups), timeout=10)

        def join(group: Group) -> None:
            def exchange(address: bytes) -> list[bytes]:
                addresses[group.rank] = address
                barrier.wait()
                return addresses

            group.form(exchange)
            group.limit(self._timeout_s)

        assert play(self.groups, join) == [None] * len(self.groups)
        return self.groups

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            group.close()


def play(groups: list[Group], act: Callable[[Group], Any]) -> list[Any]:
    """Run `act` for all ranks at once; return results and, in their place, what was raised."""

    def guarded(group: Group) -> Any:
        try:
            return act(group)
        except LeptonError as error:
            return error

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(guarded, groups))


def sums(groups: list[Group], count: int = LARGE) -> list[float]:
    def act(group: Group) -> float:
        array = group.empty(count, np.float64)
        array[:] = 1
        group.allreduce(array)
        return float(array.min())

    return play(groups, act)


def test_ranks_that_cannot_share_memory_are_as_on_two_nodes(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    attach, refused = Segment.attach, []

    def refuse_once(pid: int, descriptor: int, inode: int) -> Segment:
        if not refused:
            refused.append(descriptor)
            raise PermissionError(1, "Operation not permitted")
        return attach(pid, descriptor, inode)

    monkeypatch.setattr(Segment, "attach", refuse_once)
    for _ in range(2):
        with threads(3) as groups:
            if not _:
                assert [group.transport for group in groups] == ["shared memory and tcp"] * 3
            assert sums(groups) == [3.0] * 3
    assert sum("cannot be opened" in record.getMessage() for record in said.records) == 1
    assert sum("another rank could not use it" in record.getMessage() for record in said.records) == 1


def test_a_rank_on_a_system_without_it_still_takes_part(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    answers = iter([None, "a machine of type abacus", None])
    monkeypatch.setattr(memory, "missing", lambda: next(answers))
    with threads(3) as groups:
        assert {group.transport for group in groups} == {"shared memory and tcp"}
        assert sums(groups) == [3.0] * 3
    assert "a machine of type abacus" in said.text


def test_without_permission_to_read_arrays_go_through_slots(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    def refuse(pid: int, address: int, target: Array) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(memory, "read_process", refuse)
    with threads(2) as groups:
        assert [group.transport for group in groups] == ["shared memory"] * 2
        assert [group._shared.can_read for group in groups if group._shared] == [False] * 2
        arrays = [np.arange(LARGE, dtype=np.float32) for _ in groups]
        assert play(groups, lambda group: group.allreduce(arrays[group.rank])) == [None] * 2
        assert all((array == np.arange(LARGE, dtype=np.float32) * 2).all() for array in arrays)
    assert said.text.count("process_vm_readv") == 1


def test_barriers_stand_where_the_machine_does_not_keep_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine they cost time only; what is tested is that the way with barriers works and has them."""
    barriers = []
    monkeypatch.setattr(memory, "IS_ORDERED", False)
    monkeypatch.setattr(memory, "order", lambda: barriers.append(memory._membarrier()))
    assert memory.missing() is None
    with threads(2) as groups:
        assert sums(groups) == [2.0] * 2
        assert sums(groups, 10) == [2.0] * 2
    assert set(barriers) == {0}
    assert len(barriers) == 2 * 2 * 3  # two before and after each meeting: two of the large sum, one of the small


def test_a_group_of_one_has_ordinary_memory() -> None:
    with threads(1) as groups:
        assert groups[0].transport == "none"
        assert sums(groups) == [1.0]


def test_time_that_is_up_is_told_in_shared_memory_too() -> None:
    with threads(2, timeout_s=0.2) as groups, pytest.raises(WaitTimeout) as raised:
        groups[1].allreduce(np.zeros(4))
    assert str(raised.value) == "allreduce #1 on rank 1 of 2: nothing moved to or from rank 0 for 0.2 s"


def test_abort_while_a_group_forms_ends_it() -> None:
    group = Group(0, 2, secret=there.SECRET, timeout_s=20)

    def exchange(address: bytes) -> list[bytes]:
        group.abort("changed its mind")
        return [address, b"127.0.0.1|1"]

    with pytest.raises(PeerLost, match="changed its mind"):
        group.form(exchange)
    group.close()


def test_nothing_named_is_left() -> None:
    assert not [name for name in os.listdir("/dev/shm") if "lepton" in name]
