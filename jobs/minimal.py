"""The shortest use: a plain torch model, two arrays, two workers."""

import numpy as np
from torch import nn

from lepton_ray import DistributedTrainer

if __name__ == "__main__":
    x = np.random.default_rng(0).normal(size=(1000, 20)).astype("float32")
    y = (x[:, 0] > x[:, 1]).astype("int64")
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    result = DistributedTrainer(model, (x[:800], y[:800]), (x[800:], y[800:]), num_workers=2, epochs=5).train()
    print(result.metrics)
