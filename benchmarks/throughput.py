"""Samples per second of 2 workers against torchrun DDP (gloo) and Ray Train; microseconds of a step with no work in it.

    python benchmarks/throughput.py [--rounds 5] [--quick]

The CNN of 1.2 M parameters, 64 images per worker and step, one torch thread each, in short runs that take turns. The
clock runs from the beginning of the slowest worker's step 6 to that of the last step, so that starting is left out.
All methods do the same steps on data in memory; ours also shuffles, writes its journal and shows its progress.
The second table is a model of one parameter on one sample per worker and step: what is left is the framework.

Expected before measuring: samples/s as DDP's within the noise of the machine (a step is 145 ms of convolutions, 5 MB of
gradients go out in two buckets); the framework's own part 0.2 to 0.4 ms with one worker, 0.3 to 0.6 ms with two, since
reducing one number, the ballot and the records are each a few tens of microseconds of Python.
Targets: at least 0.97 x the samples/s of torchrun DDP; a step of the framework alone under 1 ms.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from harness import arguments, interleave, median_ratio, report
from launch import running, scratch, script, torchrun

WORKERS = 2
BATCH, WARM_STEPS = 64, 5  # as in peers/workload.py
OURS = "lepton_ray"
TORCHRUN = "torchrun DDP"
RAY_TRAIN = "Ray Train v2"


def main() -> None:
    asked = arguments(__doc__, quick="one round of fewer steps, without Ray Train")
    with scratch() as folder:
        if asked.quick:
            measure(1, folder, cnn_steps=20, tiny_steps=500, has_ray_train=False)
        else:
            measure(asked.rounds, folder, cnn_steps=100, tiny_steps=3000, has_ray_train=True)


def measure(rounds: int, folder: Path, *, cnn_steps: int, tiny_steps: int, has_ray_train: bool) -> None:
    def step_s(command: Sequence[str], *, workers: int = WORKERS, model: str = "cnn") -> float:
        steps = cnn_steps if model == "cnn" else tiny_steps
        with running(command, folder, steps=steps, workers=workers, model=model) as run:
            last = run.wait_for("last_step", workers)
            run.wait()
        warm = run.marks("warm")
        return (max(m["t"] for m in last) - max(m["t"] for m in warm)) / (steps - 1 - WARM_STEPS)

    cnn = {
        OURS: lambda: step_s(script("ours.py", "factory")),
        TORCHRUN: lambda: step_s(torchrun("ddp.py", WORKERS)),
    }
    if has_ray_train:
        cnn[RAY_TRAIN] = lambda: step_s(script("ray_train.py"))
    tiny = {
        OURS: lambda: step_s(script("ours.py", "factory"), model="tiny"),
        "lepton_ray, 1 worker": lambda: step_s(script("ours.py", "factory"), workers=1, model="tiny"),
        TORCHRUN: lambda: step_s(torchrun("ddp.py", WORKERS), model="tiny"),
    }
    step = interleave(rounds, cnn)
    alone = interleave(rounds, tiny)
    speed = {name: [WORKERS * BATCH / seconds for seconds in those] for name, those in step.items()}
    report(
        "throughput",
        OURS,
        {
            "CNN, samples per second": speed,
            "framework alone, microseconds a step": {name: [s * 1e6 for s in those] for name, those in alone.items()},
        },
        targets={
            "samples/s >= 0.97 x torchrun DDP": median_ratio(speed[OURS], speed[TORCHRUN]),
            "framework alone < 1000 us": statistics.median(alone[OURS]) * 1e6,
        },
    )


if __name__ == "__main__":
    main()
