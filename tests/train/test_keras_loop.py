"""Keras models through a whole job, in one process: what Keras itself says of them is what the run says."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from lepton_ray import Batch, ConfigError
from tests.train.in_process import Done, run_job

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs the keras extra", allow_module_level=True)
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("KERAS_BACKEND", "torch")
    import keras

    from tests.train.keras_models import IS_FIRST, LABELS, X, classifier, named, two_inputs

layers = keras.layers


def test_optimizer_schedule_and_metrics_of_compile_are_taken_over(storage: str) -> None:
    model = classifier(layers.Dense(1, activation="sigmoid"))
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=4, decay_rate=0.5)
    model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=[keras.metrics.AUC(name="area"), "mse"])
    done = run_job(model, (X, IS_FIRST), (X, IS_FIRST), epochs=2, batch=30, storage=storage)
    rates = [record["lr"] for record in done.of("step")]
    assert rates == pytest.approx([0.5 * 0.5 ** (step / 4) for step in range(1, 7)])
    assert done.result.model() is model
    expected = model.evaluate(X, IS_FIRST, verbose=0, return_dict=True)
    assert {f"test_{name}" for name in expected} == {"test_loss", "test_area", "test_mse"}
    for name, value in expected.items():
        assert done.result.metrics[f"test_{name}"] == pytest.approx(value, rel=1e-4)


def test_objects_of_keras_may_be_given_to_the_trainer(storage: str) -> None:
    model = classifier(layers.Dense(3))
    options: dict[str, Any] = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "optimizer": keras.optimizers.Adam(0.0625),
        "metrics": [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    }
    done = run_job(model, (X, LABELS), (X, LABELS), steps=3, storage=storage, **options)
    assert {record["lr"] for record in done.of("step")} == {0.0625}
    assert done.result.model() is model
    model.compile(**options)
    expected = model.evaluate(X, LABELS, verbose=0, return_dict=True)
    assert done.result.metrics["test_top2"] == pytest.approx(expected["top2"])


def test_a_reproducible_keras_model_ends_with_the_same_bits_for_any_number_of_workers(storage: str) -> None:
    """With dropout of its own seed: any other draws from torch's generator, which the threads of a test share."""

    def train(workers: int) -> tuple[str, dict[str, float]]:
        keras.utils.set_random_seed(1)  # of the layers, each of which draws a seed when it is made
        model = classifier(layers.BatchNormalization(), layers.Dropout(0.3, seed=3), layers.Dense(3))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        measured = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="entropy")
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy", measured])
        options: dict[str, Any] = {"batch": Batch(samples=20, microbatches=6, clip_norm=1.0), "reproducible": True}
        place = {"storage": storage, "name": f"of-{workers}"}
        done = run_job(model, (X, LABELS), (X, LABELS), num_workers=workers, epochs=2, **place, **options)
        return done.result.receipt.weights_sha256, done.result.metrics

    assert train(1) == train(3)


def test_torch_optimizer_and_scheduler_train_a_keras_model(storage: str) -> None:
    done = run_job(
        classifier(layers.Dense(3)),
        (X, LABELS),
        epochs=4,
        batch=32,
        optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        storage=storage,
    )
    assert [record["lr"] for record in done.of("step")[:4]] == [0.5, 0.5, 0.25, 0.25]
    assert done.losses[-1] < done.losses[0]


def test_cancelled_run_goes_on_exactly(storage: str) -> None:
    steps: list[int] = []

    def note(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            steps.append(fields["step"])

    def run(name: str, **options: Any) -> Done:
        model = two_inputs()
        model.compile("adam", model.loss, metrics=["accuracy"])
        return run_job(model, named(), epochs=4, batch=20, name=name, storage=storage, **options)

    whole = run("whole")
    cut = run("cut", at=note, wish=lambda: len(steps) > 12)
    assert not cut.of("trained")[0]["complete"]
    done = run("cut")
    (where,) = done.of("resumed")
    assert 12 < where["step"] < 20
    assert done.result.receipt.weights_sha256 == whole.result.receipt.weights_sha256
    assert done.result.metrics == whole.result.metrics
    receipt = done.result.receipt
    assert (receipt.steps, receipt.samples_lost, receipt.samples_repeated) == (20, 0, 0)


def make_compiled() -> keras.Sequential:
    """Make the model in the worker."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.25), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def make_bare() -> keras.Sequential:
    return keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="softmax")])


def test_loss_of_a_factorys_model_that_was_not_compiled_is_inferred(storage: str) -> None:
    done = run_job(make_bare, (X, LABELS), (X, LABELS), steps=4, storage=storage)
    assert [record["lr"] for record in done.of("step")] == pytest.approx([0.001] * 4)
    found = done.result.model().predict(X, verbose=0).argmax(1)
    assert done.result.metrics["test_accuracy"] == pytest.approx((found == LABELS).mean())


def test_scheduler_with_a_factory_of_a_keras_model_is_refused_where_it_is_called(storage: str) -> None:
    with pytest.raises(ConfigError, match="scheduler= drives torch optimizers"):
        run_job(make_compiled, (X, LABELS), scheduler=lambda optimizer: None, storage=storage)


def test_evaluate_and_predict_are_those_of_keras_before_and_after_training(storage: str) -> None:
    inputs = {"left": X[:, :4], "right": X[:, 4:]}

    def predict(model: keras.Model, data: Any) -> np.ndarray:
        found = run_job(model, named(), data, mode="predict", storage=storage).outputs
        return np.concatenate([block for _, block in found])

    model = two_inputs()
    before = predict(model, inputs)
    np.testing.assert_allclose(before, model.predict(inputs, verbose=0), atol=1e-5)
    assert run_job(model, named(), epochs=2, storage=storage).result.model() is model
    after = predict(two_inputs(), inputs)
    np.testing.assert_allclose(after, model.predict(inputs, verbose=0), atol=1e-5)
    assert np.abs(after - before).max() > 1e-2
    part = {name: values[:7] for name, values in named().items()}
    (evaluated,) = run_job(two_inputs(), named(), part, mode="evaluate", storage=storage).of("evaluated")
    expected = model.evaluate({name: part[name] for name in inputs}, part["y"], verbose=0, return_dict=True)
    assert evaluated["metrics"] == pytest.approx(expected, rel=1e-4)
    assert evaluated["metrics"]["accuracy"] == pytest.approx((after[:7].argmax(1) == LABELS[:7]).mean())


def test_predictions_of_a_model_that_was_not_compiled_need_no_targets(storage: str) -> None:
    model = classifier(layers.Dense(3))
    done = run_job(model, (X, LABELS), X[:5], mode="predict", storage=storage)
    found = np.concatenate([block for _, block in done.outputs])
    np.testing.assert_allclose(found, model.predict(X[:5], verbose=0), atol=1e-6)
