from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.transport import (
    EXCHANGE_BYTES,
    Route,
    Speeds,
    Wire,
    choose,
    explain,
    goes_straight,
    join,
    lossy_route,
    predict,
)

rates = st.floats(1e4, 1e11)
speeds = st.builds(
    Speeds,
    latency_s=st.floats(1e-6, 1),
    start_s=st.floats(0, 1e-3),
    bandwidth=rates,
    memory=rates,
    bf16=rates,
    int8=rates,
)
sizes = st.integers(0, 1 << 34) | st.integers(0, 2 * EXCHANGE_BYTES)
nodes_of_any_size = st.lists(st.integers(1, 8), min_size=2, max_size=8).map(tuple)


@st.composite
def reaches(draw: st.DrawFn) -> list[list[bool]]:
    world = draw(st.integers(1, 7))
    rows = st.lists(st.booleans(), min_size=world, max_size=world)
    return draw(st.lists(rows, min_size=world, max_size=world))


@given(reaches())
def test_nodes_part_all_ranks_and_within_them_all_reach_each_other(table: list[list[bool]]) -> None:
    nodes = join(table)
    assert sorted(rank for node in nodes for rank in node) == list(range(len(table)))
    assert all(table[a][b] for node in nodes for a in node for b in node if a != b)
    assert all(node == sorted(node) for node in nodes)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_ranks_of_equal_machines_are_joined_however_they_are_mixed(machines: list[int]) -> None:
    nodes = join([[own == other for other in machines] for own in machines])
    assert len(nodes) == len(set(machines))
    assert all(len({machines[rank] for rank in node}) == 1 for node in nodes)


@given(size=sizes, nodes=nodes_of_any_size, measured=speeds)
def test_what_is_chosen_is_about_the_fastest_prediction(size: int, nodes: tuple[int, ...], measured: Speeds) -> None:
    choice = choose(size, nodes, measured)
    assert choice.route_s == predict(size, nodes, measured)
    assert choice.route_s[choice.route] * 0.95 <= min(choice.route_s.values())
    assert choice.wire_s[choice.wire] <= choice.wire_s[Wire.FP32]
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in choice.route_s.values())
    assert choice.route is not Route.EXCHANGE or size <= EXCHANGE_BYTES


@given(size=sizes, more=sizes, nodes=nodes_of_any_size, measured=speeds)
def test_more_takes_longer(size: int, more: int, nodes: tuple[int, ...], measured: Speeds) -> None:
    small, large = (predict(each, nodes, measured) for each in sorted((size, more)))
    assert all(small[route] <= large[route] for route in small.keys() & large.keys())


@given(size=sizes, count=st.integers(2, 64), measured=speeds)
def test_star_and_doubling_are_never_faster(size: int, count: int, measured: Speeds) -> None:
    """So they are no candidates. Both are given the best case: ranks alone on their nodes, a power of two."""
    sent_s = size / measured.bandwidth
    star_s = 2 * (measured.latency_s + (count - 1) * sent_s)
    doubling_s = math.ceil(math.log2(count)) * (measured.latency_s + sent_s)
    best_s = min(predict(size, (1,) * count, measured).values())
    assert best_s <= (measured.start_s + min(star_s, doubling_s)) * (1 + 1e-9)


def link(bits_per_s: float, latency_s: float = 50e-6) -> Speeds:
    return Speeds(latency_s=latency_s, start_s=1e-5, bandwidth=bits_per_s / 8, memory=10e9, bf16=3e9, int8=1e9)


def test_nodes_that_share_memory_send_a_third_less_than_a_ring_of_all() -> None:
    choice = choose(16 << 20, (2, 2), link(1e9))
    assert choice.route is Route.RING
    assert 1.4 < choice.route_s[Route.FLAT] / choice.route_s[Route.RING] < 1.5


def test_what_is_small_for_the_network_goes_in_one_message() -> None:
    assert choose(4, (2, 2, 2), link(1e9)).route is Route.EXCHANGE
    assert choose(EXCHANGE_BYTES, (1,) * 8, link(1e9)).route is Route.SCATTER  # 7 times as much is no longer small


def test_the_ring_is_left_only_where_waiting_counts() -> None:
    assert choose(64 << 20, (1,) * 4, link(1e9)).route is Route.RING
    assert choose(1 << 20, (1,) * 4, link(1e9, latency_s=10e-3)).route is Route.SCATTER


def test_one_rank_does_not_work_for_many_when_the_network_is_fast() -> None:
    assert choose(64 << 20, (8, 1), link(1e9)).route is Route.RING
    assert choose(64 << 20, (8, 1), link(24e9)).route is Route.FLAT


def test_auto_encodes_where_the_network_is_slower_than_the_codec() -> None:
    wires = [choose(64 << 20, (2, 2), link(bits)).wire for bits in (1e8, 1e9, 24e9)]
    assert wires == [Wire.INT8, Wire.INT8, Wire.FP32]
    assert choose(4, (2, 2), link(1e8)).wire is Wire.FP32


@given(size=sizes, nodes=nodes_of_any_size, measured=speeds)
def test_what_goes_straight_is_small_and_sooner_there(size: int, nodes: tuple[int, ...], measured: Speeds) -> None:
    if goes_straight(size, nodes, measured):
        assert size <= EXCHANGE_BYTES
        chain_s = measured.start_s + (len(nodes) - 1) * measured.latency_s + size / measured.bandwidth
        assert predict(size, nodes, measured)[Route.EXCHANGE] < chain_s


def test_a_chain_is_left_where_its_messages_would_wait_for_each_other() -> None:
    assert goes_straight(4096, (2, 2, 2), link(1e9, latency_s=1e-3))
    assert not goes_straight(EXCHANGE_BYTES, (2, 2, 2), link(1e8, latency_s=1e-3))
    assert not goes_straight(4 << 20, (2, 2, 2), link(1e9, latency_s=10e-3))


@given(size=sizes, nodes=nodes_of_any_size, measured=speeds)
def test_auto_breaks_even(size: int, nodes: tuple[int, ...], measured: Speeds) -> None:
    """Encoding alone must take less than sending all as it is."""
    choice = choose(size, nodes, measured)
    speed = {Wire.FP32: math.inf, Wire.BF16: measured.bf16, Wire.INT8: measured.int8}[choice.wire]
    assert size / min(nodes) / speed < choice.wire_s[Wire.FP32]
    assert choice.wire is Wire.FP32 or choice.wire_s[choice.wire] <= 0.8 * choice.wire_s[Wire.FP32]
    assert predict(size, nodes, measured, Wire.INT8) == {lossy_route(nodes): choice.wire_s[Wire.INT8]}


def test_the_explanation_has_every_figure() -> None:
    text = explain(choose(1 << 20, (2, 1), link(1e8, latency_s=2e-3)))
    assert "1048576 bytes between nodes of 2, 1 ranks, 2 ms and 12.5 MB/s apart: ring" in text
    assert "int8 would pay" in text
    assert "flat ring" in text
    assert text.count(" ms") >= 6
