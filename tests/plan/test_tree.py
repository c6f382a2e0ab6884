"""Along the tree every addition has the same two numbers, however the microbatches are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.batch import own
from lepton_ray.plan.tree import merges, subtrees, turns

COUNTS = st.integers(1, 70)


def shared(count: int, cuts: Sequence[int]) -> list[range]:
    ends = [0, *sorted(cut % (count + 1) for cut in cuts), count]
    return [range(a, b) for a, b in zip(ends, ends[1:])]


SHARES = st.tuples(COUNTS, st.lists(st.integers(0, 1000), max_size=8)).map(lambda each: shared(*each))


def summed(share: range, root: range) -> list[Any]:
    """Do what a worker does: return its sums, in which (a, b) stands for a + b and a number for a microbatch."""
    aside: list[Any] = []
    total: Any = None
    for leaf, turn in turns(share, root).items():
        if turn.is_apart:
            aside.append(total)
            total = None
        total = leaf if total is None else (total, leaf)
        for _ in range(turn.merges):
            total = (aside.pop(), total)
    return aside if total is None else [*aside, total]


def together(shares: Sequence[range], root: range) -> Any:
    """Do what all workers do together."""
    sums = [each for share in shares for each in summed(share, root)]
    parts = [part for share in shares for part in subtrees(share, root)]
    assert len(sums) == len(parts)
    for left, right in merges(parts, root):
        sums[left] = (sums[left], sums[right])
    return sums[0]


def leaves(tree: Any) -> list[int]:
    return [leaf for half in tree for leaf in leaves(half)] if isinstance(tree, tuple) else [tree]


@given(SHARES, COUNTS)
def test_any_shares_give_the_additions_of_one_worker(shares: list[range], filled: int) -> None:
    root = range(min(filled, shares[-1].stop))  # the last microbatches of a short step are empty
    found = together(shares, root)
    assert found == together([root], root)
    assert leaves(found) == list(root)


@given(SHARES)
def test_a_worker_gives_away_few_sums(shares: list[range]) -> None:
    root = range(shares[-1].stop)
    for share in shares:
        parts = subtrees(share, root)
        assert [leaf for part in parts for leaf in part] == list(share)
        assert len(parts) <= max(1, 2 * (len(share).bit_length() - 1) + 1)


@given(st.integers(0, 5), st.integers(1, 12))
def test_equal_powers_of_two_give_one_sum_each(logarithm: int, workers: int) -> None:
    shares = own(workers << logarithm, [1.0] * workers)
    assert [subtrees(share, range(workers << logarithm)) for share in shares] == [[share] for share in shares]


@pytest.mark.parametrize(
    ("count", "tree"), [(1, 0), (3, ((0, 1), 2)), (4, ((0, 1), (2, 3))), (7, (((0, 1), (2, 3)), ((4, 5), 6)))]
)
def test_the_tree(count: int, tree: Any) -> None:
    assert together([range(count)], range(count)) == tree


def test_nothing_is_no_sum() -> None:
    assert (subtrees(range(3), range(0)), turns(range(3), range(0)), merges([], range(0))) == ([], {}, [])
