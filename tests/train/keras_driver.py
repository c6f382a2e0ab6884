"""A driver on the Keras backend of its environment: packs a model, waits, and takes the trained weights back.

Run by test_keras.py as `python keras_driver.py FOLDER`. Its own classes live in `__main__`, as in a user's script.
"""

import pickle
import sys
from pathlib import Path

import keras
import numpy as np

from lepton_ray.train import blueprint

POWER = 2.0


class Scale(keras.layers.Layer):
    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return x * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


def steep(x):
    return keras.ops.tanh(x) * POWER


def distance(target, outputs):
    return keras.ops.mean(keras.ops.abs(target - outputs), axis=-1)


def make():
    pixels = keras.Input((8, 8, 1), dtype="uint8", name="pixels")
    age = keras.Input((3,), name="age")
    x = keras.layers.Rescaling(1 / 255)(pixels)
    x = keras.layers.Conv2D(4, 3, activation=steep, kernel_regularizer=keras.regularizers.L2(1e-2))(x)
    x = keras.layers.BatchNormalization(momentum=0.7)(x)
    x = keras.layers.Lambda(lambda t: keras.ops.power(t, POWER))(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Concatenate()([x, keras.Sequential([keras.Input((3,)), keras.layers.Dense(5), Scale(0.5)])(age)])
    x = keras.layers.Dropout(0.5)(x)
    y = keras.layers.Dense(2)(x)
    model = keras.Model([pixels, age], y)
    rate = keras.optimizers.schedules.ExponentialDecay(0.02, decay_steps=3, decay_rate=0.5)
    model.compile(keras.optimizers.Adam(rate), loss=distance, metrics=["mse", distance])
    return model


def main(folder):
    random = np.random.default_rng(0)
    inputs = [random.integers(0, 255, (6, 8, 8, 1)).astype("uint8"), random.normal(size=(6, 3)).astype("float32")]
    model = make()
    with open(folder / "packed.pickle", "wb") as file:
        outputs = keras.ops.convert_to_numpy(model(inputs, training=False))
        pickle.dump({"blueprint": blueprint.pack(model), "inputs": inputs, "outputs": outputs}, file)
    if keras.config.backend() != "torch":
        assert "torch" not in sys.modules, "a driver on another backend must not need torch"
    sys.stdout.write("packed\n")
    sys.stdout.flush()
    sys.stdin.readline()
    with np.load(folder / "trained.npz") as trained:
        blueprint.restore_into(model, dict(trained))
    np.save(folder / "restored.npy", keras.ops.convert_to_numpy(model(inputs, training=False)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
