"""Where survivors go on: the rule by examples and properties. For the whole of it see test_interleavings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.recover import Position, mirror_node, settle, siblings, workers_of


def at(committed: int, is_reduced: bool = False) -> Position:
    return Position(committed=committed, is_reduced=is_reduced, ballot=(float(committed),))


# --- examples ---------------------------------------------------------------------------------------------------------


def test_nobody_has_committed_so_all_discard():
    found = settle({0: at(7, is_reduced=True), 1: at(7), 2: at(7, is_reduced=True)}, size=1)
    assert found is not None
    assert (found.committed, found.forward, found.holders) == (7, frozenset(), {0, 1, 2})


def test_one_has_committed_so_all_do_with_its_ballot():
    found = settle({0: at(7, is_reduced=True), 1: at(8), 2: at(7, is_reduced=True)}, size=1)
    assert found is not None
    assert (found.committed, found.forward, found.holders, found.ballot) == (8, {0, 2}, {0, 1, 2}, (8.0,))


def test_who_is_behind_without_the_sums_holds_no_state_of_use():
    found = settle({0: at(8), 1: at(7), 2: at(6, is_reduced=True)}, size=1)
    assert found is not None
    assert (found.committed, found.holders) == (8, {0})


def test_without_survivors_there_is_nothing_to_settle():
    assert settle({}, size=1) is None


def test_a_state_counts_only_when_all_coordinates_are_held():
    assert settle({0: at(7), 2: at(8)}, size=2) is None
    found = settle({0: at(9), 2: at(8), 3: at(8)}, size=2)  # 0 came back from the dead
    assert found is not None
    assert (found.committed, found.holders) == (8, {2, 3})


def test_siblings_are_taken_in_the_order_given():
    assert siblings([2, 1, 0, 3], size=2) == {0: 2, 1: 1}
    assert siblings([0, 2, 4], size=2) is None
    assert [*workers_of(3, size=2)] == [6, 7]


# --- properties -------------------------------------------------------------------------------------------------------

POSITIONS = st.dictionaries(st.integers(0, 7), st.builds(at, st.integers(0, 3), st.booleans()))
SIZES = st.sampled_from([1, 2, 4])


@given(POSITIONS, SIZES)
def test_the_settlement_is_held_as_it_says(positions: dict[int, Position], size: int):
    found = settle(positions, size)
    if found is None:
        assert all(
            siblings([w for w, position in positions.items() if position.committed == committed], size) is None
            for committed in range(4)
        )
        return
    assert siblings(found.holders, size) is not None
    assert found.forward < found.holders
    for worker, position in positions.items():
        is_there = position.committed == found.committed
        is_behind = position.committed == found.committed - 1 and position.is_reduced
        assert (worker in found.holders) == (is_there or is_behind)
        assert (worker in found.forward) == is_behind
    assert found.ballot == (float(found.committed),)


@given(POSITIONS, SIZES, st.randoms())
def test_the_settlement_does_not_depend_on_the_order_of_the_answers(positions, size, random):
    shuffled = list(positions.items())
    random.shuffle(shuffled)
    assert settle(dict(shuffled), size) == settle(positions, size)


@given(
    st.integers(0, 5), st.lists(st.booleans(), min_size=1, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6)
)
def test_survivors_of_one_ballot_all_keep_their_state(committed: int, has: list[bool], reduced: list[bool]):
    """As the protocol has it: where one has committed, all others have joined that ballot."""
    positions = {
        worker: at(committed + 1) if has[worker] else at(committed, is_reduced=any(has) or reduced[worker])
        for worker in range(len(has))
    }
    found = settle(positions, size=1)
    assert found is not None
    assert found.holders == set(positions)
    assert found.committed == committed + any(has)


# --- mirrors ----------------------------------------------------------------------------------------------------------

NODES = st.sets(st.sampled_from("abcd"), min_size=1)


@given(st.sampled_from("abcd"), NODES, st.none() | st.sampled_from("abcd"), st.booleans())
def test_a_mirror_is_on_another_node_where_there_is_one(
    own: str, nodes: set[str], current: str | None, is_asked: bool
) -> None:
    found = mirror_node(own, nodes, current, is_asked=is_asked)
    if nodes - {own}:
        assert found in nodes - {own}
        assert found == current or current not in nodes - {own}
    else:
        assert found == (own if is_asked else None)
