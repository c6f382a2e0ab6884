"""Groups on several nodes: processes of this machine that are told that they are on different ones."""

from __future__ import annotations

import random
import signal
import socket
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_ray.collective.calls import MAX, MIN, PRODUCT, SUM, Array, Reduction
from lepton_ray.collective.group import Group
from lepton_ray.collective.wire import Feedback
from lepton_ray.plan.ring import chunk_bounds
from lepton_ray.plan.transport import Route, Speeds
from tests.collective import members as there
from tests.collective.members import GROUPS, Member, array_like, form, members, repeat, together

OPS = {op.name: op for op in (SUM, PRODUCT, MIN, MAX)}
DTYPES = ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64"]
WAYS = ["in place", "read", "staged"]
LARGE = 100_003
NOTICED_S = 0.5
# A letter per rank: alike, unequal, mixed up, one node, one rank on each.
LAYOUTS = ["aabb", "aab", "abab", "aabc", "aaa", "abc", "ab"]

# Speeds with which a route is chosen, whatever is between nodes of this machine.
_FAST = {"latency_s": 1e-9, "start_s": 0, "bandwidth": 1e9, "memory": 1e12, "bf16": 1e9, "int8": 1e9}
STEERING = {
    Route.EXCHANGE: Speeds(**_FAST | {"latency_s": 1, "start_s": 1}),
    Route.RING: Speeds(**_FAST),
    Route.SCATTER: Speeds(**_FAST | {"latency_s": 2e-3, "bandwidth": 1e6}),
    Route.FLAT: Speeds(**_FAST | {"memory": 1e3}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Member]]:
    """Processes for one group after the other. Sizes are small, so that small arrays take every way."""
    with members(4) as made:
        together(made, there.shrink)
        yield made


@pytest.fixture(scope="module", params=LAYOUTS)
def grouped(request: pytest.FixtureRequest, pool: list[Member]) -> tuple[str, list[Member]]:
    layout: str = request.param
    form(pool[: len(layout)], nodes=layout)
    return layout, pool[: len(layout)]


def replace(pool: list[Member], victim: int) -> None:
    """End a process, and put another in its place."""
    pool[victim].close()
    pool[victim] = Member()
    together(pool[victim : victim + 1], there.shrink)


def rows_of(world: int, count: int, dtype: str) -> Array:
    """Return values whose reduction is exact, whatever the order."""
    values = np.random.default_rng(count).integers(1, 4, (world, count))
    return (values % 2 if dtype == "bool" else values).astype(dtype)


def check_all(rank_rows: Array, op: str, way: str, route: Route, root: int) -> None:
    """Compare every operation with numpy, on one rank."""
    group = GROUPS["group"]
    steer(group, route)
    rank, world, count = group.rank, group.world, rank_rows.shape[1]
    own = rank_rows[group.rank]
    reduced = OPS[op].apply.reduce(rank_rows, 0, dtype=rank_rows.dtype)
    bounds = chunk_bounds(count, world)

    def fresh() -> Array:
        return array_like(group, own, way)

    array = fresh()
    group.allreduce(array, OPS[op])
    np.testing.assert_array_equal(array, reduced)
    np.testing.assert_array_equal(group.reducescatter(fresh(), OPS[op]), reduced[bounds[rank] : bounds[rank + 1]])
    array = fresh()
    group.reduce(array, root, OPS[op])
    np.testing.assert_array_equal(array, reduced if rank == root else own)
    array = fresh()
    group.broadcast(array, root)
    np.testing.assert_array_equal(array, rank_rows[root])
    array = fresh()
    np.testing.assert_array_equal(group.allgather(array), rank_rows)
    np.testing.assert_array_equal(array, own)
    group.barrier()


def steer(group: Group, route: Route) -> None:
    if group._across is not None:
        group._speeds = STEERING[route]


@given(
    count=st.integers(0, 40) | st.integers(0, 6000),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(sorted(OPS)),
    way=st.sampled_from(WAYS),
    route=st.sampled_from(Route),
    data=st.data(),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_operation_equals_numpy_on_every_route(
    grouped: tuple[str, list[Member]], count: int, dtype: str, op: str, way: str, route: Route, data: st.DataObject
) -> None:
    layout, those = grouped
    if dtype == "complex64" and op in ("min", "max"):
        op = "sum"
    root = data.draw(st.integers(0, len(layout) - 1))
    together(those, check_all, rows_of(len(layout), count, dtype), op, way, route, root)


def sum_bits(count: int, way: str, route: Route, wire: str, dtype: str) -> bytes:
    """Sum what has no order: rounding, signed zeros and NaN payloads depend on the order of operands."""
    group = GROUPS["group"]
    steer(group, route)
    random_ = np.random.default_rng(group.rank)
    own = (random_.standard_normal(count) * 10.0 ** random_.integers(-9, 9, count)).astype(dtype)
    own[::5] = np.where(random_.random(own[::5].size) < 0.5, 0.0, -0.0)
    if dtype == "float64":
        own[1::5] = np.array([0x7FF8000000000000 + group.rank], np.uint64).view(np.float64)
    array = array_like(group, own, way)
    group.allreduce(array, wire=wire)
    return array.tobytes()


@pytest.mark.parametrize("route", list(Route))
def test_all_ranks_get_the_same_bits(grouped: tuple[str, list[Member]], route: Route) -> None:
    for way in WAYS:
        for count in (5, 100, 3001):
            assert len(set(together(grouped[1], sum_bits, count, way, route, "fp32", "float64"))) == 1
            assert len(set(together(grouped[1], sum_bits, count, way, route, "int8", "float32"))) == 1
            assert len(set(together(grouped[1], sum_bits, count, way, route, "bf16", "float32"))) == 1


def test_nodes_are_found(grouped: tuple[str, list[Member]]) -> None:
    layout, those = grouped
    expected = "shared memory" if len(set(layout)) == 1 else "tcp" if len(set(layout)) == len(layout) else None
    assert set(together(those, transport)) == {expected or "shared memory and tcp"}
    texts = together(those, explain, 1 << 20)
    assert len(set(texts)) == 1, "ranks choose alike only if they know the same"
    assert ("1048576 bytes between nodes of" in texts[0]) == (len(set(layout)) > 1)


def transport() -> str:
    return GROUPS["group"].transport


def explain(size_bytes: int) -> str:
    return GROUPS["group"].explain(size_bytes)


# --- what is carried


def received(group: Group) -> int:
    """Return the bytes that the kernel has received for this group's connections."""
    lengths = []
    for link in group._mesh.links.values():
        info = link.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        lengths.append(struct.unpack_from("<Q", info, 128)[0])
    return sum(lengths)


def carried(operation: str, count: int, wire: str) -> int:
    """Return how many bytes this rank received over TCP for an operation, which must be right."""
    group = GROUPS["group"]
    steer(group, Route.RING)
    array = array_like(group, np.full(count, group.rank + 1, np.float32), "in place")
    before = received(group)
    group.barrier()  # before it, nobody begins
    if operation == "allreduce":
        group.allreduce(array, wire=wire)
        np.testing.assert_allclose(array, sum(range(1, group.world + 1)), rtol=0 if wire == "fp32" else 1e-3)
    elif operation == "reducescatter":
        assert (group.reducescatter(array) == sum(range(1, group.world + 1))).all()
    elif operation == "allgather":
        assert (group.allgather(array) == np.arange(1, group.world + 1)[:, None]).all()
    else:
        group.broadcast(array, 0)
        assert (array == 1).all()
    return received(group) - before


# Arrays that a node receives, for one array per rank; an all-gather of N arrays moves N of them.
@pytest.mark.parametrize(
    ("layout", "operation", "wire", "arrays"),
    [
        ("aaa", "allreduce", "fp32", [0, 0, 0]),
        ("abc", "allreduce", "fp32", [4 / 3] * 3),
        ("abc", "allreduce", "int8", [4 / 3 * 0.254] * 3),
        ("aabb", "allreduce", "fp32", [1 / 2] * 4),
        ("abab", "allreduce", "bf16", [1 / 4] * 4),
        ("aabb", "allreduce", "int8", [0.254 / 2] * 4),
        ("aab", "allreduce", "fp32", [1, 0, 1]),
        ("aabb", "reducescatter", "fp32", [1 / 4] * 4),
        ("aabb", "allgather", "fp32", [1] * 4),
        ("aabb", "broadcast", "fp32", [0, 1, 1, 1]),
        ("aaa", "broadcast", "fp32", [0, 0, 0]),
    ],
)
def test_our_connections_carry_as_much_as_they_should(
    pool: list[Member], layout: str, operation: str, wire: str, arrays: list[float]
) -> None:
    those = pool[: len(layout)]
    form(those, nodes=layout)
    found = together(those, carried, operation, LARGE, wire)
    assert found == pytest.approx([share * LARGE * 4 for share in arrays], rel=0.01, abs=200)


# --- wire formats


def sum_often(rounds: int, count: int, wire: str, is_fed_back: bool, route: Route) -> float:
    """Return how far the sum of many all-reduces is off, relative to the largest number of one."""
    group = GROUPS["group"]
    steer(group, route)
    own = np.random.default_rng(group.rank).standard_normal(count).astype(np.float32)
    exact = sum(np.random.default_rng(rank).standard_normal(count) for rank in range(group.world))
    feedback = Feedback() if is_fed_back else None
    total = np.zeros(count)
    for _ in range(rounds):
        array = array_like(group, own, "in place")
        group.allreduce(array, wire=wire, feedback=feedback)
        total += array
    return float(np.abs(total - rounds * exact).max() / np.abs(exact).max())


@pytest.mark.parametrize(("wire", "bound"), [("bf16", 0.01), ("int8", 0.02)])
def test_errors_that_are_fed_back_do_not_add_up(grouped: tuple[str, list[Member]], wire: str, bound: float) -> None:
    layout, those = grouped
    if len(set(layout)) == 1:
        assert max(together(those, sum_often, 10, 3001, wire, True, Route.RING)) < 1e-5  # nothing is encoded
        return
    once = max(together(those, sum_often, 1, 3001, wire, False, Route.RING))
    assert 0 < once < bound
    assert max(together(those, sum_often, 30, 3001, wire, False, Route.RING)) > 5 * once
    assert max(together(those, sum_often, 30, 3001, wire, True, Route.RING)) < 3 * once


def sum_bad(value: float) -> tuple[bool, bool]:
    """Sum twice, with inf or nan in the first; return whether it was seen, and whether the second is finite."""
    group = GROUPS["group"]
    feedback = Feedback()
    array = np.ones(3001, np.float32)
    if group.rank == 0:
        array[7] = value
    group.allreduce(array, wire="int8", feedback=feedback)
    is_seen = not np.isfinite(array[7])
    array = np.ones(3001, np.float32)
    group.allreduce(array, wire="int8", feedback=feedback)
    return bool(is_seen), bool(np.isfinite(array).all())


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_is_seen_by_all_and_does_not_come_back(
    grouped: tuple[str, list[Member]], value: float
) -> None:
    assert set(together(grouped[1], sum_bad, value)) == {(True, True)}


def sum_exactly(dtype: str, op: str) -> bool:
    group = GROUPS["group"]
    rows = np.random.default_rng(1).integers(1, 1000, (group.world, 3001)).astype(dtype)
    array = rows[group.rank].copy()
    group.allreduce(array, OPS[op], wire="int8")
    return bool((array == OPS[op].apply.reduce(rows, 0, dtype=rows.dtype)).all())


@pytest.mark.parametrize(("dtype", "op"), [("int32", "sum"), ("float64", "sum"), ("float32", "max")])
def test_only_sums_of_float32_are_encoded(grouped: tuple[str, list[Member]], dtype: str, op: str) -> None:
    assert all(together(grouped[1], sum_exactly, dtype, op))


def test_different_formats_are_named(pool: list[Member]) -> None:
    form(pool[:2], nodes="ab")
    for member, wire in zip(pool, ("int8", "bf16")):
        member.tell(sum_bits, 3001, "read", Route.RING, wire, "float32")
    texts = [str(pytest.raises((OSError, ValueError), member.result).value) for member in pool[:2]]
    assert any("allreduce(sum, int8)" in text and "allreduce(sum, bf16)" in text for text in texts)


# --- death and time


@pytest.mark.parametrize("layout", ["aabb", "aab", "abc"])
@pytest.mark.parametrize(
    ("operation", "way"),
    [("allreduce", "in place"), ("allreduce", "staged"), ("int8", "read"), ("barrier", "read"), ("allgather", "read")],
)
def test_all_survivors_of_a_killed_rank_notice_at_once(
    pool: list[Member], layout: str, operation: str, way: str
) -> None:
    those = pool[: len(layout)]
    form(those, nodes=layout)
    for member in those:
        member.tell(repeat, operation, LARGE, way)
    time.sleep(random.uniform(0.02, 0.06))  # anywhere in an operation
    victim = random.randrange(len(those))
    killed_s = time.monotonic()
    those[victim].kill()
    ends = [member.result() for at, member in enumerate(those) if at != victim]
    replace(pool, victim)
    for name, text, noticed_s in ends:
        assert name == "PeerLost", text
        assert noticed_s - killed_s < NOTICED_S


def test_a_frozen_rank_ends_the_group_by_time_on_every_node(pool: list[Member]) -> None:
    form(pool, timeout_s=0.4, nodes="aabb")
    for member in pool:
        member.tell(repeat, "allreduce", LARGE, "in place")
    pool[3].kill(signal.SIGSTOP)
    names = {member.result()[0] for member in pool[:3]}
    replace(pool, 3)
    assert "WaitTimeout" in names
    assert names <= {"WaitTimeout", "PeerLost"}


def sum_slowly(step_s: float) -> tuple[float, float]:
    """Reduce in steps that take a while; return the seconds, and the last number."""

    def apply(first: Array, second: Array, out: Array) -> None:
        time.sleep(step_s)
        np.add(first, second, out=out)

    group = GROUPS["group"]
    steer(group, Route.RING)
    array = np.ones(10 * 1024, np.float32)
    start_s = time.monotonic()
    group.allreduce(array, Reduction("sum", 1, apply))
    return time.monotonic() - start_s, float(array[-1])


def loaded() -> bool:
    """Be imported."""
    return True


def test_who_waits_for_a_rank_that_works_on_does_not_run_out_of_time(pool: list[Member]) -> None:
    together(pool[:3], loaded)  # who came in a victim's place imports this module, which takes longer than the limit
    form(pool[:3], timeout_s=1, nodes="aab")
    for took_s, value in together(pool[:3], sum_slowly, 0.05):
        assert value == 3
        assert took_s > 1.1


@pytest.mark.slow
def test_groups_on_nodes_form_again_and_again_and_nothing_is_left() -> None:
    with members(3) as those:
        counts = []
        for turn in range(12):
            victim = Member()
            form([*those, victim], nodes=["aabb", "abab", "aaab"][turn % 3])
            for member in [*those, victim]:
                member.tell(repeat, ["allreduce", "int8"][turn % 2], LARGE, WAYS[turn % 3])
            victim.kill()
            assert [member.result()[0] for member in those] == ["PeerLost"] * 3
            victim.close()
            together(those, there.leave)
            counts.append(together(those, there.inventory))
        assert counts[5] == counts[-1]
