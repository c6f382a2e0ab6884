"""The same seed gives the same model for any number of workers: that of a plain loop in one process.

The plain loop below uses nothing of lepton_ray. It follows what docs/guide.md promises: the order of an epoch, the cut
into microbatches, the random numbers of a microbatch, and BatchNorm's statistics folded in the order of microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lepton_ray import Batch, DistributedTrainer
from tests.train.in_process import run_job

SEED = 5
SAMPLES, FEATURES, CLASSES = 90, 6, 3
BATCH, MICROBATCHES = 24, 4  # 90 = 3 x 24 + 18: the last batch of an epoch is short, and its last microbatch empty
OPTIONS: dict[str, Any] = {
    "batch": Batch(samples=BATCH, microbatches=MICROBATCHES),
    "loss": "cross_entropy",
    "seed": SEED,
}
MASK = (1 << 64) - 1


class Net(nn.Module):
    """BatchNorm and dropout, so that statistics and random numbers count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16)
        self.mean = nn.BatchNorm1d(16, momentum=None, affine=False)
        self.drop, self.b = nn.Dropout(0.3), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(torch.relu(self.mean(self.norm(self.a(x))))))


def data(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels that a linear model can learn."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES)).astype(dtype)
    return x, (x @ random.normal(size=(FEATURES, CLASSES))).argmax(1)


def split_mix(seed: int, *numbers: int) -> int:
    """Mix numbers into a seed, as SplitMix64 does."""
    for number in numbers:
        seed = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & MASK
        seed ^= seed >> 31
    return seed >> 1


def plain_loop(
    model: nn.Module, x: np.ndarray, y: np.ndarray, make: Callable[[Any], list[torch.optim.Optimizer]], steps: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train in this process; return the state and the loss of every step."""
    optimizers = make(model)
    losses: list[float] = []
    edges = [BATCH * m // MICROBATCHES for m in range(MICROBATCHES + 1)]
    epoch = 0
    while len(losses) < steps:
        keys = np.random.Philox(key=np.array([SEED, epoch], np.uint64)).random_raw(SAMPLES)
        order = np.argsort(keys, kind="stable")
        for start in range(0, SAMPLES, BATCH):
            if len(losses) == steps:
                break
            chosen = order[start : start + BATCH]
            model.zero_grad()
            total = 0.0
            for m in range(MICROBATCHES):
                part = chosen[edges[m] : edges[m + 1]]
                if len(part) == 0:
                    continue
                torch.manual_seed(split_mix(SEED, len(losses), m))
                outputs = model(torch.from_numpy(x[part]))
                loss = nn.functional.cross_entropy(outputs, torch.from_numpy(y[part]), reduction="sum")
                (loss / len(chosen)).backward()
                total += loss.item()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(total / len(chosen))
        epoch += 1
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, losses


def make_net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def make_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def make_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def sgd(model: Any) -> list[torch.optim.Optimizer]:
    return [make_sgd(model.parameters())]


def adam(model: Any) -> list[torch.optim.Optimizer]:
    return [make_adam(model.parameters())]


def sgd_and_adam(model: Any) -> list[torch.optim.Optimizer]:
    """Give each of them parameters of every kind: a layer's weights, and what comes before or after it."""
    return [make_sgd(model.a.parameters()), make_adam([*model.norm.parameters(), *model.b.parameters()])]


def trained(
    dtype: torch.dtype, make: Callable[[Any], list[torch.optim.Optimizer]], workers: int, steps: int, storage: str
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train on Ray; return the state and the loss of every step."""
    x, y = data(np.float64 if dtype is torch.float64 else np.float32)
    model = make_net(dtype)
    job = DistributedTrainer(
        model,
        (x, y),
        num_workers=workers,
        steps=steps,
        optimizer=make,
        storage=storage,
        **OPTIONS,
    ).submit()
    losses = [record["train_loss"] for record in job.events() if record["event"] == "step"]
    result = job.wait()
    assert result.receipt.samples_lost == result.receipt.samples_repeated == 0
    assert result.receipt.steps == steps
    return result.model().state_dict(), losses


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 3, 2, 1])  # falling, so that the first job starts all processes side by side
def test_float64_weights_are_those_of_a_plain_loop(workers: int, ray_cluster: None, storage: str) -> None:
    expected, _ = plain_loop(make_net(torch.float64), *data(np.float64), sgd_and_adam, steps=10)
    found, _ = trained(torch.float64, sgd_and_adam, workers, 10, storage)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def assert_sgd_is_close(found: dict[str, torch.Tensor]) -> None:
    expected, _ = plain_loop(make_net(torch.float32), *data(np.float32), sgd, steps=20)
    flat = [torch.cat([state[name].double().flatten() for name in expected]) for state in (expected, found)]
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[0].norm()


def assert_adam_has_losses(losses: list[float]) -> None:
    _, expected = plain_loop(make_net(torch.float32), *data(np.float32), adam, steps=20)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 2])
def test_float32_sgd_stays_close_to_a_plain_loop(workers: int, ray_cluster: None, storage: str) -> None:
    found, _ = trained(torch.float32, sgd, workers, 20, storage)
    assert_sgd_is_close(found)


@pytest.mark.slow
def test_float32_adam_has_the_losses_of_a_plain_loop(ray_cluster: None, storage: str) -> None:
    _, losses = trained(torch.float32, adam, 3, 20, storage)
    assert_adam_has_losses(losses)


def test_float32_in_one_process_is_that_of_a_plain_loop(storage: str) -> None:
    options = OPTIONS | {"steps": 20, "storage": storage}
    assert_sgd_is_close(
        run_job(make_net(torch.float32), data(np.float32), name="sgd", optimizer=sgd, **options)
        .result.model()
        .state_dict()
    )
    assert_adam_has_losses(
        run_job(make_net(torch.float32), data(np.float32), name="adam", optimizer=adam, **options).losses
    )
