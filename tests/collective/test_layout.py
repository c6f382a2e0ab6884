"""Every cut of an array covers it once, whatever its size and the number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.collective.layout import LINE_BYTES, Way, blocks, choose, cut, even_parts, turns, whole_part

counts, worlds, itemsizes = st.integers(0, 5000), st.integers(1, 9), st.sampled_from([1, 2, 4, 8, 16])


@given(counts, worlds, itemsizes)
def test_parts_cover_the_array_and_share_no_line(count: int, world: int, itemsize: int) -> None:
    bounds = even_parts(count, world, itemsize)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, count, world + 1)
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:])]
    assert min(sizes) >= 0
    assert all(bound * itemsize % LINE_BYTES == 0 for bound in bounds if bound < count)
    assert max(sizes) <= count / world + 2 * LINE_BYTES / itemsize


@given(counts, worlds, st.data())
def test_one_rank_can_have_it_all(count: int, world: int, data: st.DataObject) -> None:
    owner = data.draw(st.integers(0, world - 1))
    bounds = whole_part(count, world, owner)
    assert [stop - start for start, stop in zip(bounds, bounds[1:])] == [
        count * (rank == owner) for rank in range(world)
    ]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60))
def test_blocks_cover_a_range_in_order(start: int, length: int, step: int) -> None:
    cut = list(blocks(start, start + length, step))
    assert [i for each in cut for i in range(each.start, each.stop)] == list(range(start, start + length))
    assert all(0 < each.stop - each.start <= step for each in cut)


@given(st.lists(st.integers(0, 80), min_size=1, max_size=6), st.integers(6, 200))
def test_turns_bring_every_part_through_the_slot_without_overlap(sizes: list[int], room: int) -> None:
    seen: list[list[int]] = [[] for _ in sizes]
    for turn in turns(sizes, room):
        filled = [i for _, there in turn for i in range(there.start, there.stop)]
        assert filled == list(range(len(filled)))
        assert len(filled) <= room
        for rank, (here, there) in enumerate(turn):
            assert here.stop - here.start == there.stop - there.start
            seen[rank] += range(here.start, here.stop)
    assert seen == [list(range(size)) for size in sizes]


@given(counts, worlds)
def test_a_cut_shows_the_parts_of_an_array(count: int, world: int) -> None:
    array = np.arange(count)
    parts = cut(array, even_parts(count, world, array.itemsize))
    assert len(parts) == world
    assert all(np.shares_memory(part, array) for part in parts if part.size)
    assert np.concatenate(parts).tolist() == array.tolist()


def test_the_way_depends_on_what_all_ranks_know() -> None:
    assert choose(1 << 20, 1 << 17, [True, True], False) is Way.IN_PLACE
    assert choose(1 << 16, 1 << 17, [True, True], True) is Way.IN_PLACE
    assert choose(1 << 16, 1 << 17, [True, False], True) is Way.COPY
    assert choose(1 << 20, 1 << 17, [True, False], True) is Way.READ
    assert choose(1 << 20, 1 << 17, [False, False], False) is Way.STAGED
