"""What a training must not get wrong in silence: each case was wrong once, and is checked against plain torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from lepton_ray import Batch, Callback, Checkpoints, ConfigError, EarlyStopping, Faults, RunFailed
from lepton_ray.callbacks import RunView
from lepton_ray.storage import Folder
from lepton_ray.train import blueprint, checkpoint_format, reduce, step
from lepton_ray.train.checkpoint_format import load, newest
from tests.train.in_process import Done, run_job
from tests.train.plain import BATCH, CLASSES, FEATURES, SAMPLES, STEPS, X, Y, cross_entropy, net, plain, sgd

DATA = (X, Y)


class Interrupted(Exception):
    """The test's own."""


def train(storage: str, model: Any = None, test: Any = None, **options: Any) -> Done:
    options = {"optimizer": sgd, "batch": BATCH} | options
    return run_job(net() if model is None else model, DATA, test, storage=storage, **options)


def fail_at(event: str, step: int) -> Callable[[str, dict[str, Any]], None]:
    """Return an `at` that fails when a step's record of some kind is told."""

    def at(found: str, fields: dict[str, Any]) -> None:
        if (found, fields.get("step")) == (event, step):
            raise Interrupted

    return at


def saved_state(storage: str, step: int, name: str = "job") -> Any:
    return load(Folder(f"{storage}/{name}/checkpoints"), step)[1]


# --- numbers ---------------------------------------------------------------------------------------------------------


class Constants(nn.Module):
    """Buffers that no forward changes, beside those that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.norm = nn.BatchNorm1d(CLASSES).double()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("large", torch.tensor([2**62 + 1]))
        self.register_buffer("seen", torch.tensor([2**62 + 1, 5]))
        self.register_buffer("lowest", torch.full((), torch.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
            self.lowest = torch.minimum(self.lowest, torch.tensor(1.0))
        return self.norm(self.inner(x))


@pytest.mark.parametrize("ranks", [1, 2])
def test_buffers_that_no_forward_changes_keep_their_bits(ranks: int, storage: str) -> None:
    done = train(storage, Constants(), num_workers=ranks, batch=Batch(samples=12, microbatches=2))
    for model in done.models:
        found, new = dict(model.user_module.named_buffers()), Constants()
        for name in ("mask", "turns", "large"):
            assert torch.equal(found[name], dict(new.named_buffers())[name]), name
        assert found["seen"].tolist() == [2**62 + 1 + SAMPLES, 5 + SAMPLES]
        assert found["lowest"].isfinite()


class Spectral(nn.Module):
    def __init__(self, spectral: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = spectral(nn.Linear(FEATURES, 8)), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("spectral", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_norm_stays_one(spectral: Callable[[nn.Module], nn.Module], storage: str) -> None:
    batch = Batch(samples=12, microbatches=4)
    done = train(storage, lambda: Spectral(spectral).double(), steps=40, batch=batch)
    first = done.models[0].user_module.first
    lengths = [float(vector.norm()) for name, vector in first.named_buffers() if vector.ndim == 1]
    assert lengths == pytest.approx([1.0, 1.0], abs=1e-6)
    assert float(torch.linalg.matrix_norm(first.weight.detach(), 2)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sparse_gradients_are_summed_as_dense_ones(ranks: int, storage: str) -> None:
    words = np.random.default_rng(0).integers(0, 30, (SAMPLES, 4))

    def weights(name: str, is_sparse: bool) -> torch.Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(30, 6, sparse=is_sparse)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(24, CLASSES)).double()
        batch = Batch(samples=12, microbatches=4)
        run_job(model, (words, Y), storage=storage, name=name, num_workers=ranks, batch=batch, optimizer=sgd, epochs=2)
        return embedding.weight.detach()

    torch.testing.assert_close(weights("sparse", True), weights("dense", False), rtol=1e-12, atol=0)


def test_a_short_last_batch_leaves_no_microbatch_of_one_sample(storage: str) -> None:
    """25 = 16 + 9 samples; torch's BatchNorm refuses to learn from one."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    done = run_job(model, (X[:25], Y[:25]), storage=storage, batch=Batch(samples=16, microbatches=2))
    assert [[samples for samples, _ in record["work"]] for record in done.of("step")] == [[8, 8], [5, 4]]


class Exploding(nn.Module):
    """Finite losses, and at step 5 a gradient that is not."""

    def __init__(self, worst: float) -> None:
        super().__init__()
        self.inner, self.worst, self.calls = net(), worst, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        self.calls += 1
        if self.calls == 2 * 5 + 1:
            y.register_hook(lambda grad: grad * self.worst)
        return y


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_update(
    worst: float, clip_norm: float | None, storage: str
) -> None:
    batch = Batch(samples=12, microbatches=2, clip_norm=clip_norm)
    often = Checkpoints(every_steps=1, keep=100)
    with pytest.raises(RunFailed, match="a gradient turned inf or nan .* at step 5"):
        train(storage, Exploding(worst), epochs=2, batch=batch, checkpoints=often)
    found, problems = newest(Folder(f"{storage}/job/checkpoints"))
    assert (found.step, problems) == (5, [])
    tensors, _ = load(Folder(f"{storage}/job/checkpoints"), 5)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_gradient_too_large_for_a_norm_in_float32_is_none_that_is_not_finite(storage: str) -> None:
    model = nn.Linear(FEATURES, 1)
    data = (X.astype(np.float32), np.full((SAMPLES, 1), 1e25, np.float32))
    done = run_job(
        model, data, storage=storage, steps=2, loss="l1", optimizer="sgd", batch=Batch(samples=12, clip_norm=1.0)
    )
    assert done.result.receipt.steps == 2


def leap(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=torch.inf)


def test_weights_that_are_not_finite_are_neither_saved_nor_a_result(storage: str) -> None:
    with pytest.raises(RunFailed, match="some weights are inf or nan after 1 steps"):
        train(storage, steps=1, optimizer=leap)
    assert newest(Folder(f"{storage}/job/checkpoints"))[0].step == 0
    assert not Folder(f"{storage}/job").exists("model.safetensors")


def test_a_warm_worker_takes_over_no_settings_of_keras() -> None:
    """The driver of the job before had set these; the driver of this one did not load Keras."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    job = replace(blueprint.pack(lambda: nn.Linear(1, 1)), keras_config={})
    blueprint.build(job, torch.device("cpu"), 0)
    assert (keras.config.floatx(), keras.layers.Dense(1).dtype) == ("float32", "float32")


# --- measures --------------------------------------------------------------------------------------------------------


class Watcher(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def on_epoch(self, run: RunView, record: Any) -> None:
        self.epochs.append(dict(record))

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


def test_an_epoch_without_an_evaluation_counts_for_nobody(storage: str) -> None:
    """Evaluated at steps 10, 20, 30 and 40, that is in the epochs 2, 4, 7 and 9 of four steps each."""
    stopping = EarlyStopping(patience=3, min_delta=1e6)
    done = train(
        storage, test=DATA, epochs=11, validate_every=10, callbacks=[stopping], scheduler=plateau, optimizer=sgd
    )
    tested = [record["epoch"] for record in done.of("epoch") if "test_loss" in record]
    assert tested == [2, 4, 7, 9]
    assert [record["step"] for record in done.of("validated")] == [10, 20, 30, 40]
    assert [record["epoch"] for record in done.of("validated")] == tested
    assert done.of("trained")[0]["step"] == 40  # the fourth measure is the third without an improvement
    rates = [record["lr"] for record in done.of("step")]
    assert rates[18:22] == pytest.approx([0.1, 0.1, 0.01, 0.01])  # not before the epoch of the second measure ends
    assert len(set(rates[20:28])) == 1


def test_an_evaluation_at_the_end_of_an_epoch_comes_before_it(storage: str) -> None:
    done = train(storage, test=DATA, epochs=3, validate_every=2 * STEPS)
    kinds = [record["event"] for record in done.records if record["event"] in ("validated", "epoch")]
    assert kinds == ["epoch", "validated", "epoch", "epoch", "validated"]
    assert done.of("epoch")[1]["test_loss"] == done.of("validated")[0]["test_loss"]
    assert "test_loss" not in done.of("epoch")[2]


def test_an_epochs_measures_survive_a_resume(storage: str) -> None:
    options: dict[str, Any] = {
        "test": DATA,
        "epochs": 3,
        "validate_every": 2,
        "checkpoints": Checkpoints(every_steps=3),
    }
    expected = train(storage, name="calm", **options)
    with pytest.raises(Interrupted):
        train(storage, at=fail_at("step", 3), **options)
    found = train(storage, **options)

    def strip(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "samples_per_s"} for record in records]

    assert found.of("resumed")[0]["step"] == 3
    assert strip(found.result.history) == strip(expected.result.history)


def test_the_best_checkpoint_is_that_of_the_best_measure(storage: str) -> None:
    """Saved every 4 steps and measured every 5: what is measured is saved too."""
    limits = Checkpoints(every_steps=4, keep=1, best="test_loss")
    done = train(storage, test=DATA, steps=23, validate_every=5, checkpoints=limits, scheduler=rising)
    measured = {record["step"]: record["test_loss"] for record in done.of("validated")}
    best = min(measured, key=lambda step: measured[step])
    assert Folder(f"{storage}/job/checkpoints").names() == [f"step-{step:08d}" for step in sorted({best, 23})]
    assert saved_state(storage, best)["loop"]["measured"]["test_loss"] == measured[best]
    assert 0 < best < 20


def rising(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 12 else 300.0)


def test_a_best_that_nobody_measures_is_refused_or_told(storage: str) -> None:
    with pytest.raises(ConfigError, match='Did you mean "test_accuracy"'):
        train(storage, test=DATA, checkpoints=Checkpoints(best="accuracy"))
    done = train(storage, test=DATA, checkpoints=Checkpoints(best="test_acuracy"))
    assert [note["text"] for note in done.of("note") if "acuracy" in note["text"]] == [
        "Checkpoints(best='test_acuracy') keeps nothing: what is measured is train_loss, test_loss, test_accuracy."
    ]


def noisy(batch: Any) -> Any:
    x, y = batch
    return x + torch.randn_like(x), y


def test_an_evaluation_with_random_data_depends_on_the_seed_only(storage: str) -> None:
    def losses(name: str, **options: Any) -> list[float]:
        options = {"validate_every": 3, "transform": noisy, "optimizer": still} | options
        done = train(storage, name=name, test=DATA, **options)
        return [record["test_loss"] for record in done.of("validated")]

    first = losses("first")
    assert len(first) == 2  # of the same weights: nothing was trained
    assert first[0] == first[1]
    assert losses("other", seed=1)[0] != first[0]
    alone = run_job(net(), DATA, DATA, storage=storage, name="alone", mode="evaluate", batch=BATCH, transform=noisy)
    assert alone.of("evaluated")[0]["metrics"]["loss"] == first[0]


def still(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_an_evaluation_are_those_of_any_number_of_workers(ranks: int, storage: str) -> None:
    done = run_job(
        net(), DATA, (X,), storage=storage, mode="predict", num_workers=ranks, batch=BATCH, loss="cross_entropy"
    )
    assert [len(block) for _, block in done.outputs] == [6] * 7 + [4]
    expected = net()(torch.from_numpy(X)).detach()
    torch.testing.assert_close(torch.from_numpy(np.concatenate([block for _, block in done.outputs])), expected)


class Numbers(IterableDataset):
    """A stream of the samples, or of nothing."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.passes):
            yield from zip(torch.from_numpy(X), torch.from_numpy(Y))


def test_an_evaluation_of_nothing_is_an_error_in_words(storage: str) -> None:
    with pytest.raises(ConfigError, match="the data gave no sample"):
        train(storage, test=Numbers(0))


def test_an_evaluation_of_a_run_that_was_stopped_takes_its_newest_checkpoint(storage: str) -> None:
    def job(mode: str, name: str, wish: Callable[[], bool] = lambda: False) -> Done:
        torch.manual_seed(0)
        data = torch.randn(12, 3), torch.randn(12, 1)
        settings: dict[str, Any] = {"storage": storage, "loss": "mse", "batch": 3, "mode": mode, "name": name}
        return run_job(nn.Linear(3, 1), data, data, wish=wish, **settings)

    first = job("evaluate", "stopped")
    ballots = itertools.count()
    trained = job("train", "stopped", wish=lambda: next(ballots) >= 2)
    assert 0 < len(trained.losses) < 4
    found = job("evaluate", "stopped")
    assert found.of("note")[0]["text"].endswith(f"its weights after {len(trained.losses)} steps")
    assert found.of("evaluated")[0]["metrics"]["loss"] < first.of("evaluated")[0]["metrics"]["loss"]


def test_averaged_weights_are_measured_and_saved(storage: str) -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9), loss)
    data = (X.astype(np.float32), Y)
    done = run_job(model, data, data, storage=storage, batch=Batch(samples=12, microbatches=2))
    result = model.evaluate(*data, verbose=0)  # the user's own object got the weights
    done.result.model()
    assert model.evaluate(*data, verbose=0) != result
    assert done.result.metrics["test_loss"] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-5)
    tensors, _ = load(Folder(f"{storage}/job/checkpoints"), STEPS)
    for name, tensor in done.models[0].state().items():
        assert torch.equal(tensors[name], tensor)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_stopped_early_does_not_train_on_after_a_resume(storage: str) -> None:
    options: dict[str, Any] = {
        "test": DATA,
        "epochs": 9,
        "callbacks": [EarlyStopping(patience=2, min_delta=1e6)],
        "checkpoints": Checkpoints(every_steps=1000),
    }
    expected = train(storage, name="calm", **options)
    with pytest.raises(Interrupted):
        train(storage, at=fail_at("trained", 3 * STEPS), **options)
    found = train(storage, **options)
    assert found.result.receipt == expected.result.receipt
    assert found.result.receipt.steps == 3 * STEPS


class Other(Watcher):
    """Of another class, though with the same state."""


def test_callbacks_that_come_and_go_between_lives_keep_their_states(storage: str) -> None:
    with pytest.raises(Interrupted):
        train(storage, epochs=3, at=fail_at("step", STEPS + 1), callbacks=[EarlyStopping("train_loss"), Watcher()])
    done = train(storage, epochs=3, callbacks=[Other(), Watcher(), Watcher()])
    assert done.of("resumed")[0]["step"] == STEPS
    assert [len(state["epochs"]) for _, state in saved_state(storage, 3 * STEPS)["callbacks"]] == [2, 3, 2]


def test_a_stream_of_steps_is_saved_on_its_way(storage: str) -> None:
    done = run_job(
        net(),
        Numbers(10_000),
        storage=storage,
        batch=BATCH,
        loss="cross_entropy",
        optimizer=sgd,
        steps=250,
        checkpoints=Checkpoints(keep=100),
    )
    assert [record["step"] for record in done.of("checkpoint_saved")] == [0, 100, 200, 250]
    short = train(storage, name="short", steps=3)
    assert [record["step"] for record in short.of("checkpoint_saved")] == [0, 3]
    epochs = train(storage, name="epochs", steps=2 * STEPS)
    assert [record["step"] for record in epochs.of("checkpoint_saved")] == [0, STEPS, 2 * STEPS]


def test_slow_storage_does_not_hold_up_the_other_workers(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write takes longer than the workers wait for each other: checkpoints fail, and training goes on."""
    opened = threading.Event()
    slow = checkpoint_format.file_pieces

    def pieces(*args: Any) -> Any:
        assert opened.wait(30)
        return slow(*args)

    def at(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == 6:
            opened.set()

    monkeypatch.setattr(checkpoint_format, "file_pieces", pieces)
    often = Checkpoints(every_steps=2, keep=100)
    done = train(storage, num_workers=2, epochs=2, checkpoints=often, faults=Faults(collective_timeout_s=0.2), at=at)
    assert {record["step"] for record in done.of("checkpoint_failed")} >= {2, 4}
    assert done.of("checkpoint_saved")[-1]["step"] == 2 * STEPS
    assert done.result.receipt.steps == 2 * STEPS


# --- step_fn ---------------------------------------------------------------------------------------------------------


def summing(model: Any, batch: Any, optimizer: Any) -> Any:
    """Return a loss in the form (sum, weight), in which a sample of class 0 counts three times."""
    x, y = batch
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    weights = 1.0 + 2.0 * (y == 0)
    return {"loss": ((losses * weights).sum(), weights.sum()), "hits": (model(x).argmax(1) == y).double().mean()}


def weighted(model: nn.Module, ids: np.ndarray) -> torch.Tensor:
    x, y = torch.from_numpy(X[ids]), torch.from_numpy(Y[ids])
    weights = 1.0 + 2.0 * (y == 0)
    return (nn.functional.cross_entropy(model(x), y, reduction="none") * weights).sum() / weights.sum()


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 2), (1, 4), (3, 4)])
def test_a_step_fn_may_return_a_sum_and_its_weight(ranks: int, microbatches: int, storage: str) -> None:
    batch = Batch(samples=12, microbatches=microbatches)
    done = train(storage, step_fn=summing, num_workers=ranks, batch=batch, steps=6)
    expected = plain(net(), 6, weighted)
    for name, tensor in done.models[-1].state().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-12)
    assert all(0 <= record["hits"] <= 1 for record in done.of("step"))


def sometimes(model: Any, batch: Any, optimizer: Any) -> Any:
    x, y = batch
    loss = nn.functional.cross_entropy(model(x), y)
    return {"loss": loss, "size": float(len(x))}


def test_a_worker_that_owns_nothing_in_its_first_step_votes_like_the_others(storage: str) -> None:
    """Two samples for three microbatches of one: rank 2 has none, and knows no names."""
    x, y = X[:4], Y[:4]
    for batch, name in ((Batch(samples=3, microbatches=3), "free"), (Batch(samples=4, microbatches=4), "own")):
        done = run_job(
            net(),
            (x[:2], y[:2]),
            storage=storage,
            name=name,
            num_workers=3,
            epochs=2,
            batch=batch,
            optimizer=sgd,
            step_fn=sometimes,
        )
        assert [record["size"] for record in done.of("step")] == [1.0, 1.0]


# --- buckets ---------------------------------------------------------------------------------------------------------


class Segments(nn.Module):
    """A layer that is used in two checkpointed segments."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layer, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(2):
            h = torch.utils.checkpoint.checkpoint(
                lambda h: torch.tanh(self.layer(h)), h, use_reentrant=self.use_reentrant, preserve_rng_state=False
            )
        return self.last(h)


def test_a_gradient_that_arrives_after_its_bucket_left_is_an_error(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 16)
    monkeypatch.setattr(reduce, "FIRST_BUCKET_BYTES", 8)
    monkeypatch.setattr(step, "can_overlap", lambda peers: True)  # as where there is a core to spare
    with pytest.raises(ConfigError, match="gradient of layer.* twice .* use_reentrant=False"):
        train(storage, Segments(True).double(), num_workers=2, steps=2)
    done = train(storage, Segments(False).double(), num_workers=2, steps=4, name="other")
    expected = plain(Segments(False).double(), 4, cross_entropy)
    for name, tensor in done.models[0].state().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-12)
