"""The receipt: right whatever the order of records, and honest when one is missing, double or altered."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.batch import bounds, cursor, cut
from lepton_ray.plan.receipt import Receipt, receipt

Record = dict[str, Any]


def header(samples: int | None, batch: int, microbatches: int) -> Record:
    data = {} if samples is None else {"samples": samples}
    return {
        "event": "header",
        "config": {"train_data": data, "batch": {"samples": batch, "microbatches": microbatches}},
    }


def step(number: int, sizes: list[int], *, generation: int = 1, epoch: int = 0) -> Record:
    work = [[size, 1000 * number + m] for m, size in enumerate(sizes)]
    return {"event": "step", "step": number, "epoch": epoch, "generation": generation, "work": work}


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Record], int, int]:
    """Draw the journal of an undisturbed, disturbed or resumed run: records, steps, samples."""
    samples, batch = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    microbatches = draw(st.integers(1, min(batch, 5)))
    steps = draw(st.integers(1, 12))
    lives = sorted(draw(st.sets(st.integers(1, steps), max_size=2)) | {0})
    offsets = bounds(batch, microbatches)
    places = [cursor(number, samples, batch) for number in range(steps)]
    sizes = [[len(part) for part in cut(at.start, at.stop, offsets)] for at in places]
    records: list[Record] = [header(samples if draw(st.booleans()) else None, batch, microbatches)]
    generation = 0
    for life, start in enumerate(lives, start=1):
        generation += 1
        # A life that another one followed may have gone on beyond the checkpoint from which that one started.
        stop = steps if life == len(lives) else draw(st.integers(lives[life], steps))
        records.append({"event": "resumed" if start else "started", "generation": generation, "step": start})
        for number in range(start, stop):
            generation += draw(st.sampled_from([0, 0, 0, 1]))  # workers come and go
            records.append(step(number, sizes[number], generation=generation, epoch=places[number].epoch))
    records.append({"event": "trained", "generation": generation, "step": steps, "sha256": "d", "metrics": {}})
    return records, steps, sum(map(sum, sizes))


def counted(records: list[Record]) -> list[Record]:
    """List the records of steps that made the model."""
    starts = {r["generation"]: r["step"] for r in records if r["event"] in ("started", "resumed")}
    return [
        record
        for record in records
        if record["event"] == "step"
        and all(record["step"] < start for later, start in starts.items() if later > record["generation"])
    ]


@given(runs(), st.randoms(use_true_random=False))
def test_a_whole_run_adds_up_in_any_order(run: tuple[list[Record], int, int], shuffle: random.Random) -> None:
    records, steps, samples = run
    generations = len({record["generation"] for record in counted(records)})
    shuffle.shuffle(records)
    assert receipt(records) == Receipt(
        steps=steps,
        samples=samples,
        samples_lost=0,
        samples_repeated=0,
        generations=generations,
        weights_sha256="d",
    )


@given(runs(), st.data())
def test_a_record_that_is_gone_is_lost_and_a_double_one_repeated(
    run: tuple[list[Record], int, int], data: st.DataObject
) -> None:
    records, steps, samples = run
    record = data.draw(st.sampled_from(counted(records)))
    size = sum(n for n, _ in record["work"])
    doubled = receipt([*records, copy.deepcopy(record)])
    assert (doubled.steps, doubled.samples) == (steps, samples)
    assert (doubled.samples_lost, doubled.samples_repeated) == (0, size)
    deleted = receipt([each for each in records if each is not record])
    assert (deleted.steps, deleted.samples, deleted.samples_repeated) == (steps, samples - size, 0)
    assert deleted.samples_lost >= size  # of a stream nobody knows that a step was short


@given(runs(), st.data())
def test_a_microbatch_that_nobody_did_is_lost_and_one_that_two_did_repeated(
    run: tuple[list[Record], int, int], data: st.DataObject
) -> None:
    records, steps, samples = run
    last = {record["epoch"]: record["step"] for record in counted(records)}
    inner = [
        r for r in counted(records) if last[r["epoch"]] != r["step"] or "samples" in records[0]["config"]["train_data"]
    ]
    if not inner:
        return
    work = data.draw(st.sampled_from(inner))["work"]
    m = data.draw(st.sampled_from([m for m, (n, _) in enumerate(work) if n]))
    size = work[m][0]
    work[m][0] = 0
    assert (receipt(records).samples_lost, receipt(records).samples_repeated) == (size, 0)
    work[m][0] = 2 * size
    assert (receipt(records).samples_lost, receipt(records).samples_repeated) == (0, size)


def test_what_a_later_generation_did_again_counts_once() -> None:
    records = [
        header(12, 4, 1),
        {"event": "started", "generation": 1, "step": 0},
        *(step(number, [4]) for number in range(3)),
        {"event": "resumed", "generation": 2, "step": 1},
        *(step(number, [4], generation=2) for number in (1, 2)),
    ]
    assert receipt(records) == Receipt(
        steps=3, samples=12, samples_lost=0, samples_repeated=0, generations=2, weights_sha256=None
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_digest_is_that_of_the_last_generation(order: int) -> None:
    records = [
        {"event": "trained", "generation": 1, "step": 1, "sha256": "stopped early", "metrics": {}},
        {"event": "trained", "generation": 2, "step": 2, "sha256": "whole", "metrics": {}},
    ]
    assert receipt(records[::order]).weights_sha256 == "whole"


def test_steps_of_which_nothing_was_recorded_are_missed() -> None:
    records = [
        header(24, 8, 2),
        {"event": "started", "generation": 1, "step": 0},
        *(step(number, [4, 4]) for number in range(2)),
        {"event": "trained", "generation": 1, "step": 3, "sha256": "d", "metrics": {}},
    ]
    assert receipt(records) == Receipt(
        steps=3, samples=16, samples_lost=8, samples_repeated=0, generations=1, weights_sha256="d"
    )
