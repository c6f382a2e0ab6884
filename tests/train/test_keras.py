import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton_ray.errors import CheckpointError, ConfigError
from lepton_ray.train import blueprint, keras_pack
from lepton_ray.train.buffers import BufferFold
from lepton_ray.train.words import target_facts

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs the keras extra", allow_module_level=True)
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("KERAS_BACKEND", "torch")
    import keras

    from lepton_ray.train import keras as worker
    from lepton_ray.train.keras import KerasModel, keras_objective
    from lepton_ray.train.keras_metrics import KerasMetrics
    from lepton_ray.train.keras_optimizer import KerasOptimizer

layers = keras.layers
CPU = torch.device("cpu")
DIGITS = np.random.default_rng(0).normal(size=(24, 8, 8, 1)).astype("float32")
LABELS = np.random.default_rng(1).integers(0, 4, 24)


def cnn(dropout=0.0, norm=True, optimizer="sgd"):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu", kernel_regularizer="l2"),
            *([layers.BatchNormalization(momentum=0.8)] if norm else []),
            layers.Flatten(),
            layers.Dropout(dropout),
            layers.Dense(4, activation="softmax", bias_regularizer=keras.regularizers.L2(0.1)),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def travel(model):
    return blueprint.build(pickle.loads(pickle.dumps(blueprint.pack(model))), CPU, 0)


def batch_of(part):
    return torch.from_numpy(DIGITS[part]), torch.from_numpy(LABELS[part])


def one_step(model, optimizer, objective, parts):
    """Do what the loop does: sums over microbatches, divided by the summed weight, then the update."""
    optimizer.zero_grad()
    weight = 0.0
    for part in parts:
        outcome = objective(model, batch_of(part))
        outcome.loss_sum.backward()
        weight += outcome.weight
    for p in model.parameters().values():
        p.grad /= weight
    optimizer.step()


def train(model, steps=5, parts=(slice(0, 24),)):
    optimizer = KerasOptimizer(model)
    objective = keras_objective(model)
    for _ in range(steps):
        one_step(model, optimizer, objective, parts)
    return model


def distance(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_five_steps_equal_those_of_keras(optimizer):
    theirs = cnn(optimizer=optimizer)
    ours = train(travel(theirs))
    for _ in range(5):
        theirs.train_step((torch.from_numpy(DIGITS), torch.from_numpy(LABELS)))
    assert distance(ours.state(), KerasModel(theirs, CPU).state()) < 1e-6
    assert distance(ours.state(), travel(cnn()).state()) > 1e-3


def test_uneven_microbatches_make_the_same_step_as_one_batch():
    whole = train(travel(cnn(norm=False)))
    cut = train(travel(cnn(norm=False)), parts=(slice(0, 10), slice(10, 13), slice(13, 24)))
    assert distance(whole.state(), cut.state()) < 1e-6


def test_objective_is_loss_and_penalty_as_keras_evaluates_them():
    model = travel(cnn())
    model.train(False)
    outcome = keras_objective(model)(model, batch_of(slice(0, 24)))
    expected = model.user_module.evaluate(DIGITS, LABELS, verbose=0, return_dict=True)
    assert float(outcome.loss_sum.detach()) / outcome.weight == pytest.approx(expected["loss"], rel=1e-5)
    cross_entropy = keras.losses.sparse_categorical_crossentropy(outcome.target, outcome.outputs).mean()
    assert expected["loss"] > 1.001 * float(cross_entropy)  # so there is a penalty in it


def test_loss_over_a_mask_counts_the_steps_that_it_lets_through():
    model = keras.Sequential(
        [keras.Input((6,)), layers.Embedding(9, 4, mask_zero=True), layers.LSTM(3, return_sequences=True)]
    )
    model.compile("sgd", "mse")
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0], [8, 8, 0, 0, 0, 0]])
    target = torch.randn(3, 6, 3)
    ours = travel(model)
    objective = keras_objective(ours)
    parts = [objective(ours, (tokens[part], target[part])) for part in (slice(0, 1), slice(1, 3))]
    assert [part.weight for part in parts] == [6, 3]
    mean = sum(float(part.loss_sum) for part in parts) / 9
    assert mean == pytest.approx(float(objective(ours, (tokens, target)).loss_sum) / 9, rel=1e-5)
    assert mean == pytest.approx(model.evaluate(tokens, target, verbose=0), rel=1e-4)


def test_statistics_of_microbatches_fold_to_those_of_running_them_in_turn():
    parts = (slice(0, 10), slice(10, 16), slice(16, 24))
    in_turn, folded = travel(cnn()), travel(cnn())
    for part in parts:
        in_turn(batch_of(part)[0])
    fold = BufferFold(folded.buffers(), None)
    fold.begin(len(parts))
    for m in (2, 0, 1):
        fold.enter()
        folded(batch_of(parts[m])[0])
        fold.leave(m)
    fold.reduce()
    fold.apply()
    assert [(b.name, b.keep) for b in folded.buffers()] == [
        ("0004:batch_normalization/moving_mean", 0.8),
        ("0005:batch_normalization/moving_variance", 0.8),
    ]
    assert distance(in_turn.state(), folded.state()) < 1e-6


def test_autocast_runs_and_keeps_weights_in_fp32():
    model = travel(cnn())
    optimizer, objective = KerasOptimizer(model), keras_objective(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = objective(model, batch_of(slice(0, 24)))
    (outcome.loss_sum / outcome.weight).backward()
    optimizer.step()
    assert outcome.loss_sum.dtype == torch.float32
    assert {t.dtype for t in model.state().values()} == {torch.float32}


def test_float_type_of_the_driver_is_that_of_the_worker():
    keras.config.set_floatx("float64")
    try:
        packed = blueprint.pack(cnn())
    finally:
        keras.config.set_floatx("float32")
    try:
        model = blueprint.build(packed, CPU, 0)
        outcome = keras_objective(model)(model, batch_of(slice(0, 8)))
        assert outcome.loss_sum.dtype == torch.float64
    finally:
        keras.config.set_floatx("float32")


# --- randomness ------------------------------------------------------------------------------------------------------


class Jitter(layers.Layer):
    """Draws from Keras' process-wide generator."""

    def call(self, x, training=None):
        return x + keras.random.normal(keras.ops.shape(x)) if training else x


def noisy():
    """Return a model that draws in every way: with and without seeds of its own, in cells, in layers inside layers."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Reshape((8, 8))(layers.RandomFlip(seed=1)(layers.RandomFlip()(inputs)))
    x = layers.MultiHeadAttention(2, 4, dropout=0.2, seed=2)(x, x)
    x = layers.SpatialDropout1D(0.3)(x)
    x = layers.Bidirectional(layers.LSTM(4, dropout=0.3, recurrent_dropout=0.3, seed=3, return_sequences=True))(x)
    x = layers.RNN([layers.GRUCell(8, dropout=0.2), layers.LSTMCell(8, recurrent_dropout=0.2, seed=4)])(x)
    x = Jitter()(x)
    inner = keras.Sequential([keras.Input((8,)), layers.Dropout(0.2, seed=5), layers.GaussianNoise(0.1)])
    return keras.Model(inputs, inner(x))


def draw(model, seed, x):
    """Run a forward as the loop does, which sets torch's generator before the model's own."""
    torch.manual_seed(seed)
    model.seed(seed)
    return model(x)


def test_random_numbers_belong_to_the_microbatch_and_not_to_the_worker():
    source = noisy()
    first, second = travel(source), travel(source)
    x = torch.from_numpy(DIGITS[:4])
    zero, one = draw(first, 11, x), draw(first, 12, x)
    second(x)
    assert torch.equal(draw(second, 12, x), one)
    assert torch.equal(draw(second, 11, x), zero)
    assert not torch.equal(zero, one)
    second.train(False)
    assert torch.equal(second(x), second(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dropout(0.5),
        lambda: layers.Dropout(0.5, seed=1),
        lambda: layers.GaussianNoise(1.0),
        lambda: layers.RandomContrast(0.5),
        Jitter,
    ],
)
def test_every_layer_draws_from_the_seed_of_the_microbatch(layer):
    inputs = keras.Input((10, 10, 3))
    model = KerasModel(keras.Model(inputs, [layer()(inputs), layer()(inputs)]), CPU)
    x = torch.rand(1, 10, 10, 3)
    (first, second), again, other = (draw(model, seed, x) for seed in (5, 5, 6))
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, other[0])
    assert not torch.equal(first, second)


# --- state -----------------------------------------------------------------------------------------------------------


def test_names_do_not_depend_on_what_was_made_before():
    first, second = KerasModel(cnn(), CPU), KerasModel(cnn(), CPU)
    assert list(first.state()) == list(second.state()) == list(travel(cnn()).state())
    assert list(first.parameters())[0] == "0000:conv2d/kernel"
    assert set(first.parameters()) < set(first.state())
    assert all(p.requires_grad and p.is_leaf for p in first.parameters().values())


def test_state_moves_to_another_instance_and_to_the_users_object():
    user = cnn(dropout=0.3)
    trained = train(travel(user))
    fresh = travel(cnn(dropout=0.3))
    for name, tensor in fresh.state().items():
        tensor.copy_(trained.state()[name])
    blueprint.restore_into(user, {name: t.numpy() for name, t in trained.state().items()})
    for model in (trained, fresh):
        model.train(False)
    outputs = trained(torch.from_numpy(DIGITS))
    assert torch.equal(fresh(torch.from_numpy(DIGITS)), outputs)
    np.testing.assert_array_equal(user.predict(DIGITS, verbose=0, batch_size=24), outputs.detach())


def test_state_is_live_and_free_of_seeds():
    model = travel(cnn(dropout=0.3))
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    model.seed(1)
    model.train(False)
    model(torch.from_numpy(DIGITS))
    assert distance(before, model.state()) == 0
    model.state()["0000:conv2d/kernel"].zero_()
    assert not model.parameters()["0000:conv2d/kernel"].any()


def test_frozen_layers_are_neither_trained_nor_changed():
    source = cnn()
    source.layers[0].trainable = False
    source.layers[1].trainable = False
    model = travel(source)
    assert list(model.parameters()) == ["0006:dense/kernel", "0007:dense/bias"]
    assert model.buffers() == []
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    train(model, steps=2)
    changed = {name for name, tensor in model.state().items() if not torch.equal(tensor, before[name])}
    assert changed == set(model.parameters())


class Counter(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(shape=(), dtype="int32", trainable=False, initializer="zeros", name="calls")

    def call(self, x):
        self.calls.assign_add(1)
        return x


def test_own_state_of_layers_is_a_buffer_whose_changes_add_up():
    model = travel(keras.Sequential([keras.Input((3,)), Counter(), layers.Dense(1)]))
    assert [(b.name, b.keep, b.tensor.dtype) for b in model.buffers()] == [("0000:counter/calls", 1.0, torch.int32)]


# --- inputs ----------------------------------------------------------------------------------------------------------


def two_inputs(as_dict=False):
    first, second = keras.Input((2,), name="first"), keras.Input((3,), name="second")
    out = layers.Dense(1)(layers.Concatenate()([first, second]))
    return keras.Model({"first": first, "second": second} if as_dict else [first, second], out)


@pytest.mark.parametrize("as_dict", [False, True])
def test_inputs_go_by_position_or_by_name(as_dict):
    model = travel(two_inputs(as_dict))
    first, second = torch.randn(4, 2), torch.randn(4, 3)
    by_name = model(second=second, first=first)
    assert torch.equal(model(first, second), by_name)
    assert torch.equal(model(first.numpy(), second.numpy()), by_name)


def test_whole_numbers_are_taken_as_keras_takes_them():
    model = travel(keras.Sequential([keras.Input((4,)), layers.Dense(2)]))
    pixels = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    assert torch.equal(model(pixels), model(pixels.float()))


class Plain(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(3), layers.Dense(2)

    def call(self, x):
        return self.last(self.first(x))


class Sized(keras.Model):
    def __init__(self, width, rate=0.5):
        super().__init__()
        self.dense = layers.Dense(width)
        self.dropout = layers.Dropout(rate)

    def call(self, x, training=None):
        return self.dropout(self.dense(x), training=training)


class Described(Sized):
    def __init__(self, width, rate=0.5):
        super().__init__(width, rate)
        self.width = width

    def get_config(self):
        return {"width": self.width, "rate": self.dropout.rate}


@pytest.mark.parametrize("make", [Plain, lambda: Described(3, rate=0.25)], ids=["plain", "described"])
def test_subclassed_model_travels_once_it_was_called(make):
    model = make()
    with pytest.raises(ConfigError, match=r"has no weights yet\. Add keras\.Input"):
        blueprint.pack(model)
    model(np.ones((2, 4), "float32"))
    arrived = travel(model)
    assert type(arrived.user_module) is type(model)
    arrived.train(False)
    assert torch.equal(arrived(torch.ones(2, 4)), model(torch.ones(2, 4), training=False))
    if isinstance(model, Described):
        assert arrived.user_module.dropout.rate == 0.25


def test_frozen_part_of_a_subclassed_model_is_not_trained_unawares():
    model = Plain()
    model(np.ones((2, 4), "float32"))
    model.first.trainable = False
    with pytest.raises(ConfigError, match="Keras made model=Plain with other weights, or others of them frozen"):
        travel(model)


def test_factory_may_make_a_keras_model():
    packed = blueprint.pack(cnn)
    first, second = blueprint.build(packed, CPU, 1), blueprint.build(packed, CPU, 1)
    assert isinstance(first, KerasModel)
    assert distance(first.state(), second.state()) == 0


def test_factory_makes_the_same_names_in_every_job_of_a_process():
    def make():
        model = cnn()
        model.compile("sgd", "mse", metrics=[keras.metrics.AUC()])
        return model

    packed = blueprint.pack(make)
    for _ in range(2):
        model = blueprint.build(packed, CPU, 1).user_module
        assert (model.layers[0].name, model._compile_config.config["metrics"][0].name) == ("conv2d", "auc")


# --- loss ------------------------------------------------------------------------------------------------------------


def test_own_compute_loss_and_losses_of_several_outputs_are_used():
    inputs = keras.Input((3,))
    source = keras.Model(inputs, {"a": layers.Dense(1, name="a")(inputs), "b": layers.Dense(1, name="b")(inputs)})
    source.compile("sgd", loss={"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 10.0}, metrics={"a": ["mae"]})
    model = travel(source)
    x, target = torch.randn(5, 3), {"a": torch.randn(5, 1), "b": torch.randn(5, 1)}
    outcome = keras_objective(model)(model, (x, target))
    out = model(x)
    expected = (out["a"] - target["a"]).square().mean() + 10 * (out["b"] - target["b"]).abs().mean()
    assert float(outcome.loss_sum.detach()) / 5 == pytest.approx(float(expected), rel=1e-5)
    metrics = KerasMetrics(model)
    metrics.update(outcome.outputs, outcome.target)
    assert list(metrics.result(metrics.vector())) == ["a_mae"]


class OwnLoss(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return keras.ops.mean(y_pred) * 3


def test_model_with_a_loss_of_its_own_needs_no_other():
    model = travel(OwnLoss([keras.Input((3,)), layers.Dense(1)]))
    assert worker.has_own_loss(model)
    outcome = keras_objective(model)(model, (torch.ones(2, 3), torch.ones(2)))
    assert float(outcome.loss_sum.detach()) == pytest.approx(float(outcome.outputs.mean()) * 6, rel=1e-5)


def test_trainer_options_take_the_place_of_compiled_ones():
    model = travel(cnn())
    assert worker.defaults(model).loss == "sparse_categorical_crossentropy"
    worker.compile_model(model, loss=keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy", "mse"])
    changed = worker.defaults(model)
    assert isinstance(changed.loss, keras.losses.SparseCategoricalCrossentropy)
    assert type(changed.optimizer).__name__ == "SGD"
    assert changed.metrics == ["accuracy", "mse"]
    bare = KerasModel(two_inputs(), CPU)
    assert worker.defaults(bare).loss is None
    with pytest.raises(ConfigError, match="without a loss"):
        keras_objective(bare)
    with pytest.raises(ConfigError, match="nonsense"):
        worker.compile_model(bare, loss="mse", optimizer="nonsense")


def test_loss_that_is_no_mean_is_refused():
    model = travel(cnn())
    worker.compile_model(model, loss=keras.losses.SparseCategoricalCrossentropy(reduction="sum"))
    with pytest.raises(ConfigError, match="reduction='sum'.*sum_over_batch_size"):
        keras_objective(model)


@pytest.mark.parametrize(
    ("activation", "target", "outputs", "loss", "from_logits", "metrics"),
    [
        ("softmax", np.arange(6) % 4, (6, 4), "SparseCategoricalCrossentropy", False, ["accuracy"]),
        ("linear", np.arange(6) % 4, (6, 4), "SparseCategoricalCrossentropy", True, ["accuracy"]),
        ("softmax", np.eye(4), (4, 4), "CategoricalCrossentropy", False, ["accuracy"]),
        (None, np.eye(4, dtype=int), (4, 4), "CategoricalCrossentropy", True, ["accuracy"]),
        ("sigmoid", np.arange(6) % 2, (6, 1), "BinaryCrossentropy", False, [("accuracy", 0.5)]),
        ("linear", np.arange(6) % 2, (6, 1), "BinaryCrossentropy", True, [("accuracy", 0.0)]),
        ("linear", np.arange(6) / 3, (6, 1), "mean_squared_error", None, ["mae"]),
    ],
)
def test_loss_of_a_model_that_was_not_compiled(activation, target, outputs, loss, from_logits, metrics):
    chosen = worker.infer(activation, target_facts(target), outputs)
    assert chosen.loss == loss or type(chosen.loss).__name__ == loss
    assert from_logits is None or chosen.loss.from_logits is from_logits
    assert [m if isinstance(m, str) else (m.name, m.threshold) for m in chosen.metrics] == metrics


def test_last_activation_is_found_in_the_layers():
    def ending(*last):
        return keras.Sequential([keras.Input((4,)), *last])

    inputs = keras.Input((4,))
    nested = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Activation("sigmoid")])
    assert worker.last_activation(ending(layers.Dense(4, activation="softmax"))) == "softmax"
    assert worker.last_activation(ending(layers.Dense(4), layers.Softmax(), layers.Reshape((2, 2)))) == "softmax"
    assert worker.last_activation(ending(layers.Dense(4))) == "linear"
    assert worker.last_activation(ending(nested)) == "sigmoid"
    functional = keras.Model(inputs, keras.ops.softmax(layers.Dense(3)(inputs)))
    assert worker.last_activation(functional) == "softmax"
    subclassed = Plain()
    subclassed(np.ones((1, 4)))
    with pytest.raises(ConfigError, match="no loss follows from model=Plain"):
        worker.last_activation(subclassed)


def test_model_that_was_not_compiled_is_prepared_from_a_batch():
    model = KerasModel(keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4)]), CPU)
    chosen = worker.prepare(model, target_facts(LABELS))
    assert "class index; the last activation is linear" in chosen.why
    objective, everything = keras_objective(model), batch_of(slice(0, 24))
    before = float(objective(model, everything).loss_sum.detach())
    train(model, steps=20)
    assert float(objective(model, everything).loss_sum.detach()) < before
    metrics = KerasMetrics(model)
    metrics.update(objective(model, everything).outputs, everything[1])
    assert set(metrics.result(metrics.vector())) == {"accuracy"}


def test_what_the_trainer_was_given_comes_before_compile_and_that_before_inference():
    compiled = worker.prepare(KerasModel(cnn(), CPU), None, optimizer="adam")
    assert (compiled.loss, type(compiled.optimizer).__name__) == ("sparse_categorical_crossentropy", "Adam")
    given = worker.prepare(KerasModel(cnn(), CPU), None, loss="kld", metrics=["mse"])
    assert (given.loss, given.metrics, type(given.optimizer).__name__) == ("kld", ["mse"], "SGD")
    own = KerasModel(OwnLoss([keras.Input((3,)), layers.Dense(1)]), CPU)
    assert "own compute_loss" in worker.prepare(own, None).why
    with pytest.raises(ConfigError, match="data shows no target"):
        worker.prepare(KerasModel(two_inputs(), CPU), None)


def test_loss_of_a_sequence_whose_length_is_open_follows_from_its_target():
    model = KerasModel(keras.Sequential([keras.Input((None, 3)), layers.Dense(1), layers.Reshape((-1,))]), CPU)
    assert worker.prepare(model, target_facts(np.zeros((5, 7), int))).loss.name == "binary_crossentropy"


def test_objects_of_keras_travel_as_configs():
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=2, decay_rate=0.5)
    sent = keras_pack.portable(
        {
            "loss": keras.losses.CategoricalCrossentropy(label_smoothing=0.25),
            "optimizer": keras.optimizers.SGD(rate, momentum=0.5),
            "metrics": ["accuracy", keras.metrics.AUC(num_thresholds=7, name="area")],
        }
    )
    changed = keras_pack.portable(keras.optimizers.SGD(0.5, momentum=0.5))
    assert str(sent["optimizer"]) == str(keras_pack.portable(keras.optimizers.SGD(rate, momentum=0.5)))
    assert str(sent["optimizer"]) != str(changed)
    chosen = worker.prepare(KerasModel(cnn(), CPU), None, **pickle.loads(pickle.dumps(sent)))
    assert chosen.loss.get_config()["label_smoothing"] == 0.25
    assert chosen.optimizer.momentum == 0.5
    assert float(chosen.optimizer.learning_rate) == 0.5
    assert (chosen.metrics[0], chosen.metrics[1].name, chosen.metrics[1].num_thresholds) == ("accuracy", "area", 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "cross_entropy"}, "loss='cross_entropy' is not known to Keras.*sparse_categorical_crossentropy"),
        ({"loss": {"a": "mse", "b": "nonsense"}}, "loss='nonsense'"),
        ({"metrics": ["accuracy", ["top5"]]}, "metrics='top5' is not known to Keras"),
        ({"optimizer": "adamm"}, "optimizer='adamm' is not known to Keras"),
        ({"optimizer": 3}, "optimizer=3: expected a word"),
        ({"scheduler": len}, "scheduler= drives torch optimizers.*schedules.CosineDecay"),
        ({"scheduler": len, "optimizer": keras.optimizers.SGD()}, "scheduler= drives torch optimizers"),
        ({"scheduler": 3, "optimizer": torch.optim.SGD}, "scheduler=3: expected a callable"),
        ({"step_fn": len}, "step_fn= needs a torch model"),
    ],
)
def test_options_that_do_not_go_with_a_keras_model_are_refused(options, message):
    everything = dict.fromkeys(("loss", "optimizer", "metrics", "scheduler", "step_fn"))
    keras_pack.check_options(**everything)
    with pytest.raises(ConfigError, match=message):
        keras_pack.check_options(**{**everything, **options})


# --- optimizer -------------------------------------------------------------------------------------------------------

RATE = keras.optimizers.schedules.ExponentialDecay(0.01, decay_steps=2, decay_rate=0.5)
OPTIMIZERS = {
    "sgd with momentum and a schedule": lambda: keras.optimizers.SGD(RATE, momentum=0.9, global_clipnorm=0.5),
    "adam with averages": lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=2),
    "adamw accumulating": lambda: keras.optimizers.AdamW(gradient_accumulation_steps=2),
    "adafactor": keras.optimizers.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_optimizer_goes_on_exactly(name):
    def start():
        model = KerasModel(cnn(norm=False, optimizer=OPTIMIZERS[name]()), CPU)
        return model, KerasOptimizer(model), keras_objective(model)

    whole = start()
    for _ in range(3):
        one_step(*whole, [slice(0, 8)])
    resumed = start()
    for name, tensor in resumed[0].state().items():
        tensor.copy_(whole[0].state()[name])
    saved = {name: tensor.clone() for name, tensor in whole[1].state_dict().items()}
    assert list(saved) == list(resumed[1].state_dict())
    resumed[1].load_state_dict(saved)
    for run in (whole, resumed):
        for _ in range(2):
            one_step(*run, [slice(8, 16)])
    assert distance(whole[0].state(), resumed[0].state()) == 0
    assert distance(whole[1].state_dict(), resumed[1].state_dict()) == 0
    assert whole[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"]


def test_rate_follows_the_schedule_of_keras():
    model = KerasModel(cnn(optimizer=keras.optimizers.SGD(RATE)), CPU)
    optimizer = KerasOptimizer(model)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        one_step(model, optimizer, keras_objective(model), [slice(0, 8)])
    assert rates == pytest.approx([0.01, 0.01 * 0.5**0.5, 0.005])


def test_state_of_another_optimizer_is_refused():
    def optimizer(name):
        model = cnn()
        model.compile(name, loss="sparse_categorical_crossentropy")
        return KerasOptimizer(KerasModel(model, CPU))

    with pytest.raises(CheckpointError, match="has 2 tensors that do not fit the 14 of Adam"):
        optimizer("adam").load_state_dict(optimizer("sgd").state_dict())


def test_parameters_without_gradient_stay_as_they_are():
    model = KerasModel(cnn(norm=False), CPU)
    optimizer = KerasOptimizer(model)
    keras_objective(model)(model, batch_of(slice(0, 8))).loss_sum.backward()
    kernel = model.parameters()["0000:conv2d/kernel"]
    kernel.grad = None
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    optimizer.step()
    changed = {name for name, tensor in model.state().items() if not torch.equal(tensor, before[name])}
    assert changed == set(model.parameters()) - {"0000:conv2d/kernel"}


def test_constraints_hold_and_averages_end_up_in_the_model():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, kernel_constraint="non_neg")])
    model.compile(keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5), "mse")
    model = KerasModel(model, CPU)
    optimizer = KerasOptimizer(model)
    seen = []
    for _ in range(2):
        keras_objective(model)(model, (torch.ones(4, 3), -torch.ones(4, 2))).loss_sum.backward()
        optimizer.step()
        seen.append(model.parameters()["0001:dense/bias"].detach().clone())
    assert (model.parameters()["0000:dense/kernel"] >= 0).all()
    optimizer.finalize()
    torch.testing.assert_close(model.parameters()["0001:dense/bias"].detach(), (seen[0] + seen[1]) / 2)


def test_trained_optimizer_of_the_driver_goes_on():
    source = cnn(optimizer="adam")
    source.train_step((torch.from_numpy(DIGITS), torch.from_numpy(LABELS)))
    optimizer = KerasOptimizer(travel(source))
    assert int(optimizer.keras_optimizer.iterations) == 1
    assert (
        distance(
            optimizer.state_dict(), dict(zip(optimizer.state_dict(), (v.value for v in source.optimizer.variables)))
        )
        == 0
    )


# --- metrics ---------------------------------------------------------------------------------------------------------

METRICS = {
    "accuracy": lambda: "accuracy",
    "auc": lambda: keras.metrics.AUC(),
    "f1": lambda: keras.metrics.F1Score(average="micro", threshold=0.5),
    "r2": lambda: keras.metrics.R2Score(),
    "cosine": lambda: keras.metrics.CosineSimilarity(),
}
DRAW = np.random.default_rng(2)
CLASSES = DRAW.integers(0, 4, 24), DRAW.dirichlet(np.ones(4), 24)
BINARY = DRAW.integers(0, 2, (24, 1)), DRAW.random((24, 1))
NUMBERS = DRAW.normal(size=(24, 3)), DRAW.normal(size=(24, 3))
CASES = [(METRICS[name], *data) for name, data in zip(METRICS, (CLASSES, BINARY, BINARY, NUMBERS, NUMBERS))]


def measured(metric):
    """Return the metrics of a compiled model which nobody calls."""
    model = KerasModel(keras.Sequential([keras.Input((1,)), layers.Dense(1)]), CPU)
    worker.compile_model(model, loss="mse", metrics=[metric])
    return KerasMetrics(model)


@pytest.mark.parametrize(("make", "target", "outputs"), CASES, ids=METRICS)
def test_metrics_over_two_workers_are_those_of_keras(make, target, outputs):
    target, outputs = torch.from_numpy(target), torch.from_numpy(outputs).float()
    expected = measured(make())
    expected._metrics.update_state(target, outputs)
    workers = [measured(make()) for _ in range(3)]
    for part, metrics in zip((slice(0, 5), slice(5, 6), slice(6, 24)), (workers[0], workers[1], workers[1])):
        metrics.update(outputs[part], target[part])
    workers[2].prime(outputs[:2], target[:2])
    assert not workers[2].vector().any()
    counts = sum(metrics.vector() for metrics in workers)
    found = [list(metrics.result(counts).values()) for metrics in workers]
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx([float(v) for v in expected._metrics.result().values()], rel=1e-5)
    assert not workers[0].vector().any()


class Largest(keras.metrics.Metric):
    def __init__(self, **options):
        super().__init__(**options)
        self.largest = self.add_variable((), "zeros")

    def update_state(self, target, outputs, sample_weight=None):
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(outputs)))

    def result(self):
        return self.largest


def test_metric_that_does_not_add_up_is_refused():
    with pytest.raises(ConfigError, match=r"largest.*Largest.*does not add up"):
        measured(Largest()).update(torch.ones(4, 1), torch.ones(4, 1))


def test_metric_per_class_has_a_name_for_each():
    metrics = measured(keras.metrics.F1Score())
    metrics.update(torch.eye(3), torch.eye(3))
    found = metrics.result(metrics.vector())
    assert found == pytest.approx({"f1_score_0": 1, "f1_score_1": 1, "f1_score_2": 1})


def test_model_without_metrics_has_none():
    metrics = KerasMetrics(KerasModel(two_inputs(), CPU))
    metrics.update(torch.ones(2, 1), torch.ones(2))
    assert metrics.result(metrics.vector()) == {}


# --- travelling ------------------------------------------------------------------------------------------------------


def stateful():
    return keras.Sequential([keras.Input((3, 2), batch_size=4), layers.LSTM(2, stateful=True)])


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def all_frozen():
    model = cnn()
    model.trainable = False
    return model


def locked():
    class Locked(layers.Layer):
        def __init__(self, lock):
            super().__init__()
            self.lock = lock

        def call(self, x):
            return x

        def get_config(self):
            raise TypeError("no config for a lock")

    return keras.Sequential([keras.Input((3,)), Locked(3), layers.Dense(1)])


def mixed():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, dtype="mixed_float16")], name="half")
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    return model


def same_names():
    def layer():
        class Twin(layers.Layer):
            def call(self, x):
                return x

        return Twin()

    return keras.Sequential([keras.Input((3,)), layer(), layer(), layers.Dense(1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([layers.Dense(1)]), "Sequential has no weights yet"),
        (lambda: layers.Dense(1), "is a part of a Keras model"),
        (stateful, "is stateful.*stateful=False"),
        (lambda: OwnStep([keras.Input((3,)), layers.Dense(1)]), "OwnStep has its own train_step"),
        (all_frozen, "all layers are frozen"),
        (locked, "cannot be saved by Keras: no config for a lock.*without arguments"),
        (mixed, 'precision="fp16"'),
        (lambda: keras.Sequential([keras.Input((3,)), Sized(2)]), r"Sized.*takes width, rate.*no get_config"),
        (same_names, "two different objects of the model are called 'Twin'"),
        (
            lambda: keras.Sequential([keras.Input((3,)), layers.SpectralNormalization(layers.Dense(1))]),
            "SpectralNormalization.*changes its kernel",
        ),
        (lambda: keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)]), "uses renorm"),
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), keras.Sequential([keras.Input((2,)), layers.Dense(1)])),
            r"model\.1 .* is a Keras layer in a torch module",
        ),
    ],
)
def test_model_that_cannot_be_trained_is_named(make, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        blueprint.pack(make())


def test_code_for_tensorflow_is_refused():
    tensorflow = type(sys)("tensorflow")

    def swish(x):
        return tensorflow.nn.swish(x)

    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.layers[-1].activation = swish
    with pytest.raises(ConfigError, match=r"swish of the model uses tensorflow of tensorflow.*keras\.ops"):
        blueprint.pack(model)


def test_description_follows_structure_and_compile_and_not_weights():
    first = blueprint.describe(cnn())
    assert json.loads(json.dumps(first)) == first
    assert blueprint.describe(blueprint.pack(cnn())) == blueprint.describe(travel(cnn()).user_module) == first
    assert blueprint.describe(cnn(norm=False))["sha256"] != first["sha256"]
    other = blueprint.describe(cnn(optimizer=keras.optimizers.SGD(0.5)))
    assert other["sha256"] == first["sha256"]
    assert other["compile"] != first["compile"]
    assert first["parameters"] == cnn().count_params()


def test_wrong_backend_is_refused_before_keras_is_imported(monkeypatch):
    spec = importlib.util.find_spec("lepton_ray.train.keras")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setitem(sys.modules, "keras", None)  # so that importing it raises ImportError
    with pytest.raises(ConfigError, match="this process runs KERAS_BACKEND=tensorflow"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def needing(backend):
    module = {"numpy": "jax"}.get(backend, backend)  # Keras' numpy backend borrows from JAX
    missing = importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not installed"), pytest.mark.slow]
    return pytest.param(backend, marks=[*marks, *([pytest.mark.tensorflow] if backend == "tensorflow" else [])])


@pytest.mark.parametrize("backend", [needing(b) for b in ("torch", "tensorflow", "jax", "numpy")])
def test_model_of_any_backend_is_trained_and_comes_back(backend, tmp_path):
    """The driver is a process of its own, with classes and lambdas in `__main__`, and without torch where it can be."""
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(Path(__file__).parent / "keras_driver.py"), str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "packed\n"
        packed = pickle.loads((tmp_path / "packed.pickle").read_bytes())
        model = blueprint.build(packed["blueprint"], CPU, 0)
        inputs = [torch.from_numpy(x) for x in packed["inputs"]]
        model.train(False)
        np.testing.assert_allclose(model(*inputs).detach(), packed["outputs"], atol=1e-5)
        model.train(True)
        objective, optimizer = keras_objective(model), KerasOptimizer(model)
        for step in range(3):
            model.seed(step)
            optimizer.zero_grad()
            outcome = objective(model, (*inputs, torch.ones(6, 2)))
            (outcome.loss_sum / outcome.weight).backward()
            optimizer.step()
        model.train(False)
        outputs = model(*inputs).detach()
        metrics = KerasMetrics(model)
        metrics.update(outputs, torch.ones(6, 2))
        assert list(metrics.result(metrics.vector())) == ["mse", "distance"]
        assert np.abs(outputs.numpy() - packed["outputs"]).max() > 1e-3
        np.savez(tmp_path / "trained.npz", **{name: t.numpy() for name, t in model.state().items()})
        driver.communicate("trained\n", timeout=60)
    assert driver.returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "restored.npy"), outputs, atol=1e-5)
