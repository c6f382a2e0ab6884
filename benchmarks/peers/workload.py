"""What every method trains, on made-up data, and how a run tells when it did what.

"cnn" has 1.2 M parameters and 64 images per worker and step; "mlp" has 50 M and 32 samples; "lm", a transformer that
reads bytes, 25 M and 2 texts of 128; "tiny" one parameter and one sample, so that nothing but the framework takes time.
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

WARM_STEPS = 5
"""Steps before the measuring of speed begins."""
MOST_IMAGES = 16_384
"""A longer run goes over its data again."""
BATCHES = {"cnn": 64, "mlp": 32, "lm": 2, "tiny": 1}
"""Samples of one step of one worker."""
FEATURES, LAYERS = 4096, 3  # of the MLP: 50.4 M parameters
WIDTH, BLOCKS, TEXT, BYTES = 512, 8, 128, 256  # of the LM: 25.5 M parameters


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
        return BATCHES[self.model]

    @property
    def loss(self) -> str:
        return "mse" if self.model == "tiny" else "cross_entropy"

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
        if self.model == "mlp":
            return generator.standard_normal((samples, FEATURES), dtype=np.float32), generator.integers(0, 10, samples)
        if self.model == "lm":
            text = generator.integers(0, BYTES, (samples, TEXT + 1))
            return text[:, :-1].copy(), text[:, 1:].copy()
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
    if run.model == "mlp":
        hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
        return Marking(*hidden, nn.Linear(FEATURES, 10))
    if run.model == "lm":
        return Marking(*language_model())
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


def language_model() -> list[torch.nn.Module]:
    """Make the layers of a transformer that predicts the next byte: from bytes_BL to scores_BVL, as losses want them.

    Dims: B samples, L positions, D features, V byte values.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bytes, self.positions = nn.Embedding(BYTES, WIDTH), nn.Parameter(torch.zeros(TEXT, WIDTH))
            nn.init.normal_(self.bytes.weight, std=0.02)  # of 1 come gradients so small that CPUs slow down

        def forward(self, bytes_BL: torch.Tensor) -> torch.Tensor:
            return self.bytes(bytes_BL) + self.positions

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            wide = 4 * WIDTH
            self.after = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH))

        def forward(self, input_BLD: torch.Tensor) -> torch.Tensor:
            heads = self.mix(self.before(input_BLD)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            hidden_BLD = input_BLD + self.out(mixed.transpose(1, 2).flatten(2))
            return hidden_BLD + self.after(hidden_BLD)

    class Head(nn.Linear):
        def forward(self, input_BLD: torch.Tensor) -> torch.Tensor:
            return super().forward(input_BLD).transpose(1, 2)

    return [Embed(), *(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH), Head(WIDTH, BYTES)]


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
