"""`reproducible=True`: the same bits of the weights and of everything that is recorded, for any history of workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lepton_ray import Batch, Checkpoints, ConfigError, DistributedTrainer, EarlyStopping
from lepton_ray.collective.calls import SUM
from lepton_ray.collective.tensors import empty, flat, reduction_of
from lepton_ray.data.batch import aligned
from lepton_ray.train import job, ordered, reduce
from lepton_ray.train.exact import ExactSum
from lepton_ray.train.peers import Alone, Peers
from tests.train.in_process import Done, run_job
from tests.train.plain import CLASSES, FEATURES, X, Y, sgd

pytestmark = pytest.mark.slow

Together = Callable[[int, Callable[[Peers], Any]], list[Any]]

DATA, TEST = (X.astype(np.float32), Y), (X[:31].astype(np.float32), Y[:31])


class Norms(nn.Module):
    """Buffers of every rule: moving averages, plain means, counts, and what the last forward leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 33)), nn.Linear(33, CLASSES)
        self.norm, self.mean = nn.BatchNorm1d(33), nn.BatchNorm1d(CLASSES, momentum=None, affine=False)
        self.register_buffer("seen", torch.zeros(3))
        generator = torch.Generator().manual_seed(0)  # torch's own is shared by the threads that are workers here
        for tensor in (*self.parameters(), *self.first.parametrizations.weight[0].buffers()):
            tensor.data = torch.randn(tensor.shape, generator=generator) / 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += x[:, :3].detach().mean(0)
        return self.mean(self.last(torch.relu(self.norm(self.first(x)))))


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05, factor=0.7)


def train(storage: str, workers: int, name: str = "", *, microbatches: int = 6, **options: Any) -> Done:
    settings: dict[str, Any] = {
        "batch": Batch(samples=13, microbatches=microbatches, clip_norm=0.3),  # 46 = 3 x 13 + 7: the last one is short
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "scheduler": plateau,
        "metrics": ["accuracy", "perplexity"],
        "epochs": 2,
        "reproducible": True,
        "checkpoints": Checkpoints(every_steps=3),
    }
    name = name or f"of-{workers}"
    return run_job(Norms, DATA, TEST, storage=storage, name=name, num_workers=workers, **(settings | options))


def facts(done: Done) -> Any:
    """Return all that must be the same, without rounding."""
    told = ("train_loss", "lr", "grad_norm", "skipped", "work")
    steps = {record["step"]: [record.get(name) for name in told] for record in done.of("step")}
    tested = [{k: v for k, v in e.items() if k.startswith(("test_", "train_"))} for e in done.result.history]
    return done.result.receipt.weights_sha256, done.result.metrics, tested, steps


@pytest.fixture(autouse=True)
def _several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 256)
    monkeypatch.setattr(reduce, "FIRST_BUCKET_BYTES", 64)


@pytest.mark.parametrize(("microbatches", "together_bytes"), [(4, 1 << 20), (6, 1 << 20), (6, 0)])
def test_any_number_of_workers_trains_the_same_bits(
    microbatches: int, together_bytes: int, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums travel side by side, and in slices."""
    monkeypatch.setattr(ordered, "TOGETHER_BYTES", together_bytes)
    one, *others = (facts(train(storage, workers, microbatches=microbatches)) for workers in (1, 2, 3, 4))
    for other in others:
        assert other == one


def test_without_it_workers_sum_in_another_order(storage: str) -> None:
    """Or else the other tests would show nothing."""
    found = {train(storage, n, reproducible=False).result.receipt.weights_sha256 for n in (1, 2, 3)}
    assert len(found) > 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_and_its_loss_scale_too(precision: str, storage: str) -> None:
    one, *others = (facts(train(storage, n, precision=precision)) for n in (1, 3))
    assert all(other == one for other in others)


class Interrupted(Exception):
    """The test's own."""


def test_a_run_may_go_on_with_any_number_of_workers(storage: str) -> None:
    expected = facts(train(storage, 2))

    def fail_at(step: int) -> Callable[[str, dict[str, Any]], None]:
        def at(event: str, fields: dict[str, Any]) -> None:
            if event == "step" and fields["step"] == step:
                raise Interrupted

        return at

    for workers, step in ((3, 3), (1, 6)):
        with pytest.raises(Interrupted):
            train(storage, workers, "torn", at=fail_at(step))
    assert facts(train(storage, 4, "torn")) == expected


def test_early_stopping_comes_at_the_same_step(storage: str) -> None:
    found = [
        facts(train(storage, n, epochs=9, callbacks=[EarlyStopping("test_loss", patience=1, min_delta=100.0)]))
        for n in (1, 2)
    ]
    assert found[0] == found[1]
    assert len(found[0][3]) < 9 * 4


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_step_fn_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"reproducible=True .* step_fn .* Use loss="):
        DistributedTrainer(Norms(), DATA, reproducible=True, step_fn=lambda model, batch, optimizer: None)


def test_another_kind_of_device_is_refused(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(job, "_name_of", lambda device: f"device {next(numbers)}")
        with pytest.raises(ConfigError, match="one kind of device .* device 1 .* device 0 "):
            train(storage, 2, "mixed")
    with monkeypatch.context() as patch:
        patch.setattr(job, "_name_of", lambda device: "a lost device")
        with pytest.raises(Interrupted):
            train(storage, 1, "moved", at=_at_the_end)
    with pytest.raises(ConfigError, match="others had a lost device"):
        train(storage, 1, "moved")


def _at_the_end(event: str, fields: dict[str, Any]) -> None:
    if event == "trained":
        raise Interrupted


class Twice(nn.Module):
    """A layer whose gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(2):
            h = torch.utils.checkpoint.checkpoint(self.layer, h, use_reentrant=True, preserve_rng_state=False)
        return self.last(h)


def test_gradients_that_come_in_parts_are_refused(storage: str) -> None:
    with pytest.raises(ConfigError, match="gradient of layer.* twice .* use_reentrant=False"):
        run_job(Twice(), DATA, storage=storage, batch=Batch(samples=12), optimizer=sgd, reproducible=True)


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_two_sums_are_added_as_torch_adds_them(dtype: torch.dtype, together: Together) -> None:
    """The usual all-reduce takes the place of an addition in the tree."""
    for size in (7, 5_000, 300_000):
        scale = torch.logspace(-7, 4, size, dtype=torch.float64)
        own = [
            (torch.randn(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * scale).to(dtype)
            for rank in range(2)
        ]

        def act(peers: Any, own: list[torch.Tensor] = own, size: int = size) -> torch.Tensor:
            total = empty(size, dtype).copy_(own[peers.rank])
            peers._group.allreduce(flat(total)[0], reduction_of(SUM, dtype))  # as Ray's API does
            return total.clone()

        for found in together(2, act):
            assert torch.equal(found, own[0].clone().add_(own[1]))


NUMBERS = st.lists(st.floats(-1e280, 1e280) | st.sampled_from([math.inf, math.nan]), min_size=1, max_size=12)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_an_exact_sum_does_not_depend_on_the_order(numbers: list[float], shuffle: Any) -> None:
    found = _exact(numbers)
    shuffle.shuffle(numbers)
    again = _exact(numbers)
    assert again == found or (math.isnan(again) and math.isnan(found))
    if all(map(math.isfinite, numbers)):
        assert found == math.fsum(numbers)


def _exact(numbers: list[float]) -> float:
    total = ExactSum(1)
    for number in numbers:
        total.add(torch.tensor([number], dtype=torch.float64))
    return float(total.over(Alone()))


@given(st.lists(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2), min_size=1, max_size=9), st.integers(0, 9))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_exact_sum_does_not_depend_on_the_workers(together: Together, rows: list[list[float]], cut: int) -> None:
    def act(peers: Peers) -> list[float]:
        total = ExactSum(2)
        for row in (rows[:cut], rows[cut:])[peers.rank]:
            total.add(torch.tensor(row, dtype=torch.float64))
        return total.over(peers).tolist()

    assert together(2, act) == [[math.fsum(column) for column in zip(*rows)]] * 2


def test_batches_are_moved_to_where_torch_would_put_them() -> None:
    memory = torch.arange(100, dtype=torch.float32)
    moved, word = aligned((memory[1:], "a word"))
    assert (moved.data_ptr() % 64, word) == (0, "a word")
    assert torch.equal(moved, memory[1:])
    assert aligned(memory) is memory
