"""What every method trains: a CNN of 1.2 M parameters on made-up images, and how a run tells what it did and when.

torch is imported by the functions that need it, so that a driver can do without.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH = 64
"""Samples of one step of one worker."""
WORKERS = 2
BATCHES = 16
"""Different batches of a worker; a run goes over them again and again."""
WARM_STEPS = 5
"""Steps before the measuring of speed begins."""


@dataclass(frozen=True)
class Run:
    """What a driver tells its workers: their environment is that of the cluster, not that of the driver."""

    marks: str
    """A file to which every process of the run appends JSON lines."""
    steps: int

    @classmethod
    def asked(cls) -> Run:
        """Read what the benchmark asked of this driver."""
        return cls(marks=os.environ["BENCH_MARKS"], steps=int(os.environ["BENCH_STEPS"]))

    def mark(self, name: str) -> None:
        """Append name, wall-clock time and pid: one small write, so that processes do not mix theirs."""
        line = json.dumps({"mark": name, "t": time.time(), "pid": os.getpid()}) + "\n"
        handle = os.open(self.marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, line.encode())
        os.close(handle)


def images(workers: int) -> tuple[Any, Any]:
    """Return the data of all workers as numpy arrays."""
    import numpy as np

    generator = np.random.default_rng(0)
    samples = BATCH * BATCHES * workers
    x = generator.standard_normal((samples, 1, 28, 28), dtype=np.float32)
    return x, generator.integers(0, 10, samples)


def make_cnn(run: Run) -> torch.nn.Module:
    """Make the model. It marks when its steps begin: its forwards in training mode, counted.

    The second forward begins when the first step is finished, whoever makes the steps. (A hook of the optimizer would
    say so too, but makes torch import its compiler at the first step.)
    """
    import torch
    from torch import nn

    marked = {2: "first_step", WARM_STEPS + 1: "warm", run.steps: "last_step"}

    class Marking(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.calls += 1
                if self.calls in marked:
                    run.mark(marked[self.calls])
            return super().forward(x)

    torch.manual_seed(0)
    return Marking(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train(run: Run, model: torch.nn.Module, rank: int, workers: int) -> None:
    """Train as one writes it by hand; `model` is wrapped by whatever joins the workers."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array)[rank::workers] for array in images(workers))
    optimizer = make_optimizer(model)
    for step in range(run.steps):
        at = step % BATCHES * BATCH
        optimizer.zero_grad()
        cross_entropy(model(x[at : at + BATCH]), y[at : at + BATCH]).backward()
        optimizer.step()
