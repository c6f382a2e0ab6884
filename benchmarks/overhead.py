"""Milliseconds of a step of 2 workers that go to its ballot, to watching and recording it, and to `reproducible=True`.

    python benchmarks/overhead.py [--rounds 5] [--quick]

The CNN of 1.2 M parameters with 64 images per worker and step, and the MLP of 50 M with 32 samples; one torch thread
each. Two Ray actors make some steps in turns, a few of each kind, always with the same model, data and collective:
by hand (forward, backward, gradients summed in buckets meanwhile, update), as the trainer makes them (random numbers of
each microbatch, sample ids, and the ballot), and that reproducibly. With 1, 2 and 4 microbatches of a worker: only from
4 on must sums be put aside. A figure is the median over the steps of the slowest rank. Then whole runs of both kinds,
in turns with these: what they take more is heartbeats, journal, records and progress. And one that mirrors its state
every 10 steps into a process that waits on the same two cores.

Expected before measuring, on two cores of a virtual machine: the CNN's step takes 145 ms and the MLP's 0.45 s; a ballot
and what goes with it is 0.3 ms, so within the noise. Reproducible steps add the same numbers in the same calls with 1
and 2 microbatches, and cost nothing (within 2 %); with 4, each gradient is once copied away, set to zero and added: six
passes over them, 4 ms of the CNN and 150 ms of the MLP, whose step then takes 1 s: 3 % and 15 %. Whole runs: 1 ms more,
of which half is the journal's; reproducible ones the same. A mirror is one copy of 10 MB or 400 MB in the training
thread, 3 or 150 ms, and as much again for the thread that sends it, in each tenth step: 1 % and 6 %.
Targets: reproducible to plain steps at most 1.15, everywhere; a whole run to steps by hand at most 1.05; with mirrors
to one without at most 1.03.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import arguments, interleave, median_ratio, report
from launch import running, scratch, script
from ranks import Ranks, ranks

WORKERS = 2
WARM_STEPS = 5  # as in peers/workload.py
MICROBATCHES = (1, 2, 4)
TURNS = 3
"""Of each kind of step in a round."""
STEPS = {"cnn": 5, "mlp": 2}
RUN_STEPS = {"cnn": 40, "mlp": 20}
NAMES = {"cnn": "CNN", "mlp": "MLP"}
BY_HAND, PLAIN, REPRODUCIBLE = "by hand", "steps", "reproducible"
RUN, REPRODUCIBLE_RUN, MIRRORED_RUN = "whole run", "whole run, reproducible", "whole run, mirrored"


def main() -> None:
    asked = arguments(__doc__, quick="one round with the CNN")
    rounds, models = (1, ["cnn"]) if asked.quick else (asked.rounds, list(STEPS))
    measured: dict[str, dict[str, list[float]]] = {}
    targets: dict[str, float] = {}
    with scratch() as folder:
        for model in models:
            name = NAMES[model]
            with ranks(script("step_ranks.py"), folder, WORKERS, model=model) as actors:
                for count in MICROBATCHES:
                    turns = {act: step(actors, act, model, count) for act in (BY_HAND, PLAIN, REPRODUCIBLE)}
                    found = measured[f"{name}, {count} microbatches of a worker, ms"] = interleave(
                        rounds * TURNS, turns
                    )
                    ratio = median_ratio(found[REPRODUCIBLE], found[PLAIN])
                    targets[f"{name}, {count} microbatches: reproducible to plain steps (<= 1.15)"] = ratio
                    ratio = median_ratio(found[PLAIN], found[BY_HAND])
                    targets[f"{name}, {count} microbatches: plain steps to those by hand"] = ratio
                turns = {
                    BY_HAND: step(actors, BY_HAND, model, 1),
                    RUN: whole(folder, model),
                    REPRODUCIBLE_RUN: whole(folder, model, "reproducible"),
                    MIRRORED_RUN: whole(folder, model, "mirrored"),
                }
                found = measured[f"{name}, whole runs, ms"] = interleave(rounds, turns)
                targets[f"{name}: whole run to steps by hand (<= 1.05)"] = median_ratio(found[RUN], found[BY_HAND])
                ratio = median_ratio(found[REPRODUCIBLE_RUN], found[RUN])
                targets[f"{name}: whole runs, reproducible to plain (<= 1.15)"] = ratio
                ratio = median_ratio(found[MIRRORED_RUN], found[RUN])
                targets[f"{name}: whole runs, mirrored to plain (<= 1.03)"] = ratio
    report("overhead", REPRODUCIBLE, measured, targets=targets)


def step(actors: Ranks, act: str, model: str, microbatches: int) -> Callable[[], float]:
    """Return what gives the milliseconds of a step that two actors make."""
    microseconds = actors.measure(act, microbatches, STEPS[model])
    return lambda: microseconds() / 1e3


def whole(folder: Path, model: str, *words: str) -> Callable[[], float]:
    """Return what gives the milliseconds of a step in a run of its own."""
    steps = WARM_STEPS + 1 + RUN_STEPS[model]
    command = script("ours.py", "factory", *words)

    def step_ms() -> float:
        with running(command, folder, steps=steps, workers=WORKERS, model=model) as run:
            last = run.wait_for("last_step", WORKERS)
            run.wait()
        seconds = max(m["t"] for m in last) - max(m["t"] for m in run.marks("warm"))
        return seconds / (steps - 1 - WARM_STEPS) * 1e3

    return step_ms


if __name__ == "__main__":
    main()
