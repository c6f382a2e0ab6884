"""Samples per second of 2 workers whose gradients are large: an MLP of 50 M parameters, a language model of 25 M.

    python benchmarks/train_step.py [--rounds 5] [--quick]

Ours against torchrun DDP (gloo), Ray Train v2, and DDP on our own backend of torch.distributed, in short runs that take
turns. One torch thread and core each; the MLP has 32 samples per worker and step, the LM 2 texts of 128 bytes; SGD with
momentum. The clock runs from the beginning of the slowest worker's step 6 to that of the last step.

"no communication" is the limit that compute sets: the same two processes, each on its own samples, with a plain model
that is never synchronised. Both run at once, so that they share the memory's bandwidth as the others do.

Expected before measuring, on two cores of a virtual machine: the MLP's step is 0.4 s of compute, and its 200 MB take
gloo 0.2 s or more, us 0.03 s: ours 1.4 to 1.6 x DDP, and within 10 % of the limit. The LM's step is 0.6 s, with 100 MB:
1.1 to 1.2 x, within 5 % of the limit. DDP on our backend is between the two, since it copies its gradients into its
buckets and out again, and sums them as private memory.
Targets: at least 1.5 x the samples/s of torchrun DDP with the MLP, 1.15 x with the LM, and as much against Ray Train.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from harness import arguments, interleave, median_ratio, report
from launch import running, scratch, script, torchrun

WORKERS = 2
WARM_STEPS = 5  # as in peers/workload.py
BATCH = {"mlp": 32, "lm": 2}  # as there
NAMES = {"mlp": "MLP of 50 M", "lm": "LM of 25 M"}
LEAST = {"mlp": 1.5, "lm": 1.15}
OURS, TORCHRUN, RAY_TRAIN = "lepton_ray", "torchrun DDP", "Ray Train v2"
ON_OURS, LIMIT = "torchrun DDP on our backend", "no communication"


def main() -> None:
    asked = arguments(__doc__, quick="one round of fewer steps, without Ray Train")
    left_out = [RAY_TRAIN] if asked.quick else []
    if find_spec("lepton_ray.collective.torch_backend") is None:
        left_out.append(ON_OURS)
    for name in left_out:
        print(f"left out: {name}", file=sys.stderr)
    rounds, steps = (1, 10) if asked.quick else (asked.rounds, 30)
    with scratch() as folder:
        speed = {model: measure(rounds, folder, model, steps, left_out) for model in NAMES}
    targets = {
        f"{NAMES[model]}: samples/s to {peer} (>= {LEAST[model]})": median_ratio(found[OURS], found[peer])
        for model, found in speed.items()
        for peer in (TORCHRUN, RAY_TRAIN)
        if peer in found
    }
    for model, found in speed.items():
        targets[f"{NAMES[model]}: part of the limit of compute"] = median_ratio(found[OURS], found[LIMIT])
    measured = {f"{NAMES[model]}, samples per second": found for model, found in speed.items()}
    report("train_step", OURS, measured, targets=targets, left_out=left_out)


def measure(rounds: int, folder: Path, model: str, steps: int, left_out: Sequence[str]) -> dict[str, list[float]]:
    """Return the samples per second of each method, by round."""

    def turn(command: Sequence[str]) -> Callable[[], float]:
        def samples_per_s() -> float:
            with running(command, folder, steps=steps, workers=WORKERS, model=model) as run:
                last = run.wait_for("last_step", WORKERS)
                run.wait()
            seconds = max(m["t"] for m in last) - max(m["t"] for m in run.marks("warm"))
            return WORKERS * BATCH[model] * (steps - 1 - WARM_STEPS) / seconds

        return samples_per_s

    commands = {
        OURS: script("ours.py", "factory"),
        TORCHRUN: torchrun("ddp.py", WORKERS),
        RAY_TRAIN: script("ray_train.py"),
        ON_OURS: torchrun("ddp.py", WORKERS, "lepton"),
        LIMIT: torchrun("ddp.py", WORKERS, "alone"),
    }
    return interleave(rounds, {name: turn(command) for name, command in commands.items() if name not in left_out})


if __name__ == "__main__":
    main()
