"""The receipt: right whatever the order of records, and honest when one is missing or double."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.batch import bounds, cursor, cut, own
from lepton_ray.plan.receipt import Receipt, receipt

Record = dict[str, Any]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Record], int, int]:
    """Draw the journal of an undisturbed or resumed run: records, steps, samples."""
    samples, batch = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    microbatches = draw(st.integers(1, min(batch, 5)))
    steps = draw(st.integers(1, 12))
    generations = sorted(draw(st.sets(st.integers(1, steps), max_size=2)) | {0})
    offsets = bounds(batch, microbatches)
    sizes = []
    for step in range(steps):
        at = cursor(step, samples, batch)
        sizes.append([len(part) for part in cut(at.start, at.stop, offsets)])
    records: list[Record] = [{"event": "header"}]
    for generation, start in enumerate(generations, start=1):
        # A generation that another one followed may have gone on beyond the checkpoint from which that one started.
        is_last = generation == len(generations)
        stop = steps if is_last else draw(st.integers(generations[generation], steps))
        event = "resumed" if start else "started"
        records.append({"event": event, "generation": generation, "step": start})
        for part in own(microbatches, [1.0] * draw(st.integers(1, microbatches))):
            rows = [[step, part.start, sizes[step][part.start : part.stop]] for step in range(start, stop)]
            cuts = draw(st.integers(0, len(rows)))
            work = {"event": "work", "generation": generation}
            records += [{**work, "rows": rows[:cuts]}, {**work, "rows": rows[cuts:]}]
    trained = {"event": "trained", "generation": len(generations), "step": steps, "sha256": "d", "metrics": {}}
    return [*records, trained], steps, sum(map(sum, sizes))


@given(runs(), st.randoms(use_true_random=False))
def test_a_whole_run_adds_up_in_any_order(run: tuple[list[Record], int, int], shuffle: random.Random) -> None:
    records, steps, samples = run
    shuffle.shuffle(records)
    assert receipt(records) == Receipt(
        steps=steps, samples=samples, samples_lost=0, samples_repeated=0, weights_sha256="d"
    )


@given(runs(), st.data())
def test_a_row_that_is_gone_is_lost_and_a_double_one_repeated(
    run: tuple[list[Record], int, int], data: st.DataObject
) -> None:
    records, steps, samples = run
    starts = {r["generation"]: r["step"] for r in records if r["event"] in ("started", "resumed")}
    # Rows that made the model: no later generation started at their step or before it.
    live = [
        (record, row)
        for record in records
        if record["event"] == "work"
        for row in record["rows"]
        if all(row[0] < start for generation, start in starts.items() if generation > record["generation"])
    ]
    record, row = data.draw(st.sampled_from(live))
    size = sum(row[2])
    record["rows"].append(row)
    doubled = receipt(records)
    assert (doubled.steps, doubled.samples) == (steps, samples)
    assert (doubled.samples_lost, doubled.samples_repeated) == (0, size)
    record["rows"] = [r for r in record["rows"] if r is not row]
    deleted = receipt(records)
    assert deleted.steps == steps
    assert deleted.samples == samples - size
    assert deleted.samples_repeated == 0
    others = [r for _, r in live if r is not row]
    if any(r[1] == row[1] and len(r[2]) >= len(row[2]) and sum(r[2]) >= size for r in others):
        assert deleted.samples_lost >= size  # a full step is the measure: a short one may be overstated


def test_what_a_later_generation_did_again_counts_once() -> None:
    records = [
        {"event": "started", "generation": 1, "step": 0},
        {"event": "work", "generation": 1, "rows": [[0, 0, [4]], [1, 0, [4]], [2, 0, [4]]]},
        {"event": "resumed", "generation": 2, "step": 1},
        {"event": "work", "generation": 2, "rows": [[1, 0, [4]], [2, 0, [4]]]},
    ]
    assert receipt(records) == Receipt(steps=3, samples=12, samples_lost=0, samples_repeated=0, weights_sha256=None)


@pytest.mark.parametrize("order", [1, -1])
def test_the_digest_is_that_of_the_last_generation(order: int) -> None:
    records = [
        {"event": "trained", "generation": 1, "step": 1, "sha256": "stopped early", "metrics": {}},
        {"event": "trained", "generation": 2, "step": 2, "sha256": "whole", "metrics": {}},
    ]
    assert receipt(records[::order]).weights_sha256 == "whole"


def test_steps_of_which_nothing_was_recorded_are_missed() -> None:
    records = [
        {"event": "started", "generation": 1, "step": 0},
        {"event": "work", "generation": 1, "rows": [[0, 0, [4, 4]], [1, 0, [4, 4]]]},
        {"event": "trained", "generation": 1, "step": 3, "sha256": "d", "metrics": {}},
    ]
    assert receipt(records) == Receipt(steps=3, samples=16, samples_lost=8, samples_repeated=0, weights_sha256="d")
