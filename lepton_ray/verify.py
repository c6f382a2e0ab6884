"""Check a run's journal and model against what its configuration promises, without the code that trained it.

The workers testified, for each microbatch of each step, how many samples they fetched and a digest of their ids. Here
the same is computed anew from the header of the journal: which samples each step had to have, in which order.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from lepton_ray import journal
from lepton_ray.errors import ConfigError
from lepton_ray.storage import Folder

SHOWN = 20
"""Problems that are listed; more are counted."""


def verify(url: str) -> tuple[list[str], list[str]]:
    """Check the run in a folder. Returns what is wrong, and lines that say what was checked.

    Raises ConfigError where there is no run.
    """
    folder = Folder(url)
    records: list[dict[str, Any]] = journal.read(folder)
    header = next((record for record in records if record["event"] == "header"), None)
    if header is None:
        raise ConfigError(f"{folder.url} holds no run: its journal has no header. Name the folder of a run.")
    rows = _rows_that_count(records)
    ends = [record for record in records if record["event"] == "trained"]
    problems = [*_steps(rows, ends), *_samples(rows, header["config"]), *_generations(rows, records)]
    generations, samples = {row["generation"] for row in rows}, sum(_counted(row) for row in rows)
    told = [f"{len(rows)} steps, {samples} samples, {len(generations)} generations"]
    if ends and ends[-1]["complete"]:
        problems += _weights(folder, ends[-1]["sha256"])
        told.append(f"weights sha256 {ends[-1]['sha256']}")
    else:
        told.append("the run has not ended: its weights are not checked")
    return problems, told


def _rows_that_count(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """List the records of steps, but for those that a later start from a checkpoint made void."""
    starts = [(r["generation"], r["step"]) for r in records if r["event"] in ("started", "resumed")]
    steps = [record for record in records if record["event"] == "step"]
    return [
        row
        for row in steps
        if not any(generation > row["generation"] and row["step"] >= step for generation, step in starts)
    ]


def _counted(row: Mapping[str, Any]) -> int:
    return sum(n for n, _ in row["work"])


def _steps(rows: Sequence[Mapping[str, Any]], ends: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each step once, none left out, up to the end."""
    found = [row["step"] for row in rows]
    last = ends[-1]["step"] if ends else max(found, default=-1) + 1
    seen = set(found)
    problems = [f"step {step} is not on record" for step in range(last) if step not in seen]
    times = Counter(found)
    problems += [f"step {step} is on record {times[step]} times" for step in sorted(seen) if times[step] > 1]
    problems += [f"step {step} is on record, but the run had {last}" for step in sorted(seen) if step >= last]
    return problems


def _samples(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """Each microbatch had the samples that were its own."""
    batch, parts = config["batch"]["samples"], config["batch"]["microbatches"]
    length, seed = config["train_data"].get("samples"), config["seed"]
    problems: list[str] = []
    known = {(row["step"], row["epoch"]) for row in rows}
    ids, of_epoch, begun = np.empty(0, np.int64), -1, 0
    for row in sorted(rows, key=lambda row: row["step"]):
        step, epoch = row["step"], row["epoch"]
        if epoch != of_epoch:
            of_epoch, begun = epoch, step
            ids = _order(seed, epoch, length) if length is not None else ids
        start = (step - begun) * batch
        if length is not None:
            if step // -(-length // batch) != epoch:
                problems.append(f"step {step} is on record in epoch {epoch}")
                continue
            start = step % -(-length // batch) * batch
            whole = ids[start : start + batch]
        else:  # how long a stream is, only its end tells
            whole = np.arange(start, start + (batch if (step + 1, epoch) in known else _counted(row)))
        for m, ((count, digest), own) in enumerate(zip(row["work"], _cut(whole, batch, parts))):
            if count != len(own):
                what = "lost" if count < len(own) else "repeated"
                problems.append(f"step {step}, microbatch {m}: {abs(count - len(own))} samples {what}")
            elif digest != (zlib.crc32(own.astype("<i8").tobytes()) if count else 0):
                problems.append(f"step {step}, microbatch {m}: other samples than its own")
        if len(row["work"]) != parts:
            problems.append(f"step {step} has {len(row['work'])} microbatches instead of {parts}")
    return problems


def _order(seed: int, epoch: int, samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(samples)
    return np.argsort(bits, kind="stable")


def _cut(whole: np.ndarray[Any, np.dtype[np.int64]], batch: int, parts: int) -> list[np.ndarray[Any, Any]]:
    """Cut the samples of a step into microbatches, as the guide promises."""
    full = [0, *accumulate(batch // parts + (m < batch % parts) for m in range(parts))]
    needed = next(j for j in range(parts + 1) if full[j] >= len(whole))
    even = [len(whole) // needed + (m < len(whole) % needed) for m in range(needed)] if needed else []
    ends = [*accumulate(even + [0] * (parts - needed))]
    return [whole[start:end] for start, end in zip([0, *ends], ends)]


def _generations(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Later steps are of the same or a later generation, and each generation says why there is one."""
    problems = []
    ordered = sorted(rows, key=lambda row: row["step"])
    for before, after in zip(ordered, ordered[1:]):
        if after["generation"] < before["generation"]:
            problems.append(
                f"step {after['step']} is of generation {after['generation']}, step {before['step']} of "
                f"{before['generation']}"
            )
    formed = {record["generation"] for record in records if record["event"] == "generation"}
    unknown = sorted({row["generation"] for row in rows} - formed)
    return problems + [f"generation {number} made steps, and was never formed" for number in unknown]


def _bytes() -> Any:
    import torch  # not at the top: the command line starts without it

    return torch.uint8


def _weights(folder: Folder, digest: str) -> list[str]:
    """The trained weights are those that the workers agreed on."""
    from safetensors.torch import load

    try:
        tensors = load(folder.read("model.safetensors"))
        hashed = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            hashed.update(tensor.reshape(-1).view(dtype=_bytes()).numpy())
        found = hashed.hexdigest()
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being read
        return [f"the trained weights cannot be read: {error}"]
    return [] if found == digest else [f"the trained weights have the sha256 {found}, the workers ended with {digest}"]
