"""Evaluate and predict: a pass over data without gradients, shared block by block among the workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch

from lepton_ray.data.batch import TARGET_KEYS, Batch, aligned, split_target, to_device, tree_map
from lepton_ray.data.feed import blocks
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.plan.batch import seed_of
from lepton_ray.train.exact import ExactSum
from lepton_ray.train.metrics import Metric, finish
from lepton_ray.train.model import Model
from lepton_ray.train.objective import Objective, call
from lepton_ray.train.peers import Peers
from lepton_ray.train.precision import autocast
from lepton_ray.train.pulse import PULSE
from lepton_ray.train.step import seed_everything


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """How data is passed through a model without training."""

    block_samples: int
    precision: str
    seed: int
    peers: Peers
    device: torch.device
    is_exact: bool = False
    """Which worker passes which block must make no difference, not in one bit."""

    def blocks(self, model: Model, source: Source | Stream, *, is_alone: bool = False) -> Iterator[tuple[int, Batch]]:
        """Yield the numbered blocks of this worker: every world-th, from its rank on; of one that is alone, all.

        Random draws, of a `transform=` for example, depend on the seed and the number of the block only.
        """
        rank, world = (0, 1) if is_alone else (self.peers.rank, self.peers.world)
        found = blocks(source, self.block_samples, rank=rank, world=world)
        for number in count(rank, world):
            PULSE.beat()
            own_seed = seed_of(self.seed, number)
            seed_everything(own_seed, self.device)
            model.seed(own_seed)
            block = next(found, None)
            if block is None:
                return
            batch = to_device(block[1], self.device)
            yield number, aligned(batch) if self.is_exact else batch


class Counts(Protocol):
    """Metrics as numbers that add up over microbatches and workers."""

    def update(self, outputs: Any, target: Any) -> None:
        """Count a block."""

    def reset(self) -> None:
        """Forget what was counted, of a pass that was broken off."""

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

    def reset(self) -> None:
        self._counts.zero_()

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
    how: Pass,
) -> dict[str, float]:
    """Return the mean loss and the metrics over all of `source`; the same numbers on every worker."""
    loss_sum = weight = 0.0
    exact: ExactSum | None = None
    seen = 0
    counts.reset()
    model.train(False)
    try:
        for _, batch in how.blocks(model, source):
            with autocast(how.precision, how.device):
                outcome = objective(model, batch)
            loss_sum, weight, seen = loss_sum + float(outcome.loss_sum), weight + outcome.weight, seen + 1
            counts.update(outcome.outputs, outcome.target)
            if how.is_exact:
                sums = _joined(loss_sum, weight, counts)
                exact = exact or ExactSum(len(sums))
                exact.add(sums)
                loss_sum = weight = 0.0
                counts.reset()
        if not seen:  # fewer blocks than workers
            _, batch = next(how.blocks(model, source, is_alone=True), (0, None))
            if batch is None:
                raise ConfigError("there is nothing to evaluate: the data gave no sample. Check what it reads.")
            outcome = objective(model, batch)
            counts.prime(outcome.outputs, outcome.target)
    finally:
        model.train(True)
    sums = _joined(loss_sum, weight, counts)
    if how.is_exact:
        sums = (exact or ExactSum(len(sums))).over(how.peers)
    else:
        how.peers.allreduce(sums)
    return {"loss": float(sums[0] / sums[1]), **counts.result(sums[2:])}


def _joined(loss_sum: float, weight: float, counts: Counts) -> torch.Tensor:
    return torch.cat([torch.tensor([loss_sum, weight], dtype=torch.float64), counts.vector()])


@torch.no_grad()
def predict(model: Model, source: Source | Stream, how: Pass) -> list[tuple[int, Any]]:
    """Return this worker's numbered blocks of outputs, as numpy arrays in the structure that the model returns."""
    model.train(False)
    outputs: list[tuple[int, Any]] = []
    for index, batch in how.blocks(model, source):
        inputs = _inputs(batch)
        with autocast(how.precision, how.device):
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
