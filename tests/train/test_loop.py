"""What a user can ask of a training, in one process, and against plain torch where there is an equal.

Ranks are threads here; the same loop on Ray's workers is the affair of tests/api.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lepton_ray import Batch, Checkpoints, EarlyStopping, PerEpoch, RunFailed
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import newest
from tests.train.in_process import Done, run_job
from tests.train.plain import (
    BATCH,
    CLASSES,
    FEATURES,
    NOISE,
    SAMPLES,
    STEPS,
    Gan,
    X,
    Y,
    assert_plain_gan,
    assert_same_weights,
    cross_entropy,
    gan_step,
    make_dict,
    make_list,
    net,
    plain,
    sgd,
)


def train(storage: str, model: Any = None, data: Any = (X, Y), test: Any = None, **options: Any) -> Done:
    """Train with one rank (or more)."""
    options = {"batch": BATCH, "optimizer": sgd, "name": f"job-{len(Folder(storage).names())}"} | options
    return run_job(net() if model is None else model, data, test, storage=storage, **options)


# --- models and data -------------------------------------------------------------------------------------------------


class Sentences(Dataset):
    """Rows of unequal length, as dicts: tokens to pad, and which of them count."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": [index % 7] * (1 + index % 4), "label": int(Y[index])}


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["tokens"]) for row in rows)
    padded = [row["tokens"] + [-1] * (longest - len(row["tokens"])) for row in rows]
    return {"tokens": torch.tensor(padded), "label": torch.tensor([row["label"] for row in rows])}


class Reader(nn.Module):
    """Scores every token; padding is -1."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)  # torch's own is shared by the threads that are workers here
        self.table = nn.Embedding.from_pretrained(torch.randn(8, CLASSES, generator=generator).double(), freeze=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table(tokens.clamp(min=0)), tokens >= 0


def token_loss(outputs: tuple[torch.Tensor, torch.Tensor], label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over the tokens that count, and how many these are."""
    scores, counts = outputs
    each = nn.functional.cross_entropy(scores.flatten(0, 1), label.repeat_interleave(scores.shape[1]), reduction="none")
    return (each * counts.flatten()).sum(), counts.sum()


def test_a_mean_over_tokens_is_exact_however_they_are_shared(storage: str) -> None:
    """A Dataset with collate, dict batches, a factory as the model, and a loss of (sum, weight)."""

    def mean_over_tokens(model: nn.Module, ids: np.ndarray) -> torch.Tensor:
        batch = pad([Sentences()[int(i)] for i in ids])
        total, weight = token_loss(model(batch["tokens"]), batch["label"])
        return total / weight

    expected = plain(Reader(), STEPS, mean_over_tokens)
    for workers in (1, 2):
        done = train(storage, Reader, Sentences(), collate=pad, loss=token_loss, num_workers=workers)
        assert_same_weights(done.result.model(Reader()), expected)


def test_parquet_files_are_read_like_arrays(storage: str, tmp_path: Path) -> None:
    for part in range(2):
        rows = slice(part * 23, part * 23 + 23)
        table = pa.table({"x": pa.array(list(X[rows]), pa.list_(pa.float64())), "y": pa.array(Y[rows])})
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    done = train(storage, data=str(tmp_path / "*.parquet"), num_workers=2)
    assert_same_weights(done.result.model(), plain(net(), STEPS, cross_entropy))


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return iter([(X[i], int(Y[i])) for i in range(SAMPLES)])


def test_a_stream_is_trained_in_its_order_with_a_short_last_batch(storage: str) -> None:
    done = train(storage, data=Numbers(), loss="cross_entropy", num_workers=2, epochs=2)
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH.samples):
            optimizer.zero_grad()
            cross_entropy(model, np.arange(start, min(start + BATCH.samples, SAMPLES))).backward()
            optimizer.step()
    assert_same_weights(done.result.model(), model)
    assert (done.result.receipt.steps, done.result.receipt.samples) == (2 * STEPS, 2 * SAMPLES)
    assert [epoch["step"] for epoch in done.of("epoch")] == [STEPS, 2 * STEPS]


# --- optimizers, precision, schedules --------------------------------------------------------------------------------


class Partly(nn.Module):
    """One part frozen, one part not used, two parts with rates of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.idle = net(), nn.Linear(CLASSES, CLASSES).double(), nn.Linear(2, 2).double()
        self.body[0].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def two_rates(model: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.body.parameters() if p.requires_grad], "lr": 0.02},
        {"params": [*model.head.parameters(), *model.idle.parameters()], "lr": 0.3},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.1)


def test_parameter_groups_frozen_and_unused_parameters_are_as_in_torch(storage: str) -> None:
    model = Partly()
    before = copy.deepcopy(model)
    expected = plain(copy.deepcopy(model), STEPS, cross_entropy, two_rates)
    done = train(storage, model, num_workers=2, optimizer=two_rates)
    assert_same_weights(done.result.model(), expected, atol=1e-8)
    # Without a gradient there is no step, so weight decay leaves them alone.
    assert torch.equal(model.idle.weight, before.idle.weight)
    assert torch.equal(model.body[0].weight, before.body[0].weight)


def test_clipping_is_that_of_torch(storage: str) -> None:
    norms: list[float] = []

    def clip(model: nn.Module) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))

    expected = plain(net(), STEPS, cross_entropy, before_step=clip)
    done = train(storage, num_workers=2, batch=Batch(samples=12, microbatches=2, clip_norm=0.2))
    assert_same_weights(done.result.model(), expected, atol=1e-6)  # torch adds 1e-6 to the norm
    np.testing.assert_allclose([record["grad_norm"] for record in done.of("step")], norms, rtol=1e-6)
    assert max(norms) > 0.2


class Loud(nn.Module):
    """Multiplies its outputs, so that gradients at fp16's first loss scale have no room in fp16."""

    def __init__(self, loudness: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.loudness = nn.Linear(FEATURES, CLASSES), loudness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.loudness


def test_half_precision_stays_near_full(storage: str) -> None:
    data = (X.astype(np.float32), Y)
    full = train(storage, Loud(1), data, num_workers=2, epochs=2)
    for precision in ("bf16", "fp16"):
        half = train(storage, Loud(1), data, num_workers=2, epochs=2, precision=precision)
        assert half.result.metrics["train_loss"] == pytest.approx(full.result.metrics["train_loss"], rel=0.02)
        assert half.result.receipt.weights_sha256 != full.result.receipt.weights_sha256
        assert not any(record.get("skipped") for record in half.of("step"))


def test_an_overflow_is_skipped_by_all_workers_and_is_no_error(storage: str) -> None:
    done = train(
        storage, Loud(50), (X.astype(np.float32), Y), num_workers=2, epochs=2, precision="fp16", loss="cross_entropy"
    )
    skipped = [bool(record.get("skipped")) for record in done.of("step")]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # the scale falls until there is room
    assert np.isfinite(done.losses).all()
    assert done.result.receipt.steps == 2 * STEPS


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def test_a_scheduler_advances_per_step_or_per_epoch(storage: str) -> None:
    """A record shows the rate of its step. The first run also validates and saves every 3 steps, of 8."""
    often = Checkpoints(every_steps=3, keep=9)
    done = train(storage, test=(X, Y), epochs=2, scheduler=halving, validate_every=3, checkpoints=often)
    assert [record["lr"] for record in done.of("step")] == pytest.approx([0.1 / 2**step for step in range(2 * STEPS)])
    assert [record["step"] for record in done.of("validated")] == [3, 6, 8]
    assert done.result.metrics["test_loss"] == done.of("validated")[-1]["test_loss"]
    assert [record["step"] for record in done.of("checkpoint_saved")] == [0, 3, 6, 8]
    done = train(storage, epochs=2, scheduler=PerEpoch(halving))
    assert [record["lr"] for record in done.of("step")] == pytest.approx([0.1] * STEPS + [0.05] * STEPS)


# --- step_fn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "ranks"), [(make_list, 1), (make_dict, 2)])
def test_two_optimizers_in_a_step_of_ones_own(make: Callable[[Any], Any], ranks: int, storage: str) -> None:
    options: dict[str, Any] = {"batch": 12, "step_fn": gan_step, "optimizer": make, "steps": 6}
    done = train(storage, Gan(), (X, NOISE), num_workers=ranks, **options)
    assert len(done.of("step")) == 6
    assert_plain_gan(done.result.model(), done.of("step"))


class Half(nn.Module):
    """Uses one of its two parts; of that one, a weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = net(), net(5)
        self.used[0].weight.requires_grad_(False)


def half_loss(model: Any, batch: Any, optimizer: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model.used(batch[0]), batch[1])


def half_step(model: Any, batch: Any, optimizer: Any) -> torch.Tensor:
    """Step as many plain loops do: with the gradients cleared by the module, not by the optimizer."""
    model.zero_grad()
    loss = half_loss(model, batch, optimizer)
    loss.backward()
    optimizer.step()
    return loss


def decaying(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)


@pytest.mark.parametrize(
    ("step_fn", "microbatches"), [(half_step, 2), (half_loss, 2), (half_loss, 3)], ids=["steps", "returns", "pieces"]
)
def test_a_step_fn_may_step_or_only_return_its_loss(
    step_fn: Callable[..., Any], microbatches: int, storage: str
) -> None:
    """Neither way does weight decay touch what is frozen or not used."""
    expected = plain(Half(), STEPS, lambda model, ids: cross_entropy(model.used, ids), decaying)
    batch = Batch(samples=12, microbatches=microbatches)
    done = train(storage, Half(), step_fn=step_fn, optimizer=decaying, num_workers=2, batch=batch)
    assert_same_weights(done.result.model(), expected)


# --- evaluation and checkpoints --------------------------------------------------------------------------------------


def test_early_stopping_ends_a_run_that_counts_as_finished(storage: str) -> None:
    done = train(
        storage,
        test=(X, Y),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),  # so nothing ever improves
        epochs=50,
        num_workers=2,
        callbacks=[EarlyStopping("test_loss", patience=2)],
    )
    assert len(done.result.history) == 3
    assert done.result.receipt.steps == 3 * STEPS
    (trained,) = done.of("trained")
    assert trained["complete"]
    assert "test_loss has not improved" in trained["reason"]
    assert "test_loss" in done.result.metrics


def test_evaluation_and_prediction_are_of_the_trained_model_and_any_data(storage: str) -> None:
    done = train(storage, test=(X, Y), num_workers=2, metrics=["accuracy"], name="job")
    with torch.no_grad():
        outputs = done.result.model()(torch.from_numpy(X))
        losses = nn.functional.cross_entropy(outputs, torch.from_numpy(Y), reduction="none").numpy()
    is_right = outputs.argmax(1).numpy() == Y
    assert done.result.metrics["test_loss"] == pytest.approx(losses.mean())
    for count in (SAMPLES, 5):
        data = (X[:count], Y[:count])
        side = train(storage, test=data, num_workers=2, metrics=["accuracy"], name="job", mode="evaluate")
        (evaluated,) = side.of("evaluated")
        assert evaluated["metrics"] == pytest.approx(
            {"loss": losses[:count].mean(), "accuracy": is_right[:count].mean()}
        )
    for data, count in (((X, Y), SAMPLES), (X[:7], 7)):
        found = train(storage, test=data, num_workers=2, name="job", mode="predict").outputs
        np.testing.assert_allclose(np.concatenate([block for _, block in found]), outputs[:count].numpy(), atol=1e-12)


class Rising(nn.Module):
    """A model whose test loss is best in the middle of a run: its one weight passes the target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(x))


def test_checkpoints_are_kept_by_number_and_by_merit(storage: str) -> None:
    """The training target is 10, the test target 2.2: the weight goes 1, 2, 3, ... and is best at step 2."""
    zeros = np.zeros((4, 1))
    done = train(
        storage,
        Rising(),
        (zeros, np.full(4, 10.0)),
        (zeros, np.full(4, 2.2)),
        loss="mae",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        batch=4,
        steps=7,
        validate_every=1,
        checkpoints=Checkpoints(every_steps=1, keep=2, best="test_loss"),
    )
    assert [record["step"] for record in done.of("validated")] == list(range(1, 8))
    validated = [record["test_loss"] for record in done.of("validated")]
    assert validated == pytest.approx([1.2, 0.2, 0.8, 1.8, 2.8, 3.8, 4.8])
    folder = Folder(done.result.path).sub("checkpoints")
    assert folder.names() == ["step-00000002", "step-00000006", "step-00000007"]
    found, problems = newest(folder)
    assert found is not None
    assert (found.step, problems) == (7, [])


def test_a_run_that_never_fits_fp16_fails_in_words(storage: str) -> None:
    """Below a scale of one there is nothing left to lower."""
    with pytest.raises(RunFailed, match="loss turned nan at step 16"):
        train(storage, Loud(float("nan")), (X.astype(np.float32), Y), epochs=9, precision="fp16", loss="cross_entropy")


# --- lives of a run --------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What ends a life of a run."""


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=8 * STEPS)


def live(storage: str, name: str, *, seed: int | None = 3, **options: Any) -> Done:
    """Train what has a state in every part of it, up to where EarlyStopping ends it: after the second epoch."""
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "epochs": 8,
        "optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=0.003),
        "scheduler": one_cycle,
        "checkpoints": Checkpoints(every_steps=3),
        "callbacks": [EarlyStopping("test_loss", patience=1, min_delta=100.0)],
        "seed": 11,
    }
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, CLASSES))
    return train(storage, model.double(), test=(X[:20], Y[:20]), name=name, **(settings | options))


def assert_same_run(found: Done, expected: Done) -> None:
    """Compare everything that a disturbance could change."""

    def epochs(done: Done) -> list[dict[str, Any]]:
        return [{k: v for k, v in epoch.items() if k != "samples_per_s"} for epoch in done.result.history]

    assert replace(found.result.receipt, generations=1) == expected.result.receipt
    assert (found.result.receipt.samples_lost, found.result.receipt.samples_repeated) == (0, 0)
    assert found.result.metrics == expected.result.metrics
    assert epochs(found) == epochs(expected)


def test_reproducible_runs_end_with_the_same_bits(storage: str) -> None:
    first, second = (live(storage, name, reproducible=True) for name in ("first", "second"))
    assert_same_run(first, second)
    assert first.result.receipt.steps == 2 * STEPS
    assert first.result.receipt.weights_sha256 != live(storage, "other", seed=4).result.receipt.weights_sha256


def test_a_run_that_fails_at_any_moment_goes_on_exactly(storage: str) -> None:
    """Each run tells nothing of its first life from some record on, fails, and ends in a second life."""
    expected = live(storage, "calm")
    moments = [record["event"] for record in expected.records if record["event"] != "header"]
    assert {"started", "step", "epoch", "validated", "checkpoint_saved", "trained"} <= set(moments)
    for moment in range(len(moments)):
        name = f"moment-{moment}"
        numbers = itertools.count()

        def fail(event: str, fields: dict[str, Any], numbers: Any = numbers, moment: int = moment) -> None:
            if next(numbers) >= moment:
                raise Killed(event)

        with pytest.raises(Killed):
            live(storage, name, at=fail)
        assert_same_run(live(storage, name), expected)


def test_first_checkpoint_holds_weights_that_nobody_seeded(storage: str, tmp_path: Path) -> None:
    def fail(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == 2:
            raise Killed

    rare = Checkpoints(every_steps=1000)
    with pytest.raises(Killed):
        live(storage, "unseeded", seed=None, checkpoints=rare, at=fail)
    copied = str(tmp_path / "copy")
    shutil.copytree(f"{storage}/unseeded", f"{copied}/unseeded")
    first, second = (live(place, "unseeded", seed=None, checkpoints=rare) for place in (storage, copied))
    assert_same_run(first, second)
    assert first.result.receipt.steps == 2 * STEPS


def test_corrupt_checkpoint_is_named_and_the_one_before_taken(storage: str) -> None:
    expected = live(storage, "calm")
    steps: list[int] = []

    def note(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            steps.append(fields["step"])

    cut = live(storage, "corrupt", at=note, wish=lambda: len(steps) >= 4)
    saved = [record["step"] for record in cut.of("checkpoint_saved")]
    assert len(saved) > 2
    assert not cut.of("trained")[-1]["complete"]
    path = f"{storage}/corrupt/checkpoints/step-{saved[-1]:08d}/state-0.safetensors"
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    done = live(storage, "corrupt")
    assert [path in record["reason"] for record in done.of("checkpoint_refused")] == [True]
    assert done.of("resumed")[-1]["step"] == saved[-2]
    assert_same_run(done, expected)
