"""Local steps, against a simulation of the workers in plain torch that holds all of them in one loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

from lepton_ray import (
    Batch,
    Checkpoints,
    ConfigError,
    DistributedTrainer,
    EarlyStopping,
    OuterSGD,
    PeerLost,
    RunFailed,
    Sync,
)
from lepton_ray.data.feed import Feed, open_feed
from lepton_ray.data.sources import make_source
from lepton_ray.plan.batch import bounds, cut
from lepton_ray.plan.local import Turns
from lepton_ray.storage import Folder
from lepton_ray.train import own_files
from lepton_ray.train.buffers import BufferFold, BufferMean
from lepton_ray.train.checkpoint_format import load, load_own, newest
from lepton_ray.train.local_step import LocalStepper
from lepton_ray.train.model import TorchModel
from lepton_ray.train.objective import make_objective
from lepton_ray.train.peers import Alone, Background
from lepton_ray.train.reduce import over_wire
from lepton_ray.train.step import Stepper
from tests.train.in_process import Done, run_job
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
    assert_same_weights,
    batches,
    cross_entropy,
    gan_step,
    make_list,
    net,
    plain,
    sgd,
)

DATA = (X, Y)
MEAN = OuterSGD(lr=1.0, momentum=0.0)
"""With which the shared weights become the mean of the workers'."""


def train(storage: str, model: Any = None, data: Any = DATA, test: Any = None, **options: Any) -> Done:
    settings: dict[str, Any] = {"batch": BATCH, "optimizer": sgd, "num_workers": 2} | options
    settings.setdefault("name", f"job-{len(Folder(storage).names())}")
    return run_job(net() if model is None else model, data, test, storage=storage, **settings)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_local_step_of_sgd_is_a_step_together(workers: int, storage: str) -> None:
    """With 46 samples in steps of 12, the last one is short, and not cut evenly."""
    batch = Batch(samples=12, microbatches=4)
    found = train(storage, num_workers=workers, batch=batch, epochs=2, sync=Sync.local(steps=1, outer=MEAN))
    together = train(storage, num_workers=workers, batch=batch, epochs=2)
    assert_same_weights(found.result.model(), plain(net(), 2 * STEPS, cross_entropy), atol=1e-12)
    np.testing.assert_allclose(found.losses, together.losses, rtol=1e-12)
    assert found.result.receipt.steps == 2 * STEPS
    assert found.result.receipt.samples == 2 * SAMPLES
    assert (found.result.receipt.samples_lost, found.result.receipt.samples_repeated) == (0, 0)


class Simulated:
    """Workers that train by themselves, all in one loop. A fragment is a list of indices of parameters."""

    def __init__(self, workers: int, fragments: Sequence[Sequence[int]], turns: Turns, outer: dict[str, Any]) -> None:
        self.models = [net() for _ in range(workers)]
        self.own = [list(model.parameters()) for model in self.models]
        self.optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in self.models]
        self.shared = [nn.Parameter(p.detach().clone()) for p in self.own[0]]
        self.outer = [torch.optim.SGD([self.shared[i] for i in part], **outer) for part in fragments]
        self.fragments, self.turns = fragments, turns
        self.counted = [[0] * workers for _ in fragments]
        self.away: list[list[torch.Tensor]] = []
        self.losses: list[float] = []

    def step(self, number: int, ids: np.ndarray, clip: float | None) -> None:
        loss_sum = 0.0
        parts = cut(0, len(ids), bounds(BATCH.samples, len(self.models)))
        for rank, part in enumerate(parts):
            if part:
                self.optimizers[rank].zero_grad()
                loss = cross_entropy(self.models[rank], ids[part.start : part.stop])
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.own[rank], clip)
                self.optimizers[rank].step()
                loss_sum += loss.item() * len(part)
            for counted in self.counted:
                counted[rank] += len(part)
        self.losses.append(loss_sum / len(ids))
        if self.turns.delay and (fragment := self.turns.arriving(number + 1)) is not None:
            self.arrive(fragment)
        if (fragment := self.turns.leaving(number + 1)) is not None:
            self.leave(fragment)
            if not self.turns.delay:
                self.arrive(fragment)

    @torch.no_grad()
    def leave(self, fragment: int) -> None:
        counted = self.counted[fragment]
        for i in self.fragments[fragment]:
            progress = [(self.shared[i] - own[i]) * count for own, count in zip(self.own, counted)]
            self.shared[i].grad = sum(progress) / sum(counted)
        self.away = [[own[i].clone() for i in self.fragments[fragment]] for own in self.own]
        self.counted[fragment] = [0] * len(self.models)

    @torch.no_grad()
    def arrive(self, fragment: int) -> None:
        self.outer[fragment].step()
        for own, left in zip(self.own, self.away):
            for i, then in zip(self.fragments[fragment], left):
                own[i].add_(self.shared[i] - then)

    @torch.no_grad()
    def finish(self) -> list[torch.Tensor]:
        """Return the mean of all weights, by what the workers counted."""
        found = []
        for i in range(len(self.shared)):
            counted = next(self.counted[f] for f, part in enumerate(self.fragments) if i in part)
            if not sum(counted):
                counted = [1] * len(self.models)
            found.append(sum(own[i] * count for own, count in zip(self.own, counted)) / sum(counted))
        return found


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("workers", "sync", "parts", "clip"),
    [
        (2, Sync.local(steps=4), [[0, 1, 2, 3]], None),
        (3, Sync.local(steps=5, outer=OuterSGD(nesterov=False)), [[0, 1, 2, 3]], 0.1),
        (2, Sync.local(steps=6, fragments=2, delay=2), [[0], [1, 2, 3]], None),
        (2, Sync.local(steps=9, fragments=3, delay=1, outer=OuterSGD(momentum=0.0, lr=0.5)), [[0], [1], [2, 3]], None),
        (1, Sync.local(steps=20), [[0, 1, 2, 3]], None),
    ],
    ids=["diloco", "three workers", "streamed", "three fragments", "delayed, alone"],
)
def test_local_steps_are_those_of_a_simulation(
    workers: int, sync: Sync, parts: list[list[int]], clip: float | None, storage: str
) -> None:
    assert sync.steps is not None
    steps = 23
    batch = Batch(samples=12, microbatches=workers, clip_norm=clip)
    done = train(storage, num_workers=workers, batch=batch, steps=steps, sync=sync, optimizer=adam)
    turns = Turns(steps=sync.steps, fragments=sync.fragments, delay=sync.delay)
    outer = {"lr": sync.outer.lr, "momentum": sync.outer.momentum}
    outer["nesterov"] = sync.outer.nesterov and sync.outer.momentum > 0
    simulated = Simulated(workers, parts, turns, outer)
    for number, ids in zip(range(steps), batches(steps)):
        simulated.step(number, ids, clip)
    np.testing.assert_allclose(done.losses, simulated.losses, rtol=1e-5 if clip else 1e-9)
    for found, expected in zip(done.result.model().parameters(), simulated.finish()):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if clip else 1e-10)
    assert [record["step"] for record in done.of("step")] == list(range(steps))


def test_a_step_of_ones_own_goes_locally_too(storage: str) -> None:
    """A step_fn that steps two optimizers, and one that only returns its loss, in pieces."""
    done = train(storage, Gan(), (X, NOISE), step_fn=gan_step, optimizer=make_list, steps=6, sync=Sync.local(steps=2))
    assert [record["step"] for record in done.of("step")] == list(range(6))
    assert all(np.isfinite(record["maker_loss"]) for record in done.of("step"))

    def loss(model: Any, batch: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        outputs = model(batch[0])
        return {"loss": nn.functional.cross_entropy(outputs, batch[1]), "largest": outputs.detach().mean()}

    once = Sync.local(steps=1, outer=MEAN)
    batch = Batch(samples=12, microbatches=4)
    local, together = (train(storage, step_fn=loss, batch=batch, **more) for more in ({"sync": once}, {}))
    assert_same_weights(local.result.model(), together.result.model(), atol=1e-12)
    for name in ("train_loss", "largest"):
        np.testing.assert_allclose(*([r[name] for r in done.of("step")] for done in (local, together)), rtol=1e-9)


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 50


def test_each_worker_has_a_loss_scale_of_its_own(storage: str) -> None:
    """One of them sees samples whose gradients have no room in fp16."""
    large = X.astype(np.float32).copy()
    large[5] *= 300
    done = train(
        storage,
        Loud(),
        (large, Y),
        epochs=3,
        precision="fp16",
        loss="cross_entropy",
        sync=Sync.local(steps=2),
        checkpoints=Checkpoints(keep=9),
    )
    skipped = [bool(record.get("skipped")) for record in done.of("step")]
    assert skipped[0]
    assert not skipped[-1]
    assert np.isfinite(done.losses).all()
    folder = Folder(done.result.path).sub("checkpoints")
    scales = {load(folder, 3 * STEPS)[1]["scaler"][0], load_own(folder, 3 * STEPS, 1)["scaler"][0]}
    assert len(scales) == 2


def test_a_loss_that_is_not_finite_ends_the_run(storage: str) -> None:
    spoilt = X.copy()
    spoilt[3] = np.nan
    with pytest.raises(RunFailed, match="the loss turned nan"):
        train(storage, data=(spoilt, Y), sync=Sync.local(steps=3))


# --- what travels ----------------------------------------------------------------------------------------------------


def test_a_sum_in_the_background_keeps_the_order_of_calls(together: Callable[..., list[Any]]) -> None:
    def act(peers: Any) -> list[list[float]]:
        background = Background(peers)
        first, second, third = (torch.full((50_000,), float(number)) for number in (1, 2, 3))
        background.start(first, "fp32", None)
        background.allreduce(second)  # waits for the first
        background.start(third, "fp32", None)
        background.join()
        background.close()
        return [sorted(set(each.tolist())) for each in (first, second, third)]

    assert together(2, act) == [[[2.0], [4.0], [6.0]]] * 2


def test_an_error_in_the_background_is_raised_where_the_sum_is_awaited(together: Callable[..., list[Any]]) -> None:
    def act(peers: Any) -> None:
        background = Background(peers)
        if peers.rank == 1:
            peers._group.abort("the test ends it")
            return
        background.start(torch.zeros(50_000), "fp32", None)
        with pytest.raises(PeerLost):
            background.join()
        background.close()

    together(2, act)


class Rounding:
    """Peers over a wire of bf16 that keep what is left out, as a lossy wire is to do."""

    def __init__(self, peers: Any) -> None:
        self.rank, self.world, self._peers = peers.rank, peers.world, peers
        self.broadcast = peers.broadcast

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        if wire == "bf16":
            assert residual is not None
            whole = tensor + residual
            tensor.copy_(whole.bfloat16())
            residual.copy_(whole - tensor)
        self._peers.allreduce(tensor)


def test_what_a_wire_leaves_out_is_made_up_for(together: Callable[..., list[Any]]) -> None:
    """1.001 is 1 in bf16: without a memory, the sum of many would be short by a thousandth."""

    def act(peers: Any) -> float:
        total = 0.0
        allreduce = over_wire(Rounding(peers), "bf16")
        assert allreduce is not None
        bucket = torch.empty(4)
        for _ in range(64):
            bucket.fill_(1.001)
            allreduce(bucket)
            total += float(bucket[0])
        return total

    found, other = together(2, act)
    assert found == other == pytest.approx(2 * 64 * 1.001, abs=0.02)


def test_local_steps_go_over_any_wire(together: Callable[..., list[Any]]) -> None:
    """Every fragment has a memory of its own, and all workers hold the same shared weights."""
    untrained = net().float()

    def act(peers: Any) -> list[torch.Tensor]:
        model = TorchModel(copy.deepcopy(untrained), torch.device("cpu"))
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
        source = make_source((X.astype(np.float32), Y), transform=None, collate=None, name="data")
        feed = open_feed(source, batch_samples=12, microbatches=2, seed=0)
        assert isinstance(feed, Feed)
        inner = Stepper(
            model=model,
            objective=make_objective("cross_entropy"),
            optimizers={"optimizer": optimizer},
            feed=feed,
            peers=Alone(),
            device=torch.device("cpu"),
            seed=0,
        )
        sync = Sync.local(steps=4, fragments=2, delay=1, wire="bf16")
        stepper = LocalStepper(inner, model, Background(Rounding(peers)), sync)
        stepper.begin()
        for step in range(16):
            stepper.run(step, feed.plan(step), range(peers.rank, peers.rank + 1), False)
        residuals = stepper.own_state()["residuals"]
        assert all(float(residual.abs().max()) > 0 for residual in residuals)
        shared = [weights.clone() for weights in stepper.state()["weights"]]
        stepper.close()
        return shared

    first, second = together(2, act)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# --- buffers ---------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Every kind of buffer: averages, counts, a spectral norm's vectors, constants that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm1d(FEATURES, momentum=0.25).double()
        self.mean = nn.BatchNorm1d(FEATURES, momentum=None).double()
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES).double())
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("seen", torch.tensor([2**62 + 1, 5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
        return self.last(self.mean(self.norm(x)))


def test_buffers_are_brought_together_by_kind(together: Callable[..., list[Any]]) -> None:
    untrained = Buffers()

    def act(peers: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[bool], int]:
        model = TorchModel(copy.deepcopy(untrained), torch.device("cpu"))
        fold, mean = BufferFold(model.buffers(), None), BufferMean(model.buffers())
        for number in range(3):
            fold.begin(1, number)
            fold.enter()
            rows = slice(8 * number + 4 * peers.rank, 8 * number + 4 * peers.rank + 4)
            model(torch.from_numpy(X[rows]))
            fold.leave(number)
            fold.apply()
        own = {name: tensor.clone() for name, tensor in model.module.named_buffers()}
        changed = mean.changed()
        calls = peers.calls
        mean.meet([float(each) for each in changed], (0.25, 0.75)[peers.rank], peers.rank == 1, peers.allreduce)
        return own, dict(model.module.named_buffers()), changed, peers.calls - calls

    (first, after, changed, calls), (second, other, _, _) = together(2, act)
    before = dict(untrained.named_buffers())
    assert (sum(changed), calls) == (len(changed) - 2, 1)
    for name, tensor in after.items():
        assert torch.equal(tensor, other[name]), name
        if name in ("mask", "turns"):
            assert torch.equal(tensor, before[name])
        elif "running" in name:
            torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name], rtol=1e-12, atol=0)
        elif name.startswith("last."):
            assert torch.equal(tensor, second[name])
        else:
            assert torch.equal(tensor, first[name] + second[name] - before[name]), name


def test_all_workers_end_with_the_same_buffers(storage: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
    done = train(storage, model, test=DATA, epochs=3, sync=Sync.local(steps=5, fragments=2, delay=1))
    first, second = (model.state() for model in done.models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(first["1.num_batches_tracked"]) == 2 * 3 * STEPS


# --- measures and checkpoints ----------------------------------------------------------------------------------------


def test_evaluations_and_checkpoints_are_of_the_shared_weights_and_change_nothing(storage: str) -> None:
    sync = Sync.local(steps=5, fragments=2, delay=1)
    quiet = train(storage, epochs=3, sync=sync, optimizer=adam)
    often: dict[str, Any] = {"validate_every": 1, "checkpoints": Checkpoints(every_steps=1, keep=99)}
    done = train(storage, test=DATA, epochs=3, sync=sync, optimizer=adam, **often)
    assert done.result.receipt == quiet.result.receipt
    assert done.losses == quiet.losses
    folder = Folder(done.result.path).sub("checkpoints")
    for record in done.of("validated")[:-2]:  # the end has two: before and after it
        model = net()
        model.load_state_dict(load(folder, record["step"])[0])
        with torch.no_grad():
            assert record["test_loss"] == pytest.approx(float(cross_entropy(model, np.arange(SAMPLES))), rel=1e-12)


def test_epochs_are_measured_over_all_workers(storage: str) -> None:
    done = train(storage, epochs=2, sync=Sync.local(steps=100), callbacks=[EarlyStopping("train_loss", patience=9)])
    sizes = [12, 12, 12, 10]
    for number, epoch in enumerate(done.of("epoch")):
        losses = done.losses[STEPS * number : STEPS * number + STEPS]
        assert epoch["train_loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-12)


class Killed(Exception):
    """What ends a life of a run."""


def live(storage: str, name: str, **options: Any) -> Done:
    """Train what has a state in every part of it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
    settings: dict[str, Any] = {
        "epochs": 3,
        "optimizer": adam,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        "sync": Sync.local(steps=5, fragments=2, delay=1),
        "checkpoints": Checkpoints(every_steps=3),
        "batch": Batch(samples=12, microbatches=4, clip_norm=0.5),
    }
    return train(storage, model, test=(X[:20], Y[:20]), name=name, **(settings | options))


def assert_same_run(found: Done, expected: Done) -> None:
    assert replace(found.result.receipt, generations=1) == expected.result.receipt
    assert (found.result.receipt.samples_lost, found.result.receipt.samples_repeated) == (0, 0)
    assert found.result.metrics == expected.result.metrics


@pytest.mark.slow
def test_a_run_that_fails_at_any_moment_goes_on_exactly(storage: str) -> None:
    """Checkpoints fall between the turns of the fragments, and while one is on its way."""
    expected = live(storage, "calm")
    moments = [record["event"] for record in expected.records if record["event"] != "header"]
    for moment in range(0, len(moments), 3):
        told: list[str] = []

        def fail(event: str, fields: dict[str, Any], told: list[str] = told, moment: int = moment) -> None:
            told.append(event)
            if len([each for each in told if each != "work"]) > moment:
                raise Killed(event)

        with pytest.raises(Killed):
            live(storage, f"moment-{moment}", at=fail)
        assert_same_run(live(storage, f"moment-{moment}"), expected)


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_run_that_is_stopped_goes_on_exactly(fragments: int, storage: str) -> None:
    options: dict[str, Any] = {"sync": Sync.local(steps=4, fragments=fragments, delay=1)}
    expected = live(storage, "calm", **options)
    steps: list[int] = []

    def note(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            steps.append(fields["step"])

    cut_short = live(storage, "stopped", at=note, wish=lambda: len(steps) >= 3, **options)
    (trained,) = cut_short.of("trained")
    assert (trained["complete"], 3 < trained["step"] < 3 * STEPS) == (False, True)
    found = live(storage, "stopped", **options)
    assert found.of("resumed")[-1]["step"] == trained["step"]
    assert_same_run(found, expected)


def test_a_damaged_file_of_a_worker_is_named_and_the_checkpoint_before_taken(storage: str) -> None:
    expected = live(storage, "calm")

    def fail(event: str, fields: dict[str, Any]) -> None:
        if event == "validated" and fields["step"] == 2 * STEPS:
            raise Killed

    with pytest.raises(Killed):
        live(storage, "damaged", at=fail)
    found, _ = newest(Folder(f"{storage}/damaged/checkpoints"))
    assert found is not None
    path = f"{storage}/damaged/checkpoints/step-{found.step:08d}/worker-1-0.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    done = live(storage, "damaged")
    assert [path in record["reason"] for record in done.of("checkpoint_refused")] == [True]
    assert done.of("resumed")[-1]["step"] < found.step
    assert_same_run(done, expected)


def test_a_worker_that_cannot_write_costs_a_checkpoint_and_not_the_run(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = own_files.write_own

    def write(folder: Folder, step: int, *rest: Any) -> Any:
        if step == 6:
            raise OSError("no space left on device")
        return real(folder, step, *rest)

    monkeypatch.setattr(own_files, "write_own", write)
    done = live(storage, "full", checkpoints=Checkpoints(every_steps=3, keep=99))
    assert [(record["step"], record["error"]) for record in done.of("checkpoint_failed")] == [
        (6, "another worker could not write its own state")
    ]
    assert [record["step"] for record in done.of("checkpoint_saved")] == [0, 3, 9, 12, 12]  # the last are the mean
    assert Folder(done.result.path).sub("checkpoints").names() == [f"step-{step:08d}" for step in (0, 3, 9, 12)]


# --- Keras -----------------------------------------------------------------------------------------------------------


def test_keras_models_train_locally_and_keep_their_averages(storage: str) -> None:
    """Averaged weights end as the mean of the workers' averages."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(6), keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9), loss)
    data = (X.astype(np.float32), Y)
    for sync in (Sync.local(steps=3), Sync.local(steps=4, fragments=2, delay=1)):
        done = run_job(
            model, data, data, storage=storage, name=f"k{sync.fragments}", num_workers=2, batch=BATCH, sync=sync
        )
        first, second = (each.state() for each in done.models)
        assert all(torch.equal(first[name], second[name]) for name in first)
        done.result.model()
        assert done.result.metrics["test_loss"] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-5)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: Sync.local(steps=0), "Sync.local(steps=0)"),
        (lambda: Sync.local(steps=3, fragments=4), "Use at most 3 fragments"),
        (lambda: Sync.local(steps=10, fragments=2, delay=5), "from 0 to 4"),
        (lambda: Sync.local(steps=10, wire="int4"), "expected one of fp32, bf16, int8, auto"),
        (lambda: Sync.every_step("fp16"), "Sync(wire='fp16')"),
        (lambda: Sync(fragments=2), "Use Sync.local(steps=...)"),
        (lambda: Sync.local(steps=2, outer="sgd"), "expected an OuterSGD(...)"),
        (lambda: OuterSGD(lr=0), "an lr above 0"),
        (lambda: OuterSGD(momentum=1), "a momentum below 1"),
        (lambda: DistributedTrainer(net(), DATA, sync="local"), "expected a Sync(...)"),
        (lambda: DistributedTrainer(net(), DATA, reproducible=True, sync=Sync.local(steps=2)), "Sync.local(steps=2)"),
        (lambda: DistributedTrainer(net(), DATA, reproducible=True, sync=Sync.every_step("int8")), "wire='int8'"),
    ],
)
def test_what_cannot_be_is_said_at_once(make: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert fragment in str(caught.value)


def test_defaults() -> None:
    assert Sync() == Sync.every_step()
    assert not Sync.every_step().is_local
    assert Sync.local(steps=100).delay == 10
    assert Sync.local(steps=100, fragments=4).delay == 2
    assert Sync.local(steps=9).delay == 0


def test_more_fragments_than_parameters_are_refused(storage: str) -> None:
    with pytest.raises(ConfigError, match="Use at most 4 fragments"):
        train(storage, sync=Sync.local(steps=10, fragments=5))


def test_a_run_does_not_go_on_with_another_sync_or_after_local_steps_with_other_workers() -> None:
    from lepton_ray.prepare import difference

    def config(workers: int = 2, **options: Any) -> dict[str, Any]:
        batch = Batch(samples=12, microbatches=6)
        return DistributedTrainer(net(), DATA, num_workers=workers, batch=batch, **options)._prepared.config

    local = config(sync=Sync.local(steps=5))
    assert difference(config(), config(sync=Sync.every_step())) == []
    assert difference(config(2), config(3)) == []
    assert difference(local, config(sync=Sync.local(steps=6))) == ["sync.steps: 5 before, 6 now"]
    assert difference(local, config(3, sync=Sync.local(steps=5))) == ["sync.num_workers: 2 before, 3 now"]
    assert len(difference(config(), local)) == 1
    assert copy.copy(local["sync"])["outer"] == {"lr": 0.7, "momentum": 0.9, "nesterov": True}
