"""What every method of recovery_time.py and resize_pause.py trains: each update of a weight leaves a mark."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from workload import Run

if TYPE_CHECKING:
    import torch

WIDTHS = {"5M": 1264, "50M": 4064}
BATCH = 8
SAMPLES = 4096
SAVE_EVERY = 10
"""Steps between two checkpoints of those that go on from one."""


def data(run: Run) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.standard_normal((SAMPLES, WIDTHS[run.model]), dtype=np.float32)
    return x, generator.integers(0, 10, SAMPLES)


def make_model(run: Run) -> torch.nn.Module:
    """Make an MLP of 5 or 50 M parameters."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = WIDTHS[run.model]
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def make_optimizer(run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer that marks each step."""
    import torch

    class Marking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            run.mark("stepped")
            return result

    return Marking(model.parameters(), lr=0.001, momentum=0.9)


def train(run: Run, model: torch.nn.Module, rank: int, world: int, save: Any, found: Any) -> None:
    """Train as one writes it by hand, from what `found` holds; save(state) writes a checkpoint."""
    import torch
    from torch.nn import functional

    x, y = (torch.from_numpy(array)[rank::world] for array in data(run))
    optimizer = make_optimizer(run, model)
    first = 0
    if found is not None:
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        first = found["step"]
    for step in range(first, run.steps):
        at = step * BATCH % (len(x) - BATCH)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[at : at + BATCH]), y[at : at + BATCH]).backward()
        run.mark("step", step=step)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})


def checkpoint_path() -> str:
    return os.path.join(os.environ["BENCH_FOLDER"], "checkpoint.pt")
