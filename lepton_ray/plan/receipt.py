"""Account for every sample of a run, from what its workers testified of each microbatch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lepton_ray.plan.batch import bounds, cursor, cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a run did, as its workers recorded it."""

    steps: int
    """Steps that made the model."""
    samples: int
    """Samples in those steps, each microbatch counted once."""
    samples_lost: int
    """Samples of microbatches that no worker recorded."""
    samples_repeated: int
    """Samples of microbatches that were recorded more than once."""
    generations: int
    """Sets of workers that made the model, one after another."""
    weights_sha256: str | None
    """Digest of the trained weights; None while the run has not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """What is on record of a run's work."""

    steps: Mapping[int, Sequence[Mapping[str, Any]]]
    """step -> the records of it that count: exactly one, when all is well."""
    generations: int
    done: int
    """Steps that the trained model has by its own record; 0 while there is none."""
    digest: str | None
    samples: int | None
    """Samples of an epoch; None for a stream."""
    batch: int
    microbatches: int


def read(records: Iterable[Mapping[str, Any]]) -> Worked:
    """Find what is on record of the work that made the model.

    Generations are told apart by number, not by the order of records. What a generation recorded for steps from which
    a later one started again is not part of the model, and does not count.
    """
    found: list[Mapping[str, Any]] = []
    starts: dict[int, int] = {}
    ends: dict[int, tuple[int, str]] = {}
    config: Mapping[str, Any] = {}
    for record in records:
        match record["event"]:
            case "header":
                config = record.get("config", {})
            case "started" | "resumed":
                starts[record["generation"]] = record["step"]
            case "step":
                found.append(record)
            case "trained":
                ends[record["generation"]] = (record["step"], record["sha256"])
    steps: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in found:
        if all(record["step"] < start for later, start in starts.items() if later > record["generation"]):
            steps[record["step"]].append(record)
    done, digest = ends[max(ends)] if ends else (0, None)
    batch = config.get("batch", {})
    return Worked(
        steps=steps,
        generations=len({record["generation"] for rows in steps.values() for record in rows}),
        done=done,
        digest=digest,
        samples=config.get("train_data", {}).get("samples"),
        batch=batch.get("samples", 0),
        microbatches=batch.get("microbatches", 0),
    )


def receipt(records: Iterable[Mapping[str, Any]]) -> Receipt:
    """Build the receipt from a run's journal."""
    worked = read(records)
    steps = max((worked.done, *(step + 1 for step in worked.steps)))
    samples = lost = repeated = 0
    for step in range(steps):
        rows = [[n for n, _ in record["work"]] for record in worked.steps.get(step, ())]
        for m, size in enumerate(expected(worked, step)):
            counted = sum(row[m] for row in rows)
            samples += min(size, counted)
            lost += max(0, size - counted)
            repeated += max(0, counted - size)
    return Receipt(
        steps=steps,
        samples=samples,
        samples_lost=lost,
        samples_repeated=repeated,
        generations=worked.generations,
        weights_sha256=worked.digest,
    )


def expected(worked: Worked, step: int) -> list[int]:
    """Return the samples that each microbatch of a step is to have.

    How long a stream is, only its end tells: the last step of an epoch is taken to be as long as it was.
    """
    if not worked.microbatches:  # without its header a journal tells no plan
        return [n for n, _ in worked.steps[step][0]["work"]] if step in worked.steps else []
    offsets = bounds(worked.batch, worked.microbatches)
    if worked.samples is not None:
        at = cursor(step, worked.samples, worked.batch)
        return [len(part) for part in cut(at.start, at.stop, offsets)]
    here, after = worked.steps.get(step), worked.steps.get(step + 1)
    total = worked.batch
    if here and (not after or after[0]["epoch"] != here[0]["epoch"]):
        total = sum(n for n, _ in here[0]["work"])
    return [len(part) for part in cut(0, total, offsets)]
