"""Trains a Keras model from a driver on the Keras backend of its environment: `python keras_driver.py STORAGE`."""

from __future__ import annotations

import os
import sys

import numpy as np

from lepton_ray import DistributedTrainer

BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "tensorflow":
    from tensorflow import keras  # as users of TensorFlow write it
else:
    import keras


class Double(keras.layers.Layer):
    def call(self, x):
        return keras.ops.multiply(x, 2)


def main(storage: str) -> None:
    assert keras.config.backend() == BACKEND
    draw = np.random.default_rng(0)
    x = draw.normal(size=(120, 6, 6, 1)).astype("float32")
    y = (x.mean((1, 2, 3)) > 0).astype("int64")
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Flatten(),
            Double(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    weights = model.weights
    before = model.get_weights()
    result = DistributedTrainer(model, (x, y), (x, y), num_workers=2, epochs=5, batch=30, storage=storage).train()
    assert all(a is b for a, b in zip(weights, model.weights))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before, model.get_weights()))
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    assert abs(result.metrics["test_accuracy"] - (outputs.argmax(1) == y).mean()) < 1e-6
    assert abs(result.metrics["test_loss"] + np.log(outputs[np.arange(len(y)), y]).mean()) < 1e-5
    print(f"trained by a driver on {BACKEND}")


if __name__ == "__main__":
    main(sys.argv[1])
