"""Keras models and their data, for the tests of whole jobs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

layers = keras.layers

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
