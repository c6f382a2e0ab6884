"""Memory of a training worker and of everything else that is started for it: lepton_ray, torchrun, Ray Train v2.

    python benchmarks/memory.py [--rounds 5] [--quick]

PSS (a page that n processes share counts 1/n to each) of every process that descends from the script, while 2 workers
train the CNN of 1.2 M parameters, a few seconds after their first steps. `worker` is the median over the workers;
`everything else` sums the others: driver, Ray's own processes, controller and scheduler, or torchrun's agent.

Expected before measuring: a worker of ours is torch, Ray and little else, 260 MB, less than DDP's (300 MB), which
imports torch's compiler on the way; Ray Train's worker also has pandas and pyarrow, 400 MB. Everything else 550 MB, of
which the driver's own torch is 150, against 1350 MB.
Targets: worker <= 1.15 x torchrun, everything else <= 0.5 x Ray Train.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from harness import arguments, interleave, median_ratio, report
from launch import family, running, scratch, script, torchrun

WORKERS = 2
STEPS = 100_000
"""More than will be done: the run is ended from outside."""
SETTLE_S = 3.0
OURS = "lepton_ray"
TORCHRUN = "torchrun DDP"
RAY_TRAIN = "Ray Train v2"


def main() -> None:
    asked = arguments(__doc__, quick="one round, without Ray Train")
    with scratch() as folder:
        measure(1 if asked.quick else asked.rounds, folder, has_ray_train=not asked.quick)


def measure(rounds: int, folder: Path, *, has_ray_train: bool) -> None:
    others: dict[str, list[float]] = {}

    def weigh(name: str, command: Sequence[str]) -> Callable[[], float]:
        def once() -> float:
            with running(command, folder, steps=STEPS, workers=WORKERS) as run:
                workers = {mark["pid"] for mark in run.wait_for("warm", WORKERS)}
                time.sleep(SETTLE_S)
                found = {}
                for process in family(run.process.pid):
                    with contextlib.suppress(psutil.Error):
                        found[process.pid] = process.memory_full_info().pss / 2**20
            others.setdefault(name, []).append(sum(mb for pid, mb in found.items() if pid not in workers))
            return statistics.median(found[pid] for pid in workers)

        return once

    commands = {
        OURS: script("ours.py", "module"),
        "lepton_ray, factory": script("ours.py", "factory"),
        TORCHRUN: torchrun("ddp.py", WORKERS),
    }
    if has_ray_train:
        commands[RAY_TRAIN] = script("ray_train.py")
    worker = interleave(rounds, {name: weigh(name, command) for name, command in commands.items()})
    targets = {"worker <= 1.15 x torchrun": median_ratio(worker[OURS], worker[TORCHRUN])}
    if has_ray_train:
        targets["everything else <= 0.5 x Ray Train"] = median_ratio(others[OURS], others[RAY_TRAIN])
    report("memory", OURS, {"worker, MB of PSS": worker, "everything else, MB of PSS": others}, targets=targets)


if __name__ == "__main__":
    main()
