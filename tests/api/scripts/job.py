"""The training that the tests of durability start, stop and kill: everything that has a state is in it."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from lepton_ray import Batch, Checkpoints, DistributedTrainer, EarlyStopping, Faults

SAMPLES, FEATURES, CLASSES, WIDTH = 240, 64, 4, 2048
STEPS_PER_EPOCH = 15
EPOCHS = 8


class Net(nn.Module):
    """BatchNorm, dropout, and enough weights for a checkpoint to take a moment."""

    def __init__(self, pace_s: float, gate: str | None) -> None:
        """pace_s: how long a forward takes. gate: a file without which the seventh forward does not end."""
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.b = nn.Linear(WIDTH, CLASSES)
        self.pace_s, self.gate, self.forwards = pace_s, gate, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            print("a forward of the user's model")
            time.sleep(self.pace_s)
            self.forwards += 1
            while self.gate and self.forwards > 6 and not os.path.exists(self.gate):
                time.sleep(0.01)
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.003)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * STEPS_PER_EPOCH)


def make_trainer(
    storage: str,
    name: str,
    *,
    workers: int = 2,
    pace_s: float = 0.0,
    gate: str | None = None,
    is_seeded: bool = True,
    every_steps: int = 4,
    lease_s: float = 15,
    **options: Any,
) -> DistributedTrainer:
    """Return a trainer that stops early, after the third of its epochs: none is better than the first by so much."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ random.normal(size=(FEATURES, CLASSES))).argmax(1)
    if is_seeded:
        torch.manual_seed(3)
    else:
        torch.seed()
    settings: dict[str, Any] = {
        "num_workers": workers,
        "epochs": EPOCHS,
        "batch": Batch(samples=SAMPLES // STEPS_PER_EPOCH, microbatches=2),
        "loss": "cross_entropy",
        "metrics": ["accuracy"],
        "optimizer": adam,
        "scheduler": one_cycle,
        "checkpoints": Checkpoints(every_steps=every_steps),
        "callbacks": [EarlyStopping("test_loss", patience=2, min_delta=100.0)],
        "faults": Faults(lease_s=lease_s),
        "seed": 11,
    }
    return DistributedTrainer(
        Net(pace_s, gate), (x, y), (x[:60], y[:60]), name=name, storage=storage, **{**settings, **options}
    )
