"""A Keras model, trained by four workers; the trained weights are back in the same object afterwards.

Needs: pip install 'lepton-ray[keras,examples]'
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # here in the driver any backend does; workers always use torch

import keras
from keras.layers import Conv2D, Dense, Flatten, MaxPooling2D
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lepton_ray import DistributedTrainer

if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images.reshape(-1, 8, 8, 1).astype("float32") / 16, labels, test_size=0.2, random_state=0
    )

    model = keras.Sequential(
        [
            keras.Input(shape=(8, 8, 1)),
            Conv2D(32, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Flatten(),
            Dense(64, activation="relu"),
            Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    trainer = DistributedTrainer(
        model=model, train_data=(x_train, y_train), test_data=(x_test, y_test), num_workers=4, epochs=10
    )
    result = trainer.train()
    print(f"Trained {result.receipt.steps} steps; the run is in {result.path}")

    loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"Test loss: {loss:.4f}, test accuracy: {accuracy:.4f}")
