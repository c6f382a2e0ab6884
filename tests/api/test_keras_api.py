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

from lepton_ray import Batch, ConfigError, DistributedTrainer

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs the keras extra", allow_module_level=True)
import keras

from tests.train.in_process import run_job
from tests.train.keras_models import LABELS, X, classifier, named, two_inputs

layers = keras.layers
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


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
    trainer = DistributedTrainer(
        model,
        (X, LABELS),
        (X, LABELS),
        num_workers=2,
        epochs=8,
        batch=15,
        optimizer=keras.optimizers.Adam(0.05),
        storage=storage,
    )
    job = trainer.submit()
    notes = records(job, "note")
    assert [("class index; the last activation is softmax" in note["text"]) for note in notes] == [True]
    metrics = job.wait().metrics
    assert metrics["test_accuracy"] > 0.6
    probabilities = model.predict(X, verbose=0)
    np.testing.assert_allclose(trainer.predict(X[:5]), probabilities[:5], atol=1e-6)  # without targets
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
    options: dict[str, Any] = {"steps": 12, "batch": Batch(samples=24, microbatches=2), "storage": storage}
    one = run_job(models[0], named(), transform=noting(tmp_path / "1"), **options)
    one.result.model()
    transform = noting(tmp_path / "2")
    job = DistributedTrainer(models[1], named(), num_workers=2, transform=transform, **options).submit()
    losses = one.losses, [record["train_loss"] for record in records(job, "step")]
    job.wait()
    (alone,), shared = seen_by(tmp_path / "1"), seen_by(tmp_path / "2")
    assert sorted(shared) == sorted([alone[0::2], alone[1::2]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(models[0].weights) == 7
    for one, two, fresh in zip(*(model.get_weights() for model in (*models, two_inputs()))):
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert np.abs(one - fresh).max() > 1e-3


def test_evaluate_and_predict_are_those_of_keras(ray_cluster: None, storage: str) -> None:
    model = two_inputs()
    inputs = {"left": X[:, :4], "right": X[:, 4:]}
    trainer = DistributedTrainer(model, named(), named(), num_workers=2, epochs=2, storage=storage)
    result = trainer.train()
    expected = model.evaluate(inputs, LABELS, verbose=0, return_dict=True)
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-4)
    assert result.metrics["test_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    np.testing.assert_allclose(trainer.predict(inputs), model.predict(inputs, verbose=0), atol=1e-5)


def make_compiled(width: int = 8) -> keras.Sequential:
    """Make the model in the worker."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(width, activation="tanh"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.25), loss, metrics=["accuracy"])
    return model


def test_factory_of_a_keras_model_is_compiled_by_the_workers(ray_cluster: None, storage: str) -> None:
    factory = functools.partial(make_compiled, width=4)
    trainer = DistributedTrainer(factory, (X, LABELS), (X, LABELS), num_workers=2, steps=4, storage=storage)
    job = trainer.submit()
    assert [record["lr"] for record in records(job, "step")] == pytest.approx([0.25] * 4)
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


def needing(backend: str, module: str) -> Any:
    missing = importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not installed")]
    return pytest.param(backend, marks=[*marks, *([pytest.mark.tensorflow] if backend == "tensorflow" else [])])


@pytest.mark.parametrize(
    "backend",
    [needing("tensorflow", "tensorflow"), needing("numpy", "jax")],  # Keras' numpy backend borrows from JAX
)
def test_driver_on_another_backend_gets_the_weights_into_its_own_object(
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
