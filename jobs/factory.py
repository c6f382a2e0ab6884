"""A model that is too big to send: a function that builds it travels instead, and each worker calls it."""

import numpy as np
from torch import nn

from lepton_ray import DistributedTrainer


def make_model() -> nn.Module:
    """Build the model; runs in every worker, with the same random numbers in each."""
    return nn.Sequential(nn.Linear(20, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1))


if __name__ == "__main__":
    x = np.random.default_rng(0).normal(size=(1000, 20)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    result = DistributedTrainer(make_model, (x[:800], y[:800]), (x[800:], y[800:]), num_workers=2, epochs=3).train()
    print(result.metrics)
