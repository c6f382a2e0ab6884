"""What a run on Ray's workers gives its user; tests/train/test_loop.py has what training itself can do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lepton_ray import Callback, DistributedTrainer, Result, Sync, journal
from lepton_ray.callbacks import RunView, TensorBoard
from lepton_ray.storage import Folder
from tests.train.in_process import Records, of
from tests.train.plain import (
    BATCH,
    CLASSES,
    FEATURES,
    NOISE,
    SAMPLES,
    STEPS,
    Gan,
    X,
    Y,
    assert_plain_gan,
    assert_same_weights,
    cross_entropy,
    gan_step,
    make_list,
    net,
    plain,
    sgd,
)

pytestmark = pytest.mark.slow

WAIT_S = 60


def train(
    storage: str, model: Any = None, data: Any = (X, Y), test: Any = None, **options: Any
) -> tuple[Result, Records]:
    """Train on two workers and return the result and the run's records."""
    options = {"batch": BATCH, "optimizer": sgd, "storage": storage, "num_workers": 2} | options
    job = DistributedTrainer(net() if model is None else model, data, test, **options).submit()
    result = job.wait(timeout_s=WAIT_S)
    return result, journal.read(Folder(result.path))


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
    found = mine.evaluate()
    assert found["loss"] == pytest.approx(loss)
    assert found["loss"] == pytest.approx(result.metrics["test_loss"])
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1).numpy() == Y).mean()))


class Checking(nn.Module):
    """Refuses to train where torch may choose an algorithm that is not deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        ).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.are_deterministic_algorithms_enabled() or not self.training
        return self.inner(x)


def test_reproducible_runs_end_with_the_same_bits(ray_cluster: None, storage: str) -> None:
    model = Checking()
    digests = {
        train(storage, copy.deepcopy(model), loss="cross_entropy", reproducible=True)[0].receipt.weights_sha256
        for _ in range(2)
    }
    assert len(digests) == 1


def test_two_optimizers_in_a_step_of_ones_own(ray_cluster: None, storage: str) -> None:
    options: dict[str, Any] = {"batch": 12, "step_fn": gan_step, "optimizer": make_list, "steps": 6}
    result, records = train(storage, Gan(), (X, NOISE), **options)
    assert len(of(records, "step")) == 6
    assert_plain_gan(result.model(), of(records, "step"))


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
    result, records = train(storage, test=(X, Y), metrics="accuracy", epochs=2, callbacks=[Diary(), TensorBoard()])
    diary = (Path(result.path) / "diary.txt").read_text().split("\n")[:-1]
    regular = [line for line in diary if not line.startswith("checkpoint")]
    first, second = (["step " + str(step) for step in range(start, start + STEPS)] for start in (0, STEPS))
    assert regular == [*first, "epoch 0", *second, "epoch 1", f"end {2 * STEPS}"]
    # A checkpoint is told of once it is safe, which the writing thread decides.
    saved = [record["step"] for record in of(records, "checkpoint_saved")]
    assert [int(line.split()[1]) for line in diary if line.startswith("checkpoint")] == saved == [0, STEPS, 2 * STEPS]
    assert diary.index(f"checkpoint {STEPS}") > diary.index("step 3")
    assert list((Path(result.path) / "tensorboard").glob("events.out.tfevents.*"))


class Links(Callback):
    """Writes down how the process of rank 0 is connected to the others."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_epoch(self, run: RunView, metrics: Mapping[str, Any]) -> None:
        from lepton_ray.collective import ray_group

        groups = [group for name, group in ray_group._forming_or_formed.items() if name.startswith(f"{run.name}/")]
        kinds = [type(link).__name__ for group in groups for link in group.formed._mesh.links.values()]
        Path(self.path).write_text(" ".join(kinds))


@pytest.mark.parametrize(("tls", "kind"), [(True, "SealedLink"), (False, "Link")])
def test_workers_encrypt_what_they_send_if_asked(ray_cluster: None, storage: str, tls: bool, kind: str) -> None:
    trainer = DistributedTrainer(
        nn.Linear(FEATURES, CLASSES).double(),
        (X, Y),
        num_workers=2,
        batch=BATCH,
        sync=Sync.every_step(tls=tls),
        callbacks=[Links(f"{storage}.links")],
        storage=storage,
    )
    trainer.train()
    assert Path(f"{storage}.links").read_text() == kind
