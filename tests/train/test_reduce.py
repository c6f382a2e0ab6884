"""Gradients summed bucket by bucket are those of plain autograd, whoever computed what."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lepton_ray import DistributedTrainer
from lepton_ray.collective.holdings import HEAP
from lepton_ray.errors import PeerLost
from lepton_ray.prepare import with_place
from lepton_ray.train import reduce
from lepton_ray.train.job import Task
from lepton_ray.train.peers import Alone, Peers
from lepton_ray.train.reduce import Reducer, can_overlap

Together = Callable[[int, Callable[[Peers], Any]], list[Any]]
MICROBATCHES, ROWS, FEATURES = 5, 3, 4


class Mixed(nn.Module):
    """Parameters of two dtypes, one that is tied, one that is unused, and one that only some microbatches use."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(FEATURES, 6, generator=generator))
        self.unused = nn.Parameter(torch.ones(3))
        self.wide = nn.Parameter(torch.randn(6, 2, generator=generator, dtype=torch.float64))
        self.tied = self.a
        self.sometimes = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, is_odd: bool) -> torch.Tensor:
        y = torch.tanh(x @ self.a * self.scalar).double() @ self.wide
        y = y * self.sometimes if is_odd else y
        return y.sum() + (x @ self.tied).double().square().sum()


def microbatch(m: int) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(m))


def plain_grads(microbatches: list[int]) -> dict[str, torch.Tensor | None]:
    model = Mixed()
    for m in microbatches:
        model(microbatch(m), m % 2 == 1).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a bucket be full after a few numbers, so that a small model has several."""
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 16)
    monkeypatch.setattr(reduce, "FIRST_BUCKET_BYTES", 8)
    return


def run_step(reducer: Reducer, model: Mixed, owned: list[int]) -> None:
    reducer.begin()
    for m in owned:
        loss = model(microbatch(m), m % 2 == 1)
        if m == owned[-1]:
            reducer.arm()
        loss.backward()
    reducer.finish()


def all_grads(peers: Peers, owners: list[int], steps: int = 1) -> tuple[dict[str, torch.Tensor | None], int]:
    model = Mixed()
    reducer = Reducer(dict(model.named_parameters()), peers.allreduce if peers.world > 1 else None)
    for _ in range(steps):
        run_step(reducer, model, [m for m, owner in enumerate(owners) if owner == peers.rank])
    unused = reducer.untouched()
    unused = torch.zeros(len(dict(model.named_parameters())), dtype=torch.float64) if unused is None else unused
    if peers.world > 1:
        peers.allreduce(unused)
    reducer.drop(unused == peers.world)
    reducer.close()
    return {name: p.grad for name, p in model.named_parameters()}, len(reducer.buckets)


def assert_same(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            assert found[name].dtype is grad.dtype
            torch.testing.assert_close(found[name], grad, rtol=2e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@given(st.integers(1, 3).flatmap(lambda w: st.lists(st.integers(0, w - 1), min_size=1, max_size=MICROBATCHES)))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("small_buckets")
def test_sums_are_those_of_plain_autograd_for_any_ownership(together: Together, owners: list[int]) -> None:
    expected = plain_grads(list(range(len(owners))))
    world = max(owners) + 1  # a rank below may own nothing
    for found, buckets in together(world, lambda peers: all_grads(peers, owners)):
        assert buckets > 1
        assert_same(found, expected)


def test_buckets_lie_in_the_memory_of_the_group(together: Together) -> None:
    """What the optimizer reads is what the others read: there is no copy between them."""

    def act(peers: Peers) -> list[int]:
        model = Mixed()
        reducer = Reducer(dict(model.named_parameters()), peers.allreduce)
        run_step(reducer, model, [peers.rank])
        found = [HEAP.find(p.grad.view(-1).numpy()).inode for p in model.parameters()]
        reducer.close()
        return found

    for inodes in together(2, act):
        assert all(inodes)


@pytest.mark.parametrize(("cores", "expected"), [(2, False), (3, True)])
def test_sums_in_shared_memory_go_beside_backward_where_there_is_a_core_to_spare(
    cores: int, expected: bool, together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 workers of one thread each; over a network they always do."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(cores)})
    torch.set_num_threads(1)
    assert together(2, can_overlap) == [expected] * 2


def test_a_second_step_starts_from_zero(together: Together) -> None:
    for found, _ in together(2, lambda peers: all_grads(peers, [0, 1, 1], steps=2)):
        assert_same(found, plain_grads([0, 1, 2]))


def test_buckets_hold_one_dtype_each_and_every_parameter_once() -> None:
    model = Mixed()
    reducer = Reducer(dict(model.named_parameters()), None)
    run_step(reducer, model, [0, 1])
    assert sorted(bucket.dtype is torch.float64 for bucket in reducer.buckets) == [False, True]
    assert sum(bucket.numel() for bucket in reducer.buckets) == sum(p.numel() for p in model.parameters())
    for bucket in reducer.buckets:
        bucket.fill_(7)
    assert all((p.grad == 7).all() for p in model.parameters())  # gradients are views of what is sent
    reducer.close()


@pytest.mark.usefixtures("small_buckets")
def test_full_buckets_leave_while_backward_still_runs() -> None:
    """The gradient of the last layer is sent before that of the first layer exists."""
    sent = threading.Event()
    was_sent: list[bool] = []

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            was_sent.append(sent.wait(10))
            return grad

    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    parameters = dict(nn.Sequential(first, last).named_parameters())
    reducer = Reducer(parameters, lambda tensor: sent.set())
    reducer.begin()
    reducer.arm()
    last(Gate.apply(first(torch.ones(1, 4)))).sum().backward()
    reducer.finish()
    assert was_sent == [True]
    reducer.close()


@pytest.mark.usefixtures("small_buckets")
def test_an_error_of_the_collective_reaches_the_training_thread() -> None:
    def broken(tensor: torch.Tensor) -> None:
        raise PeerLost("rank 1 is gone")

    model = Mixed()
    reducer = Reducer(dict(model.named_parameters()), broken)
    with pytest.raises(PeerLost, match="rank 1 is gone"):
        run_step(reducer, model, [0])
    reducer.close()


def test_gradients_that_user_code_replaced_are_taken_back() -> None:
    model = Mixed()
    reducer = Reducer(dict(model.named_parameters()), None)
    run_step(reducer, model, [0])
    model.zero_grad()  # sets the gradients to None, so that backward makes new tensors
    model(microbatch(1), True).backward()
    reducer.reclaim()
    expected = plain_grads([1]) | {"unused": torch.zeros(3)}
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)
    reducer.scale(0.0)
    assert all((p.grad == 0).all() for p in model.parameters())
    reducer.close()


def test_norm_and_scale_are_over_all_gradients() -> None:
    model = Mixed()
    reducer = Reducer(dict(model.named_parameters()), None)
    run_step(reducer, model, [0, 1])
    parameters = [p for p in model.parameters() if p is not model.unused]
    expected = torch.sqrt(sum(p.grad.double().square().sum() for p in parameters))
    assert reducer.norm() == pytest.approx(float(expected), rel=1e-6)
    reducer.scale(0.5)
    assert reducer.norm() == pytest.approx(float(expected) / 2, rel=1e-6)
    model.a.grad.fill_(torch.inf)
    assert reducer.norm() == torch.inf
    reducer.close()


def test_gradients_stay_where_they_are_until_a_generation_breaks(storage: str) -> None:
    """Fresh memory costs a resize time; after a break one that was given up may still write into the old one."""
    trainer = DistributedTrainer(
        nn.Linear(2, 1), (np.zeros((8, 2), np.float32), np.zeros((8, 1), np.float32)), loss="mse", storage=storage
    )
    spec = with_place(trainer._prepared.spec, "job", storage)
    pauses = iter([False, True, False, True])

    def ignore(*_: object, **__: object) -> None:
        """Keep no record."""

    task = Task(
        spec,
        train_source=trainer._train,
        test_source=None,
        device=torch.device("cpu"),
        report=ignore,
        record=ignore,
        wish=lambda: False,
        pause=lambda: next(pauses, False),
    )

    def memory(generation: int) -> torch.Tensor:
        task.join(Alone(), generation, is_fresh=generation == 1)
        return task.parts.stepper._reducer.buckets[0]

    first = memory(1)
    assert task.run() == (False, [])
    assert memory(2) is first
    task.settle()  # it broke
    assert not np.shares_memory(memory(3).numpy(), first.numpy())
    task.close()
