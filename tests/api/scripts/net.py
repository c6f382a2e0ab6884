"""The model of `job.py`, apart from it because it needs torch."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

WIDTH = 2048


class Net(nn.Module):
    """BatchNorm, dropout, and enough weights for a checkpoint to take a moment."""

    def __init__(self, features: int, classes: int, pace_s: float = 0.0, gate: str | None = None) -> None:
        """pace_s: how long a forward takes. gate: a file without which the seventh forward does not end."""
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(features, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.b = nn.Linear(WIDTH, classes)
        self.pace_s, self.gate, self.forwards = pace_s, gate, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            print("a forward of the user's model")
            time.sleep(self.pace_s)
            self.forwards += 1
            while self.gate and self.forwards > 6 and not os.path.exists(self.gate):
                time.sleep(0.01)
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))
