"""A failure drill: let things go wrong with a small job on the user's own cluster, and show what became of it.

Each drill is a run of its own. The weights are compared with those of a run in which nothing happens.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_ray import journal
from lepton_ray.config import Batch, Checkpoints
from lepton_ray.errors import LeptonError
from lepton_ray.job import Job
from lepton_ray.storage import Folder
from lepton_ray.trainer import DistributedTrainer

SAMPLES, FEATURES, CLASSES = 512, 16, 4
STEPS, STRIKE = 200, 40
"""Steps of a run, and the one after which something happens."""
PACE_S = 0.01
LIMIT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one drill."""

    fault: str
    detected_s: float | None
    """Until the run knew; None when it never had to."""
    recovered_s: float | None
    """Until it trained again."""
    redone: int
    """Steps done a second time."""
    lost: int
    repeated: int
    is_same: bool
    """The weights are those of the calm run, up to rounding."""
    error: str = ""

    @property
    def is_well(self) -> bool:
        """Nothing was lost or doubled, and the model is the same."""
        return self.is_same and not self.error and not self.lost and not self.repeated


Strike = Callable[[Job, Mapping[int, Mapping[str, Any]]], float]
"""What goes wrong: (job, worker records by number). Returns when."""


def _on_node(record: Mapping[str, Any], number: int) -> float:
    """Send a signal to a worker, from a task on its node; return when."""
    import ray

    send = ray.remote(num_cpus=0, resources={f"node:{record['node']}": 0.001})(_send)
    return float(ray.get(send.remote(record["pid"], number), timeout=30))


def _send(pid: int, number: int) -> float:
    now_s = time.time()
    os.kill(pid, number)
    return now_s


def _kill(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    return _on_node(workers[max(workers)], signal.SIGKILL)


def _kill_first(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    return _on_node(workers[min(workers)], signal.SIGKILL)


def _freeze(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    return _on_node(workers[max(workers)], signal.SIGSTOP)


def _kill_all(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    return min([_on_node(record, signal.SIGKILL) for record in workers.values()])


def _shrink(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    asked_s = time.time()
    job.resize(1)
    return asked_s


def _storm(job: Job, workers: Mapping[int, Mapping[str, Any]]) -> float:
    asked_s = time.time()
    for number in (1, len(workers), 1, len(workers)):
        job.resize(number)
        time.sleep(0.2)
    return asked_s


FAULTS: dict[str, Strike] = {
    "a worker is killed": _kill,
    "rank 0 is killed": _kill_first,
    "a worker is frozen": _freeze,
    "all workers are killed": _kill_all,
    "resized to one worker": _shrink,
    "resized four times in a second": _storm,
}


def drill(workers: int, storage: str, faults: Iterable[str], say: Callable[[str], None]) -> list[Outcome]:
    """Do drills, one after the other. say: told what goes on. Raises ConfigError where the cluster is too small."""
    import torch

    calm = _weights(_start(workers, storage, "calm").wait(LIMIT_S))
    outcomes = []
    for fault in faults:
        say(f"{fault} ...")
        job = _start(workers, storage, fault.replace(" ", "-"))
        try:
            struck_s = _strike(job, FAULTS[fault])
            result = job.wait(LIMIT_S)
        except LeptonError as error:
            nothing = Outcome(
                fault=fault,
                detected_s=None,
                recovered_s=None,
                redone=0,
                lost=0,
                repeated=0,
                is_same=False,
                error=str(error).splitlines()[0],
            )
            outcomes.append(nothing)
            continue
        records: list[dict[str, Any]] = journal.read(Folder(job.path))
        detected_s, recovered_s = _times(records, struck_s)
        steps = [record["step"] for record in records if record["event"] == "step"]
        outcomes.append(
            Outcome(
                fault=fault,
                detected_s=detected_s,
                recovered_s=recovered_s,
                redone=len(steps) - len(set(steps)),
                lost=result.receipt.samples_lost,
                repeated=result.receipt.samples_repeated,
                is_same=bool(torch.allclose(_weights(result), calm, rtol=1e-9, atol=1e-12)),
            )
        )
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Any:  # a table of rich, which is imported where it is shown
    """Lay the outcomes out for people."""
    from rich.table import Table

    shown = Table(title="failure drill")
    for column in ("fault", "detected after", "training after", "steps redone", "samples lost / repeated", "weights"):
        shown.add_column(column)
    for each in outcomes:
        if each.error:
            shown.add_row(each.fault, "", "", "", "", each.error)
            continue
        seconds = ["" if s is None else f"{s:.2f} s" for s in (each.detected_s, each.recovered_s)]
        same = "the same" if each.is_same else "OTHERS"
        shown.add_row(each.fault, *seconds, str(each.redone), f"{each.lost} / {each.repeated}", same)
    return shown


def _start(workers: int, storage: str, name: str) -> Job:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((SAMPLES, FEATURES)), generator.integers(0, CLASSES, SAMPLES)
    return DistributedTrainer(
        _model,
        (x, y),
        num_workers=workers,
        loss="cross_entropy",
        optimizer="sgd",
        batch=Batch(samples=32, microbatches=workers),
        steps=STEPS,
        checkpoints=Checkpoints(every_steps=20),
        storage=storage,
        name=f"{name}-{secrets.token_hex(2)}",
    ).submit()


def _model() -> Any:
    import torch

    class Paced(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(PACE_S)  # so that there is a training to disturb
            return super().forward(x)

    return Paced(torch.nn.Linear(FEATURES, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES)).double()


def _strike(job: Job, strike: Strike) -> float:
    """Let it happen after a while of training; return when."""
    workers: dict[int, dict[str, Any]] = {}
    for record in job.events():
        if record["event"] == "worker":
            workers[record["worker"]] = record
        if record["event"] == "step" and record["step"] >= STRIKE:
            break
    return strike(job, workers)


def _times(records: Iterable[Mapping[str, Any]], struck_s: float) -> tuple[float | None, float | None]:
    """Return after how many seconds the run knew, and trained again."""
    detected_s = None
    for record in records:
        if record["t"] < struck_s or record["event"] != "phase":
            continue
        if record["phase"] in ("settling", "pausing", "waiting") and detected_s is None:
            detected_s = record["t"] - struck_s
        if record["phase"] == "training" and detected_s is not None:
            return detected_s, record["t"] - struck_s
    return detected_s, None


def _weights(result: Any) -> Any:
    import torch

    return torch.cat([tensor.flatten() for tensor in result.model(_model()).state_dict().values()])
