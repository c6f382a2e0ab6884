"""Keras models through the trainer: what Keras itself says of the trained object is what the run says."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lepton_ray import Batch, ConfigError, DistributedTrainer, RunCancelled

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs the keras extra", allow_module_level=True)
import keras

layers = keras.layers
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(90, 6)).astype("float32")
LABELS = (X @ DRAW.normal(size=(6, 3))).argmax(1)
IS_FIRST = (LABELS == 0).astype("float32")[:, None]


class Kept(layers.Layer):
    """Adds a loss of its own to that of the model."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


def two_inputs() -> keras.Model:
    """Return a functional model with everything that makes Keras' training differ from a plain loop."""
    keras.utils.set_random_seed(1)
    left, right = keras.Input((4,), name="left"), keras.Input((2,), name="right")
    both = layers.Concatenate()([left, right])
    x = layers.Dense(16, use_bias=False, kernel_regularizer=keras.regularizers.L2(1e-2))(both)
    x = layers.Dropout(0.3)(keras.activations.relu(layers.BatchNormalization(momentum=0.8)(x)))
    x = layers.Dense(3, bias_regularizer=keras.regularizers.L2(0.1))(Kept()(x))
    model = keras.Model({"left": left, "right": right}, x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy"])
    return model


def named() -> dict[str, np.ndarray]:
    return {"left": X[:, :4], "right": X[:, 4:], "y": LABELS}


def classifier(*last: Any) -> keras.Sequential:
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), *last])


def records(job: Any, event: str) -> list[dict[str, Any]]:
    return [record for record in job.events() if record["event"] == event]


def test_listing_trains_and_keras_finds_the_metrics_of_the_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("HOME", str(tmp_path))  # runs are kept below
    ran = runpy.run_path(str(ROOT / "jobs" / "listing_keras.py"), run_name="__main__")
    metrics = ran["result"].metrics
    assert ran["result"].model() is ran["model"]
    assert ran["accuracy"] > 0.9
    assert metrics["test_accuracy"] == pytest.approx(ran["accuracy"], abs=1e-6)
    assert metrics["test_loss"] == pytest.approx(ran["loss"], rel=1e-5)


def test_model_that_was_not_compiled_learns_classes(ray_cluster: None, storage: str) -> None:
    model = classifier(layers.Dense(3, activation="softmax"))
    job = DistributedTrainer(
        model,
        (X, LABELS),
        (X, LABELS),
        num_workers=2,
        epochs=8,
        batch=15,
        optimizer=keras.optimizers.Adam(0.05),
        storage=storage,
    ).submit()
    notes = records(job, "note")
    assert [("class index; the last activation is softmax" in note["text"]) for note in notes] == [True]
    metrics = job.wait().metrics
    assert metrics["test_accuracy"] > 0.6
    probabilities = model.predict(X, verbose=0)
    assert metrics["test_accuracy"] == pytest.approx((probabilities.argmax(1) == LABELS).mean())
    assert metrics["test_loss"] == pytest.approx(-np.log(probabilities[np.arange(90), LABELS]).mean(), rel=1e-5)


def seen_by(folder: Path) -> list[list[str]]:
    """Return what each process wrote, the one that came first in front."""
    return sorted(file.read_text().splitlines() for file in folder.iterdir())


def noting(folder: Path) -> Callable[[Any], Any]:
    """Return a transform that writes down which samples each microbatch of this process holds."""
    folder.mkdir()

    def transform(batch: Any) -> Any:
        with open(folder / str(os.getpid()), "a") as file:
            file.write(" ".join(f"{value:.6f}" for value in batch["left"][:, 0].tolist()) + "\n")
        return batch

    return transform


def test_one_and_two_workers_make_the_same_model_from_the_same_order(
    ray_cluster: None, storage: str, tmp_path: Path
) -> None:
    models = two_inputs(), two_inputs()
    losses = []
    for workers, model in zip((1, 2), models):
        job = DistributedTrainer(
            model,
            named(),
            num_workers=workers,
            steps=12,
            batch=Batch(samples=24, microbatches=2),
            transform=noting(tmp_path / str(workers)),
            storage=storage,
        ).submit()
        losses.append([record["train_loss"] for record in records(job, "step")])
        job.wait()
    (alone,), shared = seen_by(tmp_path / "1"), seen_by(tmp_path / "2")
    assert sorted(shared) == sorted([alone[0::2], alone[1::2]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(models[0].weights) == 7
    for one, two, fresh in zip(*(model.get_weights() for model in (*models, two_inputs()))):
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert np.abs(one - fresh).max() > 1e-3


def test_optimizer_schedule_and_metrics_of_compile_are_taken_over(ray_cluster: None, storage: str) -> None:
    model = classifier(layers.Dense(1, activation="sigmoid"))
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=4, decay_rate=0.5)
    model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=[keras.metrics.AUC(name="area"), "mse"])
    job = DistributedTrainer(
        model, (X, IS_FIRST), (X, IS_FIRST), num_workers=2, epochs=2, batch=30, storage=storage
    ).submit()
    rates = [record["lr"] for record in records(job, "step")]
    assert rates == pytest.approx([0.5 * 0.5 ** (step / 4) for step in range(1, 7)])
    found = job.wait().metrics
    expected = model.evaluate(X, IS_FIRST, verbose=0, return_dict=True)
    assert {f"test_{name}" for name in expected} == {"test_loss", "test_area", "test_mse"}
    for name, value in expected.items():
        assert found[f"test_{name}"] == pytest.approx(value, rel=1e-4)


def test_objects_of_keras_may_be_given_to_the_trainer(ray_cluster: None, storage: str) -> None:
    model = classifier(layers.Dense(3))
    options: dict[str, Any] = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "optimizer": keras.optimizers.Adam(0.0625),
        "metrics": [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    }
    job = DistributedTrainer(model, (X, LABELS), (X, LABELS), steps=3, storage=storage, **options).submit()
    assert {record["lr"] for record in records(job, "step")} == {0.0625}
    found = job.wait().metrics
    model.compile(**options)
    expected = model.evaluate(X, LABELS, verbose=0, return_dict=True)
    assert found["test_top2"] == pytest.approx(expected["top2"])


def test_torch_optimizer_and_scheduler_train_a_keras_model(ray_cluster: None, storage: str) -> None:
    model = classifier(layers.Dense(3))
    job = DistributedTrainer(
        model,
        (X, LABELS),
        num_workers=2,
        epochs=4,
        optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        storage=storage,
    ).submit()
    steps = records(job, "step")
    assert [record["lr"] for record in steps[:4]] == [0.5, 0.5, 0.25, 0.25]
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]


def test_cancelled_run_goes_on_exactly(ray_cluster: None, storage: str) -> None:
    def trainer(name: str) -> DistributedTrainer:
        model = two_inputs()
        model.compile("adam", model.loss, metrics=["accuracy"])
        return DistributedTrainer(model, named(), num_workers=2, epochs=10, batch=20, name=name, storage=storage)

    whole = trainer("whole").train()
    job = trainer("cut").submit()
    for record in job.events():
        if record["event"] == "step" and record["step"] == 12:
            job.cancel()
    with pytest.raises(RunCancelled):
        job.wait()
    resumed = trainer("cut").submit()
    (where,) = records(resumed, "resumed")
    assert 12 < where["step"] < 50
    result = resumed.wait()
    assert result.receipt.weights_sha256 == whole.receipt.weights_sha256
    assert result.metrics == whole.metrics
    assert (result.receipt.steps, result.receipt.samples_lost, result.receipt.samples_repeated) == (50, 0, 0)


def test_evaluate_and_predict_are_those_of_keras(ray_cluster: None, storage: str) -> None:
    model = two_inputs()
    inputs = {"left": X[:, :4], "right": X[:, 4:]}
    trainer = DistributedTrainer(model, named(), named(), num_workers=2, epochs=2, storage=storage)
    before = trainer.predict(inputs)
    np.testing.assert_allclose(before, model.predict(inputs, verbose=0), atol=1e-5)
    result = trainer.train()
    expected = model.evaluate(inputs, LABELS, verbose=0, return_dict=True)
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-4)
    assert result.metrics["test_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    after = trainer.predict(inputs)
    np.testing.assert_allclose(after, model.predict(inputs, verbose=0), atol=1e-5)
    assert np.abs(after - before).max() > 1e-2
    part = {name: values[:7] for name, values in named().items()}
    assert trainer.evaluate(part)["accuracy"] == pytest.approx((after[:7].argmax(1) == LABELS[:7]).mean())


def test_model_that_was_not_compiled_predicts_without_targets(ray_cluster: None, storage: str) -> None:
    model = classifier(layers.Dense(3))
    trainer = DistributedTrainer(model, (X, LABELS), num_workers=2, storage=storage)
    np.testing.assert_allclose(trainer.predict(X[:5]), model.predict(X[:5], verbose=0), atol=1e-6)


def make_compiled(width: int = 8) -> keras.Sequential:
    """Make the model in the worker."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(width, activation="tanh"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.25), loss, metrics=["accuracy"])
    return model


def make_bare() -> keras.Sequential:
    return keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="softmax")])


@pytest.mark.parametrize(("factory", "rate"), [(functools.partial(make_compiled, width=4), 0.25), (make_bare, 0.001)])
def test_factory_of_a_keras_model_is_compiled_or_inferred(
    factory: Callable[[], Any], rate: float, ray_cluster: None, storage: str
) -> None:
    trainer = DistributedTrainer(factory, (X, LABELS), (X, LABELS), num_workers=2, steps=4, storage=storage)
    job = trainer.submit()
    assert [record["lr"] for record in records(job, "step")] == pytest.approx([rate] * 4)
    result = job.wait()
    model = result.model()
    assert result.metrics["test_accuracy"] == pytest.approx((model.predict(X, verbose=0).argmax(1) == LABELS).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": lambda optimizer: None}, "scheduler= drives torch optimizers.*keras.optimizers.schedules"),
        ({"optimizer": "adam", "scheduler": lambda optimizer: None}, "scheduler= drives torch optimizers"),
        ({"loss": "cross_entropy"}, "loss='cross_entropy' is not known to Keras"),
        ({"step_fn": lambda model, batch, optimizers: None}, "step_fn= needs a torch model"),
        ({"train_data": torch.utils.data.ChainDataset([])}, r"shows no target before it is read.*model\.compile"),
    ],
)
def test_what_does_not_go_with_a_keras_model_is_refused_before_anything_starts(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        DistributedTrainer(**{"model": classifier(layers.Dense(3)), "train_data": (X, LABELS), **options})


def test_scheduler_with_a_factory_of_a_keras_model_is_refused_by_the_workers(ray_cluster: None, storage: str) -> None:
    trainer = DistributedTrainer(make_compiled, (X, LABELS), scheduler=lambda optimizer: None, storage=storage)
    with pytest.raises(Exception, match="scheduler= drives torch optimizers"):
        trainer.train()


def needing(backend: str, module: str) -> Any:
    missing = importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not installed")]
    return pytest.param(backend, marks=[*marks, *([pytest.mark.tensorflow] if backend == "tensorflow" else [])])


@pytest.mark.parametrize(
    "backend",
    [needing("tensorflow", "tensorflow"), needing("numpy", "jax"), "torch"],  # Keras' numpy backend borrows from JAX
)
def test_driver_on_any_backend_gets_the_weights_into_its_own_object(
    backend: str, ray_cluster: None, storage: str
) -> None:
    import ray

    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
    }
    script = Path(__file__).parent / "scripts" / "keras_driver.py"
    done = subprocess.run(
        [sys.executable, script, storage], env=env, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"trained by a driver on {backend}" in done.stdout
