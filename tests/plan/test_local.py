"""Local steps: whose turn it is, and how weights are cut into fragments."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.local import Turns, cut


@st.composite
def all_turns(draw: st.DrawFn) -> Turns:
    steps = draw(st.integers(1, 60))
    fragments = draw(st.integers(1, steps))
    return Turns(steps=steps, fragments=fragments, delay=draw(st.integers(0, steps // fragments - 1)))


@given(all_turns(), st.integers(0, 1000))
def test_every_fragment_leaves_once_in_so_many_steps(turns: Turns, start: int) -> None:
    round_ = [turns.leaving(done) for done in range(start + 1, start + 1 + turns.steps)]
    assert sorted(fragment for fragment in round_ if fragment is not None) == list(range(turns.fragments))
    assert turns.leaving(0) is None


@given(all_turns())
def test_turns_are_spread_evenly_and_end_with_the_last_fragment(turns: Turns) -> None:
    at = [done for done in range(3 * turns.steps + 1) if turns.leaving(done) is not None]
    gaps = {after - before for before, after in zip(at, at[1:])}
    assert gaps <= {turns.steps // turns.fragments, -(-turns.steps // turns.fragments)}
    assert turns.leaving(turns.steps) == turns.fragments - 1
    assert turns.leaving(2 * turns.steps) == turns.fragments - 1


@given(all_turns())
def test_what_leaves_arrives_before_the_next_one_leaves(turns: Turns) -> None:
    away: list[int] = []
    for done in range(1, 4 * turns.steps):
        if turns.delay and (arriving := turns.arriving(done)) is not None:
            assert away == [arriving]
            away.clear()
        if (leaving := turns.leaving(done)) is not None:
            assert not away
            if turns.delay:
                away.append(leaving)
            else:
                assert turns.arriving(done) == leaving


def test_an_example() -> None:
    turns = Turns(steps=10, fragments=3, delay=2)
    assert {done: turns.leaving(done) for done in range(11) if turns.leaving(done) is not None} == {4: 0, 7: 1, 10: 2}
    assert {done: turns.arriving(done) for done in range(13) if turns.arriving(done) is not None} == {6: 0, 9: 1, 12: 2}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.data())
def test_fragments_hold_every_parameter_once_in_order_and_are_not_empty(sizes: list[int], data: st.DataObject) -> None:
    fragments = data.draw(st.integers(1, len(sizes)))
    parts = cut(sizes, fragments)
    assert len(parts) == fragments
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    assert all(parts)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.data())
def test_fragments_are_about_as_large_as_each_other(sizes: list[int], data: st.DataObject) -> None:
    """Wherever no parameter is larger than an even share, so that none has to give way to another."""
    fragments = data.draw(st.integers(1, len(sizes)))
    share = sum(sizes) / fragments
    if max(sizes) <= share:
        assert max(sum(sizes[i] for i in part) for part in cut(sizes, fragments)) <= share + max(sizes)


def test_an_example_of_a_cut() -> None:
    assert cut([10, 10, 10, 30], 2) == [range(3), range(3, 4)]
    assert cut([1, 1, 1, 100], 3) == [range(2), range(2, 3), range(3, 4)]
