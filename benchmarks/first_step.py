"""Seconds from the shell to the first finished step: lepton_ray, Ray Train v2, torchrun DDP and bare Ray actors.

    python benchmarks/first_step.py [--rounds 5] [--quick]

A CNN of 1.2 M parameters, 64 images per worker and step, 2 workers with one torch thread each. The clock starts when
the shell starts the script, and stops when the slowest worker begins its second forward: then its first step is
finished, with all that the framework does after a step. `cold` includes a local Ray that the script starts.
`running` is on a cluster made by `ray start --head` for this run alone, so that nobody finds anything warm, the first
job on it. `second` is the next job on that cluster, on the workers that the first one left warm. Our model comes from
the driver, which imports torch for it, as a script with an `nn.Module` does, or from a factory, which the workers call;
the drivers of Ray Train and of the bare actors have no torch either.

Expected before measuring: imports decide. Cold, two interpreters with Ray and torch one after another take 6 to
9 s on two cores; Ray Train starts six more processes and imports pandas, pyarrow and torch's compiler on the way, about
30 s. Second, the driver's own imports are what is left: 1 to 1.5 s, and 2 s more where the driver imports torch.
Targets: cold <= 0.4 x Ray Train, running <= 0.3 x Ray Train, second <= 2 s with a factory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from harness import arguments, interleave, median_ratio, report
from launch import cluster, running, scratch, script, torchrun

WORKERS = 2
STEPS = 3
OURS = "lepton_ray"
FACTORY = "lepton_ray, factory"
RAY_TRAIN = "Ray Train v2"
TORCHRUN = "torchrun DDP"
ACTORS = "bare Ray actors + DDP"


def main() -> None:
    asked = arguments(__doc__, quick="one round, without Ray Train")
    with scratch() as folder:
        measure(1 if asked.quick else asked.rounds, folder, has_ray_train=not asked.quick)


def measure(rounds: int, folder: Path, *, has_ray_train: bool) -> None:
    def first_step_s(command: Sequence[str], address: str | None = None) -> float:
        with running(command, folder, address=address, steps=STEPS, workers=WORKERS) as run:
            marks = run.wait_for("first_step", WORKERS)
            run.wait()
        return max(mark["t"] for mark in marks) - run.start_s

    def on_cluster(command: Sequence[str]) -> float:
        with cluster(folder, WORKERS) as address:
            return first_step_s(command, address)

    second: dict[str, list[float]] = {OURS: [], FACTORY: []}

    def ours_on_cluster() -> float:
        with cluster(folder, WORKERS) as address:
            first = first_step_s(script("ours.py", "module"), address)
            second[OURS].append(first_step_s(script("ours.py", "module"), address))
            second[FACTORY].append(first_step_s(script("ours.py", "factory"), address))
            return first

    methods = {
        "cold": {
            OURS: lambda: first_step_s(script("ours.py", "module")),
            FACTORY: lambda: first_step_s(script("ours.py", "factory")),
            TORCHRUN: lambda: first_step_s(torchrun("ddp.py", WORKERS)),
            ACTORS: lambda: first_step_s(script("ray_actors.py")),
            RAY_TRAIN: lambda: first_step_s(script("ray_train.py")),
        },
        "running": {
            OURS: ours_on_cluster,
            FACTORY: lambda: on_cluster(script("ours.py", "factory")),
            ACTORS: lambda: on_cluster(script("ray_actors.py")),
            RAY_TRAIN: lambda: on_cluster(script("ray_train.py")),
        },
    }
    flat = {
        f"{name}, {where}": method
        for where, those in methods.items()
        for name, method in those.items()
        if has_ray_train or name != RAY_TRAIN
    }
    found = interleave(rounds, flat)
    measured = {
        f"first step, {where}, s": {name: found[key] for name in those if (key := f"{name}, {where}") in found}
        for where, those in methods.items()
    }
    targets = {"second, factory <= 2 s": statistics.median(second[FACTORY])}
    if has_ray_train:
        for where, limit in (("cold", 0.4), ("running", 0.3)):
            for name in (OURS, FACTORY):
                targets[f"{name}, {where} <= {limit} x Ray Train"] = median_ratio(
                    found[f"{name}, {where}"], found[f"{RAY_TRAIN}, {where}"]
                )
    measured["first step, second job, s"] = second
    report("first_step", OURS, measured, targets=targets)


if __name__ == "__main__":
    main()
