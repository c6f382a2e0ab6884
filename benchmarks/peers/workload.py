"""What every method trains, on made-up data, and how a run tells when it did what.

"cnn" has 1.2 M parameters and 64 images per worker and step; "tiny" has one parameter and one sample per worker and
step, so that nothing but the framework takes time. torch is imported by the functions that need it, so that a driver
can do without.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WARM_STEPS = 5
"""Steps before the measuring of speed begins."""
MOST_IMAGES = 16_384
"""A longer run goes over its data again."""


@dataclass(frozen=True)
class Run:
    """What a driver tells its workers: their environment is that of the cluster, not that of the driver."""

    marks: str
    """A file to which every process of the run appends JSON lines."""
    steps: int
    workers: int
    model: str

    @classmethod
    def asked(cls) -> Run:
        """Read what the benchmark asked of this driver."""
        asked = os.environ
        return cls(
            marks=asked["BENCH_MARKS"],
            steps=int(asked["BENCH_STEPS"]),
            workers=int(asked.get("BENCH_WORKERS", "2")),
            model=asked.get("BENCH_MODEL", "cnn"),
        )

    @property
    def batch(self) -> int:
        """Samples of one step of one worker."""
        return 64 if self.model == "cnn" else 1

    @property
    def loss(self) -> str:
        return "cross_entropy" if self.model == "cnn" else "mse"

    def mark(self, name: str, **fields: object) -> None:
        """Append name, wall-clock time and pid: one small write, so that processes do not mix theirs."""
        line = json.dumps({"mark": name, "t": time.time(), "pid": os.getpid(), **fields}) + "\n"
        handle = os.open(self.marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, line.encode())
        os.close(handle)

    def data(self) -> tuple[Any, Any]:
        """Return the data of all workers as numpy arrays: whole batches, at most one for each step."""
        import numpy as np

        generator = np.random.default_rng(0)
        step = self.batch * self.workers
        if self.model == "tiny":
            x = generator.standard_normal((self.steps * step, 1), dtype=np.float32)
            return x, 2 * x
        samples = min(self.steps, MOST_IMAGES // step) * step
        x = generator.standard_normal((samples, 1, 28, 28), dtype=np.float32)
        return x, generator.integers(0, 10, samples)


def make_model(run: Run) -> torch.nn.Module:
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
    if run.model == "tiny":
        return Marking(nn.Linear(1, 1, bias=False))
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


def train(run: Run, model: torch.nn.Module, rank: int) -> None:
    """Train as one writes it by hand; `model` is wrapped by whatever joins the workers."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    loss = functional.cross_entropy if run.loss == "cross_entropy" else functional.mse_loss
    x, y = (torch.from_numpy(array)[rank :: run.workers] for array in run.data())
    optimizer = make_optimizer(model)
    for step in range(run.steps):
        at = step * run.batch % len(x)
        optimizer.zero_grad()
        loss(model(x[at : at + run.batch]), y[at : at + run.batch]).backward()
        optimizer.step()
