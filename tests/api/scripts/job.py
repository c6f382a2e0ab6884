"""The training that the tests of durability start, stop and kill: everything that has a state is in it.

The model is made in the workers, so that a driver does not import torch: that takes longer than most of these runs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_ray import Batch, Checkpoints, DistributedTrainer, EarlyStopping, Faults

if TYPE_CHECKING:
    import torch

SAMPLES, FEATURES, CLASSES = 240, 64, 4
STEPS_PER_EPOCH = 15
EPOCHS = 8


def make_net(pace_s: float, gate: str | None) -> torch.nn.Module:
    """Make the model, in the worker."""
    from tests.api.scripts.net import Net

    return Net(FEATURES, CLASSES, pace_s, gate)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    from torch.optim import Adam

    return Adam(model.parameters(), lr=0.003)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    from torch.optim.lr_scheduler import OneCycleLR

    return OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * STEPS_PER_EPOCH)


def make_trainer(
    storage: str,
    name: str,
    *,
    workers: int = 2,
    pace_s: float = 0.0,
    gate: str | None = None,
    model: torch.nn.Module | None = None,
    every_steps: int = 4,
    lease_s: float = 15,
    **options: Any,
) -> DistributedTrainer:
    """Return a trainer that stops early, after the third of its epochs: none is better than the first by so much."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ random.normal(size=(FEATURES, CLASSES))).argmax(1)
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
    made: Any = functools.partial(make_net, pace_s, gate) if model is None else model
    return DistributedTrainer(made, (x, y), (x[:60], y[:60]), name=name, storage=storage, **{**settings, **options})
