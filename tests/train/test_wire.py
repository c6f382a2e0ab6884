"""Gradients and progress that travel in a shorter number format, between workers that take themselves for two nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lepton_ray import Sync
from tests.train.in_process import Done, run_job

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((256, 40), dtype=np.float32)
Y = X @ RANDOM.standard_normal((40, 3), dtype=np.float32)


def train(storage: str, name: str, sync: Sync) -> Done:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 3))
    options: dict[str, Any] = {
        "batch": 32,
        "loss": "mse",
        "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    }
    return run_job(
        model,
        (X, Y),
        storage=storage,
        name=name,
        num_workers=2,
        nodes="ab",
        epochs=10,
        sync=sync,
        **options,
    )


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize("make", [Sync.every_step, lambda wire: Sync.local(steps=4, fragments=2, wire=wire)])
def test_a_shorter_format_trains_as_well(make: Any, wire: str, storage: str) -> None:
    exact, rounded = train(storage, "exact", make("fp32")), train(storage, "rounded", make(wire))
    assert exact.losses != rounded.losses
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=0.02)
    assert rounded.losses[-1] < 0.5 * rounded.losses[0]
    assert rounded.result.receipt.samples_lost == rounded.result.receipt.samples_repeated == 0


def test_the_choice_is_explained_in_the_journal(storage: str) -> None:
    notes = [record["text"] for record in train(storage, "auto", Sync.every_step("auto")).of("note")]
    assert any("travel as auto; 11276 bytes between nodes of 1, 1 ranks" in text for text in notes)
    assert any("wire formats of a sum of float32: fp32" in text for text in notes)
