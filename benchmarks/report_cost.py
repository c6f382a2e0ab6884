"""What it costs the training thread that a step's metrics reach journal and progress line, against ray.train.report.

    python benchmarks/report_cost.py [--rounds 5] [--quick]

Ours: one worker with a model of one parameter, which makes a thousand and more steps a second and reports each.
`whole cost` is the step with records minus the step without, in blocks of one run that take turns: it has everything
that competes with the training thread, such as the sending thread's share of the interpreter. `inside the call` is the
time in `report` itself. The age of a record is what has passed when it is written to the journal, and when the driver
can show it. Peer: `ray.train.report({...})` without a checkpoint, back to back, as Ray comes (its controller looks
every 2 s), and tuned to look every 50 ms (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.05).

Expected before measuring: 1 to 2 us inside the call, which appends to a queue; 50 us as the whole cost, mostly the
pickling by another thread; 0.05 to 0.1 s of age, since records travel in batches.
Target: <= 0.2 ms of the training thread.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from harness import arguments, interleave, report
from launch import running, scratch, script

OURS = "lepton_ray, whole cost"
INSIDE = "lepton_ray, inside the call"


def main() -> None:
    asked = arguments(__doc__, quick="one round of fewer steps, without Ray Train")
    with scratch() as folder:
        if asked.quick:
            measure(1, folder, steps=8000, has_ray_train=False)
        else:
            measure(asked.rounds, folder, steps=24_000, has_ray_train=True)


def measure(rounds: int, folder: Path, *, steps: int, has_ray_train: bool) -> None:
    inside: list[float] = []
    age: dict[str, list[float]] = {"in the journal": [], "in the driver": []}

    def whole_cost_s() -> float:
        with running(script("ours_report.py"), folder, steps=steps, workers=1, model="tiny") as run:
            run.wait()
        (worker,), (driver,) = run.marks("worker"), run.marks("driver")
        known = [(*call, *driver["heard"][step]) for step, call in worker["calls"].items()]
        inside.append(statistics.median(spent for _, spent, _, _ in known))
        age["in the journal"].append(statistics.median(written - at for at, _, written, _ in known))
        age["in the driver"].append(statistics.median(shown - at for at, _, _, shown in known))
        return statistics.median(worker["with_records_s"]) - statistics.median(worker["without_s"])

    def ray_report_s(calls: int) -> float:
        with running(script("ray_report.py"), folder, steps=calls, workers=1) as run:
            (mark,) = run.wait_for("reported", 1)
            run.wait()
        return mark["s"]

    def tuned_s() -> float:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.05"
        try:
            return ray_report_s(40)
        finally:
            del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]

    methods = {OURS: whole_cost_s}
    if has_ray_train:
        methods |= {"ray.train.report": lambda: ray_report_s(4), "ray.train.report, tuned": tuned_s}
    found = interleave(rounds, methods)
    cost_us = {name: [s * 1e6 for s in those] for name, those in ({OURS: found[OURS], INSIDE: inside} | found).items()}
    report(
        "report_cost",
        OURS,
        {
            "training thread, microseconds a report": cost_us,
            "age of a record, s": age,
        },
        targets={"<= 200 us of the training thread": statistics.median(cost_us[OURS])},
    )


if __name__ == "__main__":
    main()
