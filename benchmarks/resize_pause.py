"""Seconds without a step while a run is resized, live: 1 -> 2, 2 -> 4 and 4 -> 2 workers, 5 and 50 M parameters.

    python benchmarks/resize_pause.py [--rounds 5] [--quick]

SGD with momentum, so that a newcomer copies twice the weights. The newcomers start and build the model while the others
train; what is measured is the longest time between two updates of the weights around the change of the generation, in
a worker that stays, less the median time between two until the next change: the first step is made as those after it.

Expected before measuring: a pause is a ballot, a new group (20 to 50 ms), new buckets, and the copy, 40 or 400 MB at 2
to 5 GB/s. Shrinking copies nothing. Targets: median <= 0.15 s with 5 M and <= 0.5 s with 50 M parameters. The peers'
ways, measured elsewhere: Ray Train restarts all workers (15 s), torchft's rejoin takes 0.2 s.
"""

from __future__ import annotations

import statistics
from collections import Counter

from harness import arguments, report
from launch import Running, running, scratch, script

CHANGES = ("1 -> 2", "2 -> 4", "4 -> 2")
SIZES = {"5M": 0.15, "50M": 0.5}


def main() -> None:
    asked = arguments(__doc__, quick="one round of 5 M parameters")
    sizes = ["5M"] if asked.quick else list(SIZES)
    found: dict[str, dict[str, list[float]]] = {size: {change: [] for change in CHANGES} for size in sizes}
    with scratch() as folder:
        for _ in range(1 if asked.quick else asked.rounds):
            for size in sizes:
                command = script("faulty_ours.py", "2", "4", "2")
                with running(command, folder, steps=100_000, workers=1, model=size) as run:
                    run.wait_for("ended", 1)
                    for change, pause_s in zip(CHANGES, _pauses(run)):
                        found[size][change].append(pause_s)
    targets = {
        f"{size} parameters, {change}: median <= {SIZES[size]} s": statistics.median(found[size][change])
        for size in sizes
        for change in CHANGES
    }
    measured = {f"pause, {size} parameters, s": found[size] for size in sizes}
    report("resize_pause", "lepton_ray", measured, targets=targets)


def _pauses(run: Running) -> list[float]:
    """Return the pause at each generation after the first, as the worker that goes through all of them sees it."""
    marks = run.marks("stepped")
    stayed, _ = Counter(mark["pid"] for mark in marks).most_common(1)[0]
    times = [mark["t"] for mark in marks if mark["pid"] == stayed]
    gaps = list(zip(times, times[1:]))
    began = [mark["t"] for mark in run.marks("training")]
    pauses = []
    for change_s, next_s in zip(began[1:], [*began[2:], times[-1]]):
        across = max((gap for gap in gaps if gap[0] < change_s + 0.5 and gap[1] > change_s - 0.5), key=_length)
        after = [gap for gap in gaps if across[1] <= gap[0] and gap[1] < next_s - 0.5]
        pauses.append(_length(across) - statistics.median(map(_length, after)))
    return pauses


def _length(gap: tuple[float, float]) -> float:
    return gap[1] - gap[0]


if __name__ == "__main__":
    main()
