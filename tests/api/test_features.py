"""What a user can ask of a training, each seen from outside, and against plain torch where there is an equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lepton_ray import (
    Batch,
    Callback,
    Checkpoints,
    DistributedTrainer,
    EarlyStopping,
    PerEpoch,
    Result,
    RunFailed,
    journal,
)
from lepton_ray.callbacks import RunView, TensorBoard
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import newest

pytestmark = pytest.mark.slow

SAMPLES, FEATURES, CLASSES = 46, 5, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(SAMPLES, FEATURES))
Y = (X @ RANDOM.normal(size=(FEATURES, CLASSES))).argmax(1)
BATCH = Batch(samples=12, microbatches=2)  # 46 = 3 x 12 + 10
STEPS = 4  # one epoch
WAIT_S = 60

Records = list[dict[str, Any]]


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def train(
    storage: str, model: Any = None, data: Any = (X, Y), test: Any = None, **options: Any
) -> tuple[Result, Records]:
    """Train on one worker (or more) and return the result and the run's records."""
    options = {"batch": BATCH, "optimizer": sgd, "storage": storage} | options
    job = DistributedTrainer(net() if model is None else model, data, test, **options).submit()
    result = job.wait(timeout_s=WAIT_S)
    return result, journal.read(Folder(result.path))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def of(records: Records, event: str) -> Records:
    return [record for record in records if record["event"] == event]


def losses(records: Records) -> list[float]:
    return [record["train_loss"] for record in of(records, "step")]


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


# --- what a result is ------------------------------------------------------------------------------------------------


def test_a_result_holds_the_users_own_model_trained(ray_cluster: None, storage: str) -> None:
    import ray.train

    model, before = net(), net()
    mine = DistributedTrainer(
        model,
        (X, Y),
        (X, Y),
        num_workers=2,
        epochs=2,
        batch=BATCH,
        optimizer=sgd,
        metrics=["accuracy"],
        storage=storage,
    )
    result = mine.submit().wait(timeout_s=WAIT_S)
    assert result.model() is model
    assert_same_weights(model, plain(before, 2 * STEPS, cross_entropy))
    # Names and numbers.
    assert set(result.metrics) == {"train_loss", "test_loss", "test_accuracy"}
    assert [epoch["epoch"] for epoch in result.history] == [0, 1]
    assert set(result.metrics) < set(result.history[0])
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    assert (result.receipt.steps, result.receipt.samples) == (2 * STEPS, 2 * SAMPLES)
    # The checkpoint is Ray Train's class over a folder of safetensors.
    assert isinstance(result.checkpoint, ray.train.Checkpoint)
    with result.checkpoint.as_directory() as folder:
        assert {"manifest.json"} < set(map(str, (p.name for p in Path(folder).iterdir())))
    # Evaluation and prediction are those of the plain model, in the order of the data.
    with torch.no_grad():
        outputs = model(torch.from_numpy(X))
        loss = float(nn.functional.cross_entropy(outputs, torch.from_numpy(Y)))
    np.testing.assert_allclose(mine.predict((X, Y)), outputs.numpy(), atol=1e-12)
    np.testing.assert_allclose(mine.predict(X[:7]), outputs[:7].numpy(), atol=1e-12)
    found = mine.evaluate()
    assert found["loss"] == pytest.approx(loss)
    assert found["loss"] == pytest.approx(result.metrics["test_loss"])
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1).numpy() == Y).mean()))
    assert mine.evaluate((X[:5], Y[:5]))["accuracy"] == pytest.approx(
        float((outputs[:5].argmax(1).numpy() == Y[:5]).mean())
    )


def test_reproducible_runs_end_with_the_same_bits(ray_cluster: None, storage: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    digests = {
        train(storage, copy.deepcopy(model), num_workers=2, reproducible=True)[0].receipt.weights_sha256
        for _ in range(2)
    }
    assert len(digests) == 1


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
        torch.manual_seed(2)
        self.table = nn.Embedding(8, CLASSES).double()

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table(tokens.clamp(min=0)), tokens >= 0


def token_loss(outputs: tuple[torch.Tensor, torch.Tensor], label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over the tokens that count, and how many these are."""
    scores, counts = outputs
    each = nn.functional.cross_entropy(scores.flatten(0, 1), label.repeat_interleave(scores.shape[1]), reduction="none")
    return (each * counts.flatten()).sum(), counts.sum()


def test_a_mean_over_tokens_is_exact_however_they_are_shared(ray_cluster: None, storage: str) -> None:
    """A Dataset with collate, dict batches, a factory as the model, and a loss of (sum, weight)."""

    def mean_over_tokens(model: nn.Module, ids: np.ndarray) -> torch.Tensor:
        batch = pad([Sentences()[int(i)] for i in ids])
        total, weight = token_loss(model(batch["tokens"]), batch["label"])
        return total / weight

    expected = plain(Reader(), STEPS, mean_over_tokens)
    for workers in (1, 2):
        result, _ = train(storage, Reader, Sentences(), collate=pad, loss=token_loss, num_workers=workers)
        assert_same_weights(result.model(Reader()), expected)


def test_parquet_files_are_read_like_arrays(ray_cluster: None, storage: str, tmp_path: Path) -> None:
    for part in range(2):
        rows = slice(part * 23, part * 23 + 23)
        table = pa.table({"x": pa.array(list(X[rows]), pa.list_(pa.float64())), "y": pa.array(Y[rows])})
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    result, _ = train(storage, data=str(tmp_path / "*.parquet"), num_workers=2)
    assert_same_weights(result.model(), plain(net(), STEPS, cross_entropy))


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return iter([(X[i], int(Y[i])) for i in range(SAMPLES)])


def test_a_stream_is_trained_in_its_order_with_a_short_last_batch(ray_cluster: None, storage: str) -> None:
    result, records = train(storage, data=Numbers(), loss="cross_entropy", num_workers=2, epochs=2)
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH.samples):
            optimizer.zero_grad()
            cross_entropy(model, np.arange(start, min(start + BATCH.samples, SAMPLES))).backward()
            optimizer.step()
    assert_same_weights(result.model(), model)
    assert (result.receipt.steps, result.receipt.samples) == (2 * STEPS, 2 * SAMPLES)
    assert [epoch["step"] for epoch in of(records, "epoch")] == [STEPS, 2 * STEPS]


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


def test_parameter_groups_frozen_and_unused_parameters_are_as_in_torch(ray_cluster: None, storage: str) -> None:
    model = Partly()
    before = copy.deepcopy(model)
    expected = plain(copy.deepcopy(model), STEPS, cross_entropy, two_rates)
    result, _ = train(storage, model, num_workers=2, optimizer=two_rates)
    assert_same_weights(result.model(), expected, atol=1e-8)
    # Without a gradient there is no step, so weight decay leaves them alone.
    assert torch.equal(model.idle.weight, before.idle.weight)
    assert torch.equal(model.body[0].weight, before.body[0].weight)


def test_clipping_is_that_of_torch(ray_cluster: None, storage: str) -> None:
    norms: list[float] = []

    def clip(model: nn.Module) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))

    expected = plain(net(), STEPS, cross_entropy, before_step=clip)
    result, records = train(storage, num_workers=2, batch=Batch(samples=12, microbatches=2, clip_norm=0.2))
    assert_same_weights(result.model(), expected, atol=1e-6)  # torch adds 1e-6 to the norm
    np.testing.assert_allclose([record["grad_norm"] for record in of(records, "step")], norms, rtol=1e-6)
    assert max(norms) > 0.2


class Loud(nn.Module):
    """Multiplies its outputs, so that gradients at fp16's first loss scale have no room in fp16."""

    def __init__(self, loudness: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.loudness = nn.Linear(FEATURES, CLASSES), loudness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.loudness


def test_half_precision_stays_near_full(ray_cluster: None, storage: str) -> None:
    data = (X.astype(np.float32), Y)
    full, _ = train(storage, Loud(1), data, num_workers=2, epochs=2)
    for precision in ("bf16", "fp16"):
        half, records = train(storage, Loud(1), data, num_workers=2, epochs=2, precision=precision)
        assert half.metrics["train_loss"] == pytest.approx(full.metrics["train_loss"], rel=0.02)
        assert half.receipt.weights_sha256 != full.receipt.weights_sha256
        assert not any(record.get("skipped") for record in of(records, "step"))


def test_an_overflow_is_skipped_by_all_workers_and_is_no_error(ray_cluster: None, storage: str) -> None:
    result, records = train(
        storage, Loud(50), (X.astype(np.float32), Y), num_workers=2, epochs=2, precision="fp16", loss="cross_entropy"
    )
    skipped = [bool(record.get("skipped")) for record in of(records, "step")]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # the scale falls until there is room
    assert np.isfinite(losses(records)).all()
    assert result.receipt.steps == 2 * STEPS


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def test_a_scheduler_advances_per_step_or_per_epoch(ray_cluster: None, storage: str) -> None:
    """A record shows the rate of its step. The first run also validates and saves every 3 steps, of 8."""
    often = Checkpoints(every_steps=3, keep=9)
    result, records = train(storage, test=(X, Y), epochs=2, scheduler=halving, validate_every=3, checkpoints=often)
    assert [record["lr"] for record in of(records, "step")] == pytest.approx(
        [0.1 / 2**step for step in range(2 * STEPS)]
    )
    assert [record["step"] for record in of(records, "validated")] == [3, 6, 8]
    assert result.metrics["test_loss"] == of(records, "validated")[-1]["test_loss"]
    assert [record["step"] for record in of(records, "checkpoint_saved")] == [0, 3, 6, 8]
    _, records = train(storage, epochs=2, scheduler=PerEpoch(halving))
    assert [record["lr"] for record in of(records, "step")] == pytest.approx([0.1] * STEPS + [0.05] * STEPS)


# --- step_fn ---------------------------------------------------------------------------------------------------------


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


def plain_gan(steps: int, noise: np.ndarray) -> tuple[nn.Module, list[float], list[float]]:
    model = Gan()
    optimizers = make_list(model)
    judge_losses, maker_losses = [], []
    for _, ids in zip(range(steps), batches(steps)):
        found = gan_step(model, (torch.from_numpy(X[ids]), torch.from_numpy(noise[ids])), optimizers)
        judge_losses.append(found["loss"].item())
        maker_losses.append(found["maker_loss"].item())
    return model, judge_losses, maker_losses


@pytest.mark.parametrize(("make", "workers"), [(make_list, 1), (make_list, 2), (make_dict, 2)])
def test_two_optimizers_in_a_step_of_ones_own(
    make: Callable[[Any], Any], workers: int, ray_cluster: None, storage: str
) -> None:
    noise = np.random.default_rng(1).normal(size=(SAMPLES, 2))
    model, judge_losses, maker_losses = plain_gan(6, noise)
    options: dict[str, Any] = {"batch": 12, "step_fn": gan_step, "optimizer": make, "steps": 6}
    result, records = train(storage, Gan(), (X, noise), num_workers=workers, **options)
    assert losses(records) == pytest.approx(judge_losses, abs=1e-9)
    assert [record["maker_loss"] for record in of(records, "step")] == pytest.approx(maker_losses, abs=1e-9)
    assert_same_weights(result.model(), model, atol=1e-8)


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
    step_fn: Callable[..., Any], microbatches: int, ray_cluster: None, storage: str
) -> None:
    """Neither way does weight decay touch what is frozen or not used."""
    expected = plain(Half(), STEPS, lambda model, ids: cross_entropy(model.used, ids), decaying)
    batch = Batch(samples=12, microbatches=microbatches)
    result, _ = train(storage, Half(), step_fn=step_fn, optimizer=decaying, num_workers=2, batch=batch)
    assert_same_weights(result.model(), expected)


# --- callbacks, evaluation, checkpoints ------------------------------------------------------------------------------


class Diary(Callback):
    """Writes down which hook was called, in the run's folder."""

    def note(self, run: RunView, text: str) -> None:
        with open(f"{run.path}/diary.txt", "a") as file:
            file.write(f"{text}\n")

    def on_step(self, run: RunView, record: Mapping[str, Any]) -> None:
        self.note(run, f"step {record['step']}")

    def on_epoch(self, run: RunView, record: Mapping[str, Any]) -> None:
        assert "test_accuracy" in record
        self.note(run, f"epoch {record['epoch']}")

    def on_checkpoint(self, run: RunView, record: Mapping[str, Any]) -> None:
        self.note(run, f"checkpoint {record['step']}")

    def on_end(self, run: RunView, record: Mapping[str, Any]) -> None:
        self.note(run, f"end {record['step']}")


def test_hooks_are_called_in_step_order_and_tensorboard_has_its_file(ray_cluster: None, storage: str) -> None:
    result, records = train(
        storage, test=(X, Y), metrics="accuracy", epochs=2, num_workers=2, callbacks=[Diary(), TensorBoard()]
    )
    diary = (Path(result.path) / "diary.txt").read_text().split("\n")[:-1]
    regular = [line for line in diary if not line.startswith("checkpoint")]
    first, second = (["step " + str(step) for step in range(start, start + STEPS)] for start in (0, STEPS))
    assert regular == [*first, "epoch 0", *second, "epoch 1", f"end {2 * STEPS}"]
    # A checkpoint is told of once it is safe, which the writing thread decides.
    saved = [record["step"] for record in of(records, "checkpoint_saved")]
    assert [int(line.split()[1]) for line in diary if line.startswith("checkpoint")] == saved == [0, STEPS, 2 * STEPS]
    assert diary.index(f"checkpoint {STEPS}") > diary.index("step 3")
    assert list((Path(result.path) / "tensorboard").glob("events.out.tfevents.*"))


def test_early_stopping_ends_a_run_that_counts_as_finished(ray_cluster: None, storage: str) -> None:
    result, records = train(
        storage,
        test=(X, Y),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),  # so nothing ever improves
        epochs=50,
        num_workers=2,
        callbacks=[EarlyStopping("test_loss", patience=2)],
    )
    assert len(result.history) == 3
    assert result.receipt.steps == 3 * STEPS
    (trained,) = of(records, "trained")
    assert (trained["complete"], records[-1]["outcome"]) == (True, "finished")
    assert "test_loss has not improved" in trained["reason"]
    assert "test_loss" in result.metrics


class Rising(nn.Module):
    """A model whose test loss is best in the middle of a run: its one weight passes the target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(x))


def test_checkpoints_are_kept_by_number_and_by_merit(ray_cluster: None, storage: str) -> None:
    """The training target is 10, the test target 2.2: the weight goes 1, 2, 3, ... and is best at step 2."""
    zeros = np.zeros((4, 1))
    result, records = train(
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
    assert [record["step"] for record in of(records, "validated")] == list(range(1, 8))
    validated = [record["test_loss"] for record in of(records, "validated")]
    assert validated == pytest.approx([1.2, 0.2, 0.8, 1.8, 2.8, 3.8, 4.8])
    folder = Folder(result.path).sub("checkpoints")
    assert folder.names() == ["step-00000002", "step-00000006", "step-00000007"]
    found, problems = newest(folder)
    assert found is not None
    assert (found.step, problems) == (7, [])


def test_a_run_that_never_fits_fp16_fails_in_words(ray_cluster: None, storage: str) -> None:
    """Below a scale of one there is nothing left to lower."""
    with pytest.raises(RunFailed, match="loss turned nan at step 16"):
        train(storage, Loud(float("nan")), (X.astype(np.float32), Y), epochs=9, precision="fp16", loss="cross_entropy")
