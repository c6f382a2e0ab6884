"""A small job in which something happens once, to one worker, at a chosen place of its work."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from lepton_ray import Batch, Callback, Checkpoints, DistributedTrainer, Faults, Job, journal
from lepton_ray.callbacks import RunView
from lepton_ray.plan.receipt import Receipt
from lepton_ray.result import Result
from lepton_ray.storage import Folder

PATIENT = Faults(silence_timeout_s=10)
"""On a busy machine a healthy process may be silent for a while."""
SAMPLES, FEATURES, CLASSES = 66, 6, 3
BATCH, MICROBATCHES = 12, 4
STEPS_PER_EPOCH = 6  # the last one is short
EPOCHS = 4
STEPS = EPOCHS * STEPS_PER_EPOCH
LIMIT_S = 120
X = np.random.default_rng(0).standard_normal((SAMPLES, FEATURES))
Y = np.random.default_rng(1).integers(0, CLASSES, SAMPLES)


INSIDE = {
    "sum": "lepton_ray.cluster.peers:RayPeers.allreduce",  # the others wait for this one's gradients
    "ballot": "lepton_ray.train.outbox:Outbox.vote",  # all sums have returned, and the others vote
    "checkpoint": "lepton_ray.train.checkpoint:Checkpointer.save",
    "write": "lepton_ray.train.checkpoint:Checkpointer._write_tensors",  # of a checkpoint, in the background
    "forming": "lepton_ray.collective.mesh:Mesh.form",
    "lend": "lepton_ray.train.job:Task.lend",  # a newcomer is to get the state of this one
    "borrow": "lepton_ray.train.job:Task.borrow",
}
"""Places that the user's code does not see: when this method is called."""
_now = [-1]
"""The step that this process is at."""


@dataclass(frozen=True)
class Happening:
    """What is to happen once: where, at which step, to which worker."""

    what: Callable[[], None]
    where: str
    worker: int
    step: int
    flag: str
    """A file that says that it has happened."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a process; have its own methods tell when they are called. They do their work as ever."""
        self.__dict__.update(state)
        if self.where in INSIDE:
            module, _, path = INSIDE[self.where].partition(":")
            owner, name = getattr(import_module(module), path.split(".")[0]), path.split(".")[1]
            method = getattr(owner, name)
            method = getattr(method, "__wrapped__", method)  # of an earlier run's happening

            @wraps(method)
            def marked(*args: Any, **options: Any) -> Any:
                self(self.where, _now[0])
                return method(*args, **options)

            setattr(owner, name, marked)

    def __call__(self, where: str, step: int) -> None:
        """Let it happen, if this is the place and the time."""
        if where != self.where or step < self.step or not is_worker(self.worker):
            return
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        self.what()


@dataclass(frozen=True)
class Both:
    """Two that are to happen."""

    one: Happening
    other: Happening

    def __call__(self, where: str, step: int) -> None:
        self.one(where, step)
        self.other(where, step)


def is_worker(number: int) -> bool:
    """Tell whether this is the process of a worker: its output goes to a file that says so."""
    return os.readlink("/proc/self/fd/1").endswith(f"worker-{number}.log")


def die() -> None:
    """End this process at once, as if its machine had."""
    os.kill(os.getpid(), signal.SIGKILL)


def exhaust() -> None:
    """Ask for more memory than this process may have."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (64 << 20), limits[1]))
    try:
        np.ones(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def die_soon() -> None:
    """End this process from another thread, while it goes on to sums and ballot."""
    threading.Timer(0.001, die).start()


def freeze() -> None:
    """Stop this process; it never answers again."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Never return; the process answers as ever."""
    threading.Event().wait()


def fail() -> None:
    """Raise an error of the user."""
    raise ValueError("what the user wrote")


def wait_for(path: str) -> None:
    """Wait until there is a file."""
    while not os.path.exists(path):
        time.sleep(0.01)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Callable[[], None]) -> torch.Tensor:
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.act()
        return grads[0], None


class Net(nn.Module):
    """BatchNorm, dropout, and a counter of steps in its state, so that any slip shows."""

    def __init__(self, happening: Happening | Both | None, pace_s: float = 0.0) -> None:
        """pace_s: of a forward, so that others have time to join."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
        ).double()
        self.happening, self.pace_s = happening, pace_s

    def at(self, where: str) -> None:
        if self.happening is not None:
            batches = self.layers[1].num_batches_tracked  # of all workers: rises by the microbatches of a step
            _now[0] = int(batches) // MICROBATCHES
            self.happening(where, _now[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at("forward" if self.training else "evaluate")
        time.sleep(self.pace_s)
        y: torch.Tensor = self.layers(x)
        return _Backward.apply(y, lambda: self.at("backward")) if self.training else y


class Sgd(torch.optim.SGD):
    """An optimizer in whose step something may happen."""

    def __init__(self, model: Net) -> None:
        super().__init__(model.parameters(), lr=0.05, momentum=0.9)
        self.model = [model]  # a list keeps it out of the state

    def step(self, closure: Any = None) -> Any:
        self.model[0].at("update")
        return super().step(closure)


def sgd(model: Any) -> Sgd:
    """Make the optimizer."""
    return Sgd(model)


class Counting(Callback):
    """Remembers the epochs that it saw; a worker that takes its place must know them."""

    def __init__(self, happening: Happening | Both | None) -> None:
        self.epochs: list[int] = []
        self.happening = happening

    def on_step(self, run: RunView, record: Any) -> None:
        if self.happening is not None:
            self.happening("callback", record["step"])

    def on_epoch(self, run: RunView, record: Any) -> None:
        self.epochs.append(record["epoch"])

    def on_end(self, run: RunView, record: Any) -> None:
        Path(run.path, "epochs").write_text(str(self.epochs))

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])


def scene(
    storage: str,
    name: str,
    happening: Happening | Both | None = None,
    *,
    pace_s: float = 0.0,
    size: int = 1,
    **options: Any,
) -> Job:
    """Start the job. It validates and checkpoints in the middle of epochs as well.

    size: workers of a replica; each has a model of its own, from other first weights.
    """
    settings: dict[str, Any] = {
        "num_workers": 2,
        "batch": Batch(samples=BATCH, microbatches=MICROBATCHES),
        "optimizer": sgd,
        "loss": "cross_entropy",
        "epochs": EPOCHS,
        "checkpoints": Checkpoints(every_steps=5),
        "validate_every": 4,
        "callbacks": [Counting(happening)],
        "storage": storage,
        "name": name,
        "seed": 3,
        "faults": PATIENT,
    }
    torch.manual_seed(0)
    model = options.pop("model", None) or (Net(happening, pace_s) if size == 1 else lambda: Net(happening, pace_s))
    trainer = DistributedTrainer(model, (X, Y), (X[:20], Y[:20]), **(settings | options))
    if size > 1:  # nothing that a user can ask for: what a replica of several workers must obey in any case
        trainer._prepared = replace(trainer._prepared, spec=replace(trainer._prepared.spec, size=size))
    return trainer.submit()


def records(job: Job, event: str) -> list[dict[str, Any]]:
    """Return what is in the journal of one kind."""
    return [record for record in journal.read(Folder(job.path)) if record["event"] == event]


def weights(result: Result) -> torch.Tensor:
    """Return the trained weights in one row."""
    state = result.model(Net(None)).state_dict()
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def assert_nothing_lost(job: Job, result: Result, calm: torch.Tensor, *, redone: int = 0) -> None:
    """Check the history, as the workers told it, and the model against that of a calm run.

    redone: steps that may have been done again, from a checkpoint.
    """
    found: Receipt = result.receipt
    assert (found.steps, found.samples) == (STEPS, EPOCHS * SAMPLES)
    assert (found.samples_lost, found.samples_repeated) == (0, 0)
    steps = [record["step"] for record in records(job, "step")]
    back = [(a, b) for a, b in zip(steps, steps[1:]) if b != a + 1]
    assert steps[-1] == STEPS - 1
    assert all(b <= a <= b + redone - 1 for a, b in back), back
    generations = [record["generation"] for record in records(job, "step")]
    assert generations == sorted(generations)
    torch.testing.assert_close(weights(result), calm, rtol=1e-9, atol=1e-12)
    assert Path(job.path, "epochs").read_text() == str([*range(EPOCHS)])
    assert [epoch["epoch"] for epoch in result.history] == [*range(EPOCHS)]
