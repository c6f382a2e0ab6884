"""Which samples make a microbatch, who owns it, and its random numbers: facts for any sizes."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.batch import bounds, cursor, cut, own, seed_of, steps_per_epoch

SIZES = st.integers(1, 200)
SPEEDS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=12)


def flat(parts: list[range]) -> list[int]:
    return list(chain.from_iterable(parts))


@given(SIZES, SIZES)
def test_an_epoch_visits_every_position_once_and_in_order(samples: int, batch: int) -> None:
    steps = [cursor(step, samples, batch) for step in range(steps_per_epoch(samples, batch))]
    assert flat([range(at.start, at.stop) for at in steps]) == list(range(samples))
    assert [at.is_epoch_end for at in steps] == [False] * (len(steps) - 1) + [True]
    assert all(at.stop - at.start == batch for at in steps[:-1])
    assert {at.epoch for at in steps} == {0}


@given(st.integers(0, 10_000), SIZES, SIZES)
def test_the_next_epoch_is_like_the_first(step: int, samples: int, batch: int) -> None:
    one, later = cursor(step, samples, batch), cursor(step + steps_per_epoch(samples, batch), samples, batch)
    assert later.epoch == one.epoch + 1
    assert (later.start, later.stop, later.is_epoch_end) == (one.start, one.stop, one.is_epoch_end)


@given(SIZES, SIZES)
def test_microbatches_of_a_full_batch_differ_by_one_sample_at_most(batch: int, microbatches: int) -> None:
    offsets = bounds(batch, microbatches)
    sizes = [b - a for a, b in zip(offsets, offsets[1:])]
    assert (offsets[0], offsets[-1], len(sizes)) == (0, batch, microbatches)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(SIZES, SIZES, st.integers(0, 1000), st.data())
def test_a_step_is_cut_without_gap_into_few_even_parts(
    batch: int, microbatches: int, start: int, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(1, batch))
    offsets = bounds(batch, microbatches)
    full, parts = cut(0, batch, offsets), cut(start, start + samples, offsets)
    assert flat(parts) == list(range(start, start + samples))
    sizes = [len(part) for part in parts if part]
    assert all(parts[: len(sizes)])  # the empty ones are the last
    assert max(sizes) - min(sizes) <= 1
    assert all(size <= len(whole) for size, whole in zip(sizes, full))
    assert samples == batch or sum(map(len, full[: len(sizes) - 1])) < samples  # one less would not hold them


def test_a_short_step_in_three_examples() -> None:
    def sizes(samples: int, batch: int, microbatches: int) -> list[int]:
        return [len(part) for part in cut(100, 100 + samples, bounds(batch, microbatches))]

    assert sizes(9, 16, 2) == [5, 4]  # and not 8 and 1, of which BatchNorm could not learn
    assert sizes(18, 24, 4) == [6, 6, 6, 0]
    assert sizes(3, 64, 4) == [3, 0, 0, 0]


@given(st.integers(0, 200), SPEEDS)
def test_every_microbatch_has_one_owner_and_shares_follow_speed(microbatches: int, speeds: list[float]) -> None:
    parts = own(microbatches, speeds)
    assert flat(parts) == list(range(microbatches))
    for part, speed in zip(parts, speeds, strict=True):
        assert abs(len(part) - microbatches * speed / sum(speeds)) < 1 + 1e-6


@given(SIZES, st.integers(1, 12))
def test_equal_speeds_own_alike_and_lower_ranks_get_the_rest(microbatches: int, replicas: int) -> None:
    counts = [len(part) for part in own(microbatches, [1.0] * replicas)]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_ownership_in_three_examples() -> None:
    assert own(4, [1.0, 1.0]) == [range(2), range(2, 4)]
    assert own(4, [3.0, 1.0]) == [range(3), range(3, 4)]
    assert own(1, [1.0, 1.0, 1.0]) == [range(1), range(1, 1), range(1, 1)]


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40), max_size=3))
def test_a_seed_fits_every_generator(seed: int, place: list[int]) -> None:
    assert 0 <= seed_of(seed, *place) < 2**63


def test_places_of_a_run_have_different_seeds() -> None:
    places = [(step, m) for step in range(100) for m in range(100)]
    assert len({seed_of(seed, *place) for place in places for seed in (0, 1)}) == 2 * len(places)


def test_the_mix_is_that_of_split_mix() -> None:
    assert seed_of(0, 0) == 0xE220A8397B1DCDAF >> 1  # the first number that SplitMix64 draws from seed 0
