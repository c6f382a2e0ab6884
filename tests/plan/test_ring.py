from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.ring import Move, all_gather, chunk_bounds, reduce_scatter

worlds = st.integers(1, 6)
counts = st.integers(0, 40)


def play(data: list[list[int]], moves: Callable[[int, int], list[Move]], *, add: bool) -> None:
    """Play the moves of all ranks in lock step on plain lists, in place."""
    world = len(data)
    bounds = chunk_bounds(len(data[0]), world)
    schedule = [moves(rank, world) for rank in range(world)]
    for i in range(world - 1):
        sent = [data[r][bounds[schedule[r][i].send] : bounds[schedule[r][i].send + 1]] for r in range(world)]
        for rank in range(world):
            lower, upper = (bounds[schedule[rank][i].receive + k] for k in (0, 1))
            arrived = sent[(rank - 1) % world]
            assert len(arrived) == upper - lower, "both ends of a link must mean the same chunk"
            own = data[rank][lower:upper]
            data[rank][lower:upper] = [a + b for a, b in zip(own, arrived)] if add else arrived


@given(world=worlds, count=counts)
def test_chunks_cover_everything_evenly(world: int, count: int) -> None:
    bounds = chunk_bounds(count, world)
    sizes = [b - a for a, b in zip(bounds, bounds[1:])]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, count, world)
    assert max(sizes) - min(sizes) <= 1


@given(world=worlds, count=counts)
def test_all_reduce_gives_the_sum_everywhere(world: int, count: int) -> None:
    data = [[1000**rank * (i + 1) for i in range(count)] for rank in range(world)]
    expected = [sum(column) for column in zip(*data)]
    play(data, reduce_scatter, add=True)
    bounds = chunk_bounds(count, world)
    for rank in range(world):
        own = slice(bounds[rank], bounds[rank + 1])
        assert data[rank][own] == expected[own], "reduce-scatter must leave chunk `rank` complete at `rank`"
    play(data, all_gather, add=False)
    assert data == [expected] * world


@given(world=worlds, rank=st.integers(0, 5))
def test_each_move_sends_what_the_one_before_received(world: int, rank: int) -> None:
    moves = reduce_scatter(rank % world, world) + all_gather(rank % world, world)
    assert all(later.send == earlier.receive for earlier, later in zip(moves, moves[1:]))
