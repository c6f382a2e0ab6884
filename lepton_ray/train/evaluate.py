"""Evaluate and predict: a pass over data without gradients, shared block by block among the workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lepton_ray.data.batch import TARGET_KEYS, Batch, split_target, to_device, tree_map
from lepton_ray.data.feed import blocks
from lepton_ray.data.sources import Source, Stream
from lepton_ray.train.metrics import Metric, finish
from lepton_ray.train.model import Model
from lepton_ray.train.objective import Objective, call
from lepton_ray.train.peers import Peers
from lepton_ray.train.precision import autocast


def own_blocks(
    source: Source | Stream, block_samples: int, peers: Peers, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """Yield the numbered blocks of the data that this worker evaluates: every world-th, from its rank on."""
    for index, batch in blocks(source, block_samples, rank=peers.rank, world=peers.world):
        yield index, to_device(batch, device)


@torch.no_grad()
def evaluate(
    model: Model,
    objective: Objective,
    metrics: Mapping[str, Metric],
    source: Source | Stream,
    *,
    block_samples: int,
    precision: str,
    peers: Peers,
    device: torch.device,
) -> dict[str, float]:
    """Return the mean loss and the metrics over all of `source`; the same numbers on every worker."""
    names = ["loss", *metrics]
    sums = torch.zeros((len(names), 2), dtype=torch.float64)
    model.train(False)
    try:
        for _, batch in own_blocks(source, block_samples, peers, device):
            with autocast(precision, device):
                outcome = objective(model, batch)
            sums[0] += torch.tensor([float(outcome.loss_sum), outcome.weight], dtype=torch.float64)
            for row, metric in zip(sums[1:], metrics.values()):
                total, weight = metric(outcome.outputs, outcome.target)
                row += torch.tensor([float(total), float(weight)], dtype=torch.float64)
    finally:
        model.train(True)
    peers.allreduce(sums.view(-1))
    return finish({name: (float(total), float(weight)) for name, (total, weight) in zip(names, sums.tolist())})


@torch.no_grad()
def predict(
    model: Model,
    source: Source | Stream,
    *,
    block_samples: int,
    precision: str,
    peers: Peers,
    device: torch.device,
) -> list[tuple[int, Any]]:
    """Return this worker's numbered blocks of outputs, as numpy arrays in the structure that the model returns."""
    model.train(False)
    outputs: list[tuple[int, Any]] = []
    for index, batch in own_blocks(source, block_samples, peers, device):
        inputs = _inputs(batch)
        with autocast(precision, device):
            output = call(model, inputs)
        outputs.append((index, tree_map(_to_numpy, output)))
    return outputs


def _inputs(batch: Batch) -> Batch:
    """Return what the model is called with: a pair is read as (inputs, target), whose target is not needed."""
    has_target = isinstance(batch, Mapping) and any(key in batch for key in TARGET_KEYS)
    return split_target(batch)[0] if has_target or isinstance(batch, (tuple, list)) else batch


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
