"""Evaluate and predict: a pass over data without gradients, shared block by block among the workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

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


class Counts(Protocol):
    """Metrics as numbers that add up over microbatches and workers."""

    def update(self, outputs: Any, target: Any) -> None:
        """Count a block."""

    def prime(self, outputs: Any, target: Any) -> None:
        """Learn from a block, without counting it, how long `vector` is; for a worker that has none of its own."""

    def vector(self) -> torch.Tensor:
        """Return all counts, 1-D float64 on the CPU."""

    def result(self, counts: torch.Tensor) -> dict[str, float]:
        """Return the metrics by name from counts summed over the workers, and start anew."""


class Sums:
    """The counts of metrics that are sums with weights."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._counts = torch.zeros(len(metrics), 2, dtype=torch.float64)

    def update(self, outputs: Any, target: Any) -> None:
        for row, metric in zip(self._counts, self._metrics.values()):
            total, weight = metric(outputs, target)
            row += torch.tensor([float(total), float(weight)], dtype=torch.float64)

    def prime(self, outputs: Any, target: Any) -> None:
        """Nothing to learn: two counts per metric."""

    def vector(self) -> torch.Tensor:
        return self._counts.flatten()

    def result(self, counts: torch.Tensor) -> dict[str, float]:
        self._counts.zero_()
        pairs = counts.view(-1, 2).tolist()
        return finish({name: (total, weight) for name, (total, weight) in zip(self._metrics, pairs)})


@torch.no_grad()
def evaluate(
    model: Model,
    objective: Objective,
    counts: Counts,
    source: Source | Stream,
    *,
    block_samples: int,
    precision: str,
    peers: Peers,
    device: torch.device,
) -> dict[str, float]:
    """Return the mean loss and the metrics over all of `source`; the same numbers on every worker."""
    loss_sum = weight = 0.0
    seen = 0
    model.train(False)
    try:
        for _, batch in own_blocks(source, block_samples, peers, device):
            with autocast(precision, device):
                outcome = objective(model, batch)
            loss_sum, weight, seen = loss_sum + float(outcome.loss_sum), weight + outcome.weight, seen + 1
            counts.update(outcome.outputs, outcome.target)
        if not seen:  # fewer blocks than workers
            _, batch = next(blocks(source, block_samples))
            outcome = objective(model, to_device(batch, device))
            counts.prime(outcome.outputs, outcome.target)
    finally:
        model.train(True)
    sums = torch.cat([torch.tensor([loss_sum, weight], dtype=torch.float64), counts.vector()])
    peers.allreduce(sums)
    return {"loss": float(sums[0] / sums[1]), **counts.result(sums[2:])}


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
