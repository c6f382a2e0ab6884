"""A small classification and a GAN, and the plain torch loops that say what training them must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lepton_ray import Batch

SAMPLES, FEATURES, CLASSES = 46, 5, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(SAMPLES, FEATURES))
Y = (X @ RANDOM.normal(size=(FEATURES, CLASSES))).argmax(1)
NOISE = np.random.default_rng(1).normal(size=(SAMPLES, 2))
BATCH = Batch(samples=12, microbatches=2)  # 46 = 3 x 12 + 10
STEPS = 4  # one epoch


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batches(steps: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Give the sample ids of each step, as docs/guide.md promises them."""
    for epoch in range(steps):
        keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(SAMPLES)
        order = np.argsort(keys, kind="stable")
        yield from (order[start : start + BATCH.samples] for start in range(0, SAMPLES, BATCH.samples))


def plain(
    model: nn.Module,
    steps: int,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    before_step: Callable[[nn.Module], object] = lambda model: None,
) -> nn.Module:
    """Train in this process with nothing of lepton_ray."""
    optimizer = make(model)
    for _, ids in zip(range(steps), batches(steps)):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        before_step(model)
        optimizer.step()
    return model


def cross_entropy(model: nn.Module, ids: np.ndarray) -> torch.Tensor:
    return nn.functional.cross_entropy(model(torch.from_numpy(X[ids])), torch.from_numpy(Y[ids]))


def assert_same_weights(found: nn.Module, expected: nn.Module, atol: float = 1e-9) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], tensor, rtol=0, atol=atol, msg=lambda t, n=name: f"{n}: {t}"
        )


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.maker, self.judge = nn.Linear(2, FEATURES).double(), nn.Linear(FEATURES, 1).double()


def make_list(model: Any) -> Any:
    return [torch.optim.Adam(model.maker.parameters(), lr=0.05), torch.optim.SGD(model.judge.parameters(), lr=0.1)]


def make_dict(model: Any) -> Any:
    return dict(zip(("maker", "judge"), make_list(model)))


def gan_step(model: Any, batch: Any, optimizers: Any) -> Mapping[str, torch.Tensor]:
    """Train the judge, then the maker. The noise comes with the data: random numbers belong to a microbatch."""
    maker, judge = optimizers.values() if isinstance(optimizers, dict) else optimizers
    real, noise = batch
    bce = nn.functional.binary_cross_entropy_with_logits
    fake = model.maker(noise)
    judge.zero_grad()
    ones, zeros = torch.ones(len(real), 1).double(), torch.zeros(len(real), 1).double()
    judge_loss = bce(model.judge(real), ones) + bce(model.judge(fake.detach()), zeros)
    judge_loss.backward()
    judge.step()
    maker.zero_grad()
    maker_loss = bce(model.judge(fake), ones)
    maker_loss.backward()
    maker.step()
    return {"loss": judge_loss, "maker_loss": maker_loss}


def assert_plain_gan(found: nn.Module, steps: list[dict[str, Any]]) -> None:
    """Compare a trained `Gan` and the records of its steps with those of a plain loop over X and NOISE."""
    model = Gan()
    optimizers = make_list(model)
    assert steps
    for record, ids in zip(steps, batches(len(steps))):
        losses = gan_step(model, (torch.from_numpy(X[ids]), torch.from_numpy(NOISE[ids])), optimizers)
        assert abs(record["train_loss"] - losses["loss"].item()) < 1e-9
        assert abs(record["maker_loss"] - losses["maker_loss"].item()) < 1e-9
    assert_same_weights(found, model, atol=1e-8)
