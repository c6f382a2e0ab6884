"""Whatever a user gets wrong is said in words: what was asked, what was found, what to change.

The first half is wrong before anything starts; the second half goes wrong while workers train.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lepton_ray import (
    Batch,
    Callback,
    Checkpoints,
    ConfigError,
    DistributedTrainer,
    EarlyStopping,
    Faults,
    Parallel,
    Resources,
    RunFailed,
    WorkerFailed,
    journal,
)
from lepton_ray.callbacks import RunView
from lepton_ray.cluster.names import SCHEDULER, actor_names, named_actor
from lepton_ray.data.order import order
from lepton_ray.job import Job
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import newest

SAMPLES, FEATURES, CLASSES = 20, 4, 3
X = np.random.default_rng(0).normal(size=(SAMPLES, FEATURES)).astype(np.float32)
Y = np.arange(SAMPLES) % CLASSES
SGD = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def net() -> nn.Module:
    return nn.Linear(FEATURES, CLASSES)


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.guard = net(), threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Counting(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def trainer(model: Any = None, train: Any = (X, Y), test: Any = None, **options: Any) -> DistributedTrainer:
    return DistributedTrainer(net() if model is None else model, train, test, **options)


def case(make: Callable[[], Any], *fragments: str, name: str) -> Any:
    return pytest.param(make, fragments, id=name)


KNOWN_AT_ONCE = [
    # data
    case(lambda: trainer(train=(X, Y[:-1])), "x has 20 samples", "y has 19", name="x and y differ in length"),
    case(lambda: trainer(train=(X[:0], Y[:0])), "train_data is empty", "(0, 4)", name="no data"),
    case(lambda: trainer(train=None), "train_data is None", "Parquet", name="None as data"),
    case(
        lambda: trainer(train=(X, Y + 1)), "labels run from 1 to 3", "3 outputs", "4 outputs", name="labels too large"
    ),
    case(lambda: trainer(train=(X, Y - 1)), "labels run from -1", "start at 0", name="labels too small"),
    case(lambda: trainer(test=(X, Y + 1)), "test_data: labels run from 1 to 3", name="test labels too large"),
    case(
        lambda: trainer(train=(X, Y + 1), loss=nn.CrossEntropyLoss()), "labels run from 1", name="labels, loss module"
    ),
    case(lambda: trainer(nn.Linear(5, 3)), "cannot take train_data", "(2, 4) float32", name="wrong width of x"),
    case(lambda: trainer(test=(X[:, :2], Y)), "cannot take test_data", "(2, 2) float32", name="wrong width of test x"),
    case(lambda: trainer(train=(X.astype(np.float64), Y)), "Double", "float64", "transform=", name="wrong type of x"),
    case(lambda: trainer(train=(X, Y.astype(str))), "train_data[1]", "dtype <U", "numbers", name="labels as text"),
    case(lambda: trainer(train=([[1, 2], [3]], Y)), "is a list", "numpy.asarray", name="lists as x"),
    case(lambda: trainer(train=(i for i in X)), "generator", "IterableDataset", name="a generator as data"),
    case(
        lambda: trainer(train=DataLoader(TensorDataset(torch.zeros(3)))),
        "DataLoader",
        "loader.dataset",
        "batch=",
        name="a DataLoader",
    ),
    case(lambda: trainer(train="/nowhere/*.parquet"), "/nowhere/*.parquet", "no file matches", name="no such file"),
    case(lambda: trainer(train=Counting()), "no loss can be inferred", "Pass loss=", name="a stream without loss"),
    case(lambda: trainer(transform=3), "transform=3", "function", name="a transform that is none"),
    case(lambda: trainer(collate=list), "collate= is for a Dataset", "transform=", name="collate for arrays"),
    # the model
    case(lambda: trainer(3), "model=int", "torch.nn.Module", name="no model"),
    case(lambda: trainer(Locked()), "model.guard", "lock", "function without arguments", name="unpicklable model"),
    case(
        lambda: trainer(net().requires_grad_(False)), "all parameters are frozen", "requires_grad", name="frozen model"
    ),
    case(
        lambda: trainer(loss=functools.partial(lambda lock, out, y: out.sum(), threading.Lock())),
        "loss(argument 0)",
        "lock",
        "inside the function",
        name="unpicklable loss",
    ),
    # words
    case(lambda: trainer(optimizer="adm"), "'adm'", "Did you mean 'adam'", "rmsprop", name="optimizer misspelt"),
    case(lambda: trainer(loss="crossentropy"), "Did you mean 'cross_entropy'", "mse", name="loss misspelt"),
    case(lambda: trainer(metrics=["acuracy"]), "Did you mean 'accuracy'", "top5", name="metric misspelt"),
    case(lambda: trainer(precision="float16"), "'float16'", "fp32, bf16, fp16", name="unknown precision"),
    case(lambda: trainer(optimizer=SGD), "<SGD>", "functools.partial(SGD, lr=...)", name="an optimizer instance"),
    case(
        lambda: trainer(scheduler=torch.optim.lr_scheduler.StepLR(SGD, 1)),
        "<StepLR>",
        "lambda optimizer: StepLR(optimizer, ...)",
        name="a scheduler instance",
    ),
    case(lambda: trainer(loss=nn.MSELoss), "loss=MSELoss is a class", "MSELoss()", name="a loss class"),
    case(lambda: trainer(loss=nn.MSELoss(reduction="sum")), 'reduction="sum"', "(sum, weight)", name="a summed loss"),
    # numbers
    case(lambda: trainer(num_workers=-1), "num_workers=-1", ">= 1", name="negative workers"),
    case(lambda: trainer(num_workers=2.0), "num_workers=2.0", "whole number", name="half-hearted workers"),
    case(lambda: trainer(epochs=-1), "epochs=-1", ">= 1", name="negative epochs"),
    case(lambda: trainer(steps=0), "steps=0", ">= 1", name="no steps"),
    case(lambda: trainer(seed=-1), "seed=-1", "2**63", name="negative seed"),
    case(lambda: trainer(validate_every=0, test=(X, Y)), "validate_every=0", name="validate_every of 0"),
    case(lambda: trainer(batch=-1), "samples=-1", ">= 1", name="negative batch"),
    case(lambda: trainer(batch="64"), "batch='64'", "Batch(...)", name="batch as text"),
    case(lambda: trainer(batch=Batch(clip_norm=-1)), "clip_norm=-1", ">= 0", name="negative clip_norm"),
    case(lambda: trainer(batch=Batch(clip_norm=0)), "clip_norm=0", "None", name="clip_norm of 0"),
    case(lambda: Checkpoints(every_steps=1.5), "every_steps=1.5", "whole number", name="checkpoints at half steps"),
    case(lambda: Checkpoints(keep=0), "keep=0", ">= 1", name="no checkpoint kept"),
    case(lambda: Checkpoints(best="a", best_mode="up"), "best_mode='up'", "'min'", name="unknown best_mode"),
    case(lambda: Resources(cpus=-1), "cpus=-1", ">= 0", name="negative CPUs"),
    case(lambda: Resources(custom={"TPU": -1}), "TPU", "-1", name="negative TPUs"),
    case(lambda: Faults(lease_s=0), "lease_s=0", "0.1", name="no lease"),
    case(lambda: Faults(mirror_every=-1), "mirror_every=-1", ">= 0", name="a negative number of steps"),
    case(lambda: EarlyStopping(patience=0), "patience=0", "epochs >= 1", name="no patience"),
    # what contradicts
    case(lambda: trainer(epochs=1, steps=1), "epochs=1 and steps=1", "Give one", name="epochs and steps"),
    case(lambda: trainer(num_workers=4, batch=2), "batch=2", "4 microbatches", "at least 4", name="batch too small"),
    case(
        lambda: Batch(samples=2, microbatches=4), "samples=2", "microbatches=4", "at most 2", name="empty microbatches"
    ),
    case(
        lambda: trainer(num_workers=4, batch=Batch(microbatches=2)),
        "microbatches=2",
        "num_workers=4",
        "2 workers would idle",
        name="idle workers",
    ),
    case(
        lambda: trainer(parallel=Parallel(tensor=2)), "tensor=2", "replicas of 2", "Parallel()", name="tensor parallel"
    ),
    case(lambda: Parallel(shard=0), "shard=0", ">= 1", name="no shards"),
    case(lambda: trainer(test=(X, Y), step_fn=lambda m, b, o: 0), "step_fn needs loss=", name="step_fn, test_data"),
    case(lambda: trainer(step_fn=3), "step_fn=3", "(model, batch, optimizers)", name="a step_fn that is none"),
    case(
        lambda: trainer(batch=Batch(clip_norm=1.0), step_fn=lambda m, b, o: 0),
        "clip_norm",
        "step_fn",
        name="step_fn, clip",
    ),
    case(lambda: trainer(validate_every=5), "validate_every", "test_data=", name="validate_every, no test_data"),
    case(lambda: trainer(checkpoints=Checkpoints(best="test_loss")), "test_data=", name="best by no test_data"),
    case(lambda: trainer(callbacks=[EarlyStopping()]), "EarlyStopping('test_loss')", "test_data=", name="stop by none"),
    # kinds
    case(lambda: trainer(resources={"cpus": 1}), "resources=", "Resources(...)", name="resources as a dict"),
    case(lambda: trainer(callbacks=[len]), "builtin_function", "Callback", name="a callback that is none"),
    case(lambda: trainer(callbacks=EarlyStopping()), "expected a list", name="a callback without a list"),
    case(lambda: trainer(storage="runs"), "storage='runs'", "not an absolute path", "/runs", name="relative storage"),
    case(lambda: trainer(name="a/b"), "name='a/b'", "letters, digits", name="a name with a slash"),
    case(lambda: trainer(name=3), "name=3", "letters, digits", name="a number as name"),
]


@pytest.mark.parametrize(("make", "fragments"), KNOWN_AT_ONCE)
def test_it_is_refused_in_words_before_anything_starts(make: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    had_ray, began_s = ray.is_initialized(), time.process_time()
    with pytest.raises(ConfigError) as caught:
        make()
    assert time.process_time() - began_s < 2
    assert ray.is_initialized() == had_ray
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="nworkers"):
        trainer(nworkers=3)


NEEDS_THE_CLUSTER = [
    case(
        lambda storage: trainer(num_workers=7, storage=storage),
        "num_workers=7",
        "7 x (1 CPU)",
        "can hold 6",
        "Use num_workers=6",
        name="more workers than CPUs",
    ),
    case(
        lambda storage: trainer(resources=Resources(gpus=1), storage=storage),
        "1 CPU + 1 GPU",
        "no node",
        name="a GPU that is not there",
    ),
    case(
        lambda storage: trainer(resources=Resources(custom={"TPU": 4}), storage=storage),
        "4 TPU",
        "Change Resources",
        name="a TPU that is not there",
    ),
    case(lambda storage: trainer(storage=f"{storage}/file/runs"), "file/runs", name="storage that cannot be written"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "fragments"), NEEDS_THE_CLUSTER)
def test_it_is_refused_before_any_actor_starts(
    make: Callable[[str], DistributedTrainer], fragments: tuple[str, ...], ray_cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    asked, before = make(str(tmp_path)), jobs_and_workers()
    began_s = time.process_time()
    with pytest.raises(ConfigError) as caught:
        asked.submit()
    assert time.process_time() - began_s < 2
    assert jobs_and_workers() <= before
    for fragment in fragments:
        assert fragment in str(caught.value)


def jobs_and_workers() -> set[str]:
    """Name the jobs that the scheduler has and the workers that there are."""
    scheduler = named_actor(SCHEDULER)
    jobs = [] if scheduler is None else ray.get(scheduler.overview.remote(), timeout=30)["jobs"]
    return {*jobs, *(name for name in actor_names() if name.startswith("worker:"))}


# --- while workers train ---------------------------------------------------------------------------------------------


class Bad(nn.Module):
    """Does something at the `step`-th forward, on the worker whose rank it is."""

    def __init__(self, step: int, act: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.calls, self.step, self.act = net(), 0, step, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.training:
            self.calls += 1
            if self.calls > self.step:
                return y * self.act()
        return y


def deep_in_user_code() -> float:
    raise KeyError("what the user wrote")


def raise_for(rank: int) -> Callable[[], float]:
    """Return what raises on the worker of one rank only: its log file tells the rank."""

    def act() -> float:
        if f"worker-{rank}.log" in os.readlink("/proc/self/fd/1"):
            deep_in_user_code()
        return 1.0

    return act


class Raising(Callback):
    def on_step(self, run: RunView, record: Any) -> None:
        if record["step"] == 2:
            deep_in_user_code()


class Rows(Dataset):
    """One sample of step 1 raises; the driver looks at the first two only."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == max(order(0, 0, SAMPLES)[4:8]):
            deep_in_user_code()
        return torch.from_numpy(X[index]), index % CLASSES


def broken_factory() -> nn.Module:
    deep_in_user_code()
    return net()


def uneven(model: nn.Module, batch: Any, optimizer: Any) -> torch.Tensor:
    """Step once more on rank 1 than on rank 0."""
    for _ in range(2 if "worker-1.log" in os.readlink("/proc/self/fd/1") else 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
    return loss


FAILS: dict[str, tuple[Callable[[], dict[str, Any]], int, int]] = {
    # what to train, and the rank and the steps done (-1: none yet) that are blamed
    "model": (lambda: {"model": Bad(2, raise_for(1)), "num_workers": 2}, 1, 2),
    "factory": (lambda: {"model": broken_factory}, 0, -1),
    "dataset": (lambda: {"train": Rows(), "loss": "cross_entropy"}, 0, 1),
    "callback": (lambda: {"callbacks": [Raising()]}, 0, 3),  # told of a step when the next one has committed
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILS)
def test_an_error_of_the_user_comes_back_with_its_place(what: str, ray_cluster: None, storage: str) -> None:
    make, rank, step = FAILS[what]
    options: dict[str, Any] = {"steps": 5, "batch": 4, "storage": storage} | make()
    with pytest.raises(WorkerFailed, match="KeyError: 'what the user wrote'") as caught:
        trainer(**options).submit().wait(timeout_s=60)
    error = caught.value
    assert (error.rank, error.step) == (rank, step)
    frames = [line for line in error.worker_traceback.splitlines() if line.lstrip().startswith("File ")]
    assert "in deep_in_user_code" in frames[-1]
    assert not any("/ray/" in frame for frame in frames)
    assert "lepton_ray/" not in frames[0].replace(__file__, "")
    assert str(error).count("Traceback") == 1
    assert storage in str(error)


def run(job: Job, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Follow a job up to a record."""
    return next(record for record in job.events() if until(record))


@pytest.mark.slow
def test_a_loss_that_turns_nan_names_its_step_and_leaves_what_was_reached(ray_cluster: None, storage: str) -> None:
    job = trainer(
        Bad(3, lambda: float("nan")),
        num_workers=2,
        steps=9,
        batch=4,
        checkpoints=Checkpoints(every_steps=2),
        storage=storage,
        name="nan",
    ).submit()
    with pytest.raises(RunFailed, match="loss turned nan at step 3") as caught:
        job.wait(timeout_s=60)
    assert not isinstance(caught.value, WorkerFailed)
    assert "learning rate" in str(caught.value)
    folder = Folder(job.path)
    found, problems = newest(folder.sub("checkpoints"))
    assert found is not None
    assert (found.step, problems) == (2, [])
    records = journal.read(folder)
    # That step 2 is stable shows in the ballot of step 3, which refused itself.
    assert [record["step"] for record in records if record["event"] == "step"] == [0, 1, 2]
    assert (records[-1]["event"], records[-1]["outcome"]) == ("ended", "failed")


@pytest.mark.slow
def test_workers_that_step_differently_are_told_so(ray_cluster: None, storage: str) -> None:
    job = trainer(num_workers=2, steps=3, batch=4, step_fn=uneven, optimizer="sgd", storage=storage).submit()
    with pytest.raises(RunFailed, match="must make the same calls"):
        job.wait(timeout_s=60)


@pytest.mark.slow
def test_a_run_that_may_not_try_again_fails_with_its_worker(ray_cluster: None, storage: str) -> None:
    job = trainer(
        num_workers=2,
        epochs=100_000,
        batch=4,
        checkpoints=Checkpoints(every_steps=300),
        faults=Faults(retries=0),
        storage=storage,
    ).submit()
    pid = run(job, lambda record: record["event"] == "worker" and record["worker"] == 1)["pid"]
    run(job, lambda record: record["event"] == "checkpoint_saved" and record["step"] > 0)
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"Faults.retries.*(worker 1|rank 1)"):
        job.wait(timeout_s=60)
    assert time.monotonic() - killed_s < 10
    found, _ = newest(Folder(job.path).sub("checkpoints"))
    assert found is not None
    assert found.step >= 300
