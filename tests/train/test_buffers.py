"""Buffers after a step are those of one worker that ran the microbatches one after another, whoever ran them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lepton_ray.train.buffers import BufferFold
from lepton_ray.train.model import TorchModel
from lepton_ray.train.peers import Peers

Together = Callable[[int, Callable[[Peers], Any]], list[Any]]
CHANNELS = 3
OWNERS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class Norms(nn.Module):
    """BatchNorm with a momentum, with another, with a plain running mean; frozen; not used; and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm1d(CHANNELS)
        self.fast = nn.BatchNorm1d(CHANNELS, momentum=0.6)
        self.mean = nn.BatchNorm1d(CHANNELS, momentum=None)
        self.frozen = nn.BatchNorm1d(CHANNELS).eval()
        self.unused = nn.BatchNorm1d(CHANNELS)
        self.shared = nn.BatchNorm1d(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(self.fast(x)) + self.plain(x) + self.frozen(x) + self.shared(x) + self.shared(2 * x + 1)


class Counters(nn.Module):
    """Buffers that a forward changes by adding: in place, replaced by new tensors, whole numbers, bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(CHANNELS))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("byte", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("fixed", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + x.sum(0)
        self.rows += len(x)
        self.byte.add_(1)
        self.seen[len(x) % 4] = True
        return x * self.fixed


def microbatch(step: int, m: int) -> torch.Tensor:
    return torch.randn(2 + m % 3, CHANNELS, generator=torch.Generator().manual_seed(100 * step + m)) + m


def folded(make: Callable[[], nn.Module], peers: Peers, owners: list[int], steps: int) -> dict[str, torch.Tensor]:
    """Return the buffers after some steps whose microbatches are owned as said."""
    model = TorchModel(make(), torch.device("cpu"))
    fold = BufferFold(model.buffers(), peers.allreduce if peers.world > 1 else None)
    for step in range(steps):
        fold.begin(len(owners))
        for m, owner in enumerate(owners):
            if owner == peers.rank:
                fold.enter()
                model(microbatch(step, m))
                fold.leave(m)
        fold.reduce()
        fold.apply()
    return {name: tensor.clone() for name, tensor in model.module.named_buffers()}


def sequential(module: nn.Module, microbatches: int, steps: int) -> dict[str, torch.Tensor]:
    """Return the buffers after plain forwards in order."""
    for step in range(steps):
        for m in range(microbatches):
            module(microbatch(step, m))
    return dict(module.named_buffers())


@pytest.mark.parametrize("make", [Norms, Counters])
@given(OWNERS, st.integers(1, 3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ownership_gives_what_one_worker_gives_in_order(
    together: Together, make: Callable[[], nn.Module], owners: list[int], steps: int
) -> None:
    expected = sequential(make(), len(owners), steps)
    results = together(max(owners) + 1, lambda peers: folded(make, peers, owners, steps))
    for found in results:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype is tensor.dtype
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    for other in results[1:]:  # and the same bits on every worker
        assert all(torch.equal(other[name], results[0][name]) for name in expected)


def test_workers_meet_once_for_all_buffers(together: Together) -> None:
    """And once more, where they learn which ones change."""

    def calls(peers: Any) -> int:
        folded(Norms, peers, [0, 1], steps=3)
        return peers.calls

    assert together(2, calls) == [4, 4]


class Masks(nn.Module):
    """Constants, and one buffer that changes from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("one", "two"):
            self.register_buffer(name, torch.full((100, 100), -torch.inf).triu(1))
        self.register_buffer("late", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 4:
            self.late += 1.5
        return x


def test_constants_are_not_sent(together: Together) -> None:
    def sent(peers: Any) -> list[int]:
        sizes: list[int] = []
        model = TorchModel(Masks(), torch.device("cpu"))

        def allreduce(tensor: torch.Tensor) -> None:
            sizes.append(tensor.numel())
            peers.allreduce(tensor)

        fold = BufferFold(model.buffers(), allreduce)
        for step in range(4):
            fold.begin(2)
            fold.enter()
            model(torch.ones(4 if step >= 2 and peers.rank else 1, CHANNELS))
            fold.leave(peers.rank)
            fold.reduce()
            fold.apply()
        assert model.module.late.tolist() == [3.0] * 3
        assert torch.equal(model.module.one, Masks().one)
        return sizes

    assert together(2, sent) == [[2, 2, 2, 3, 4]] * 2


class Dropped(nn.Module):
    """A BatchNorm that some microbatches skip, the first among them."""

    def __init__(self, used: Callable[[int], bool]) -> None:
        super().__init__()
        self.norm, self.used = nn.BatchNorm1d(CHANNELS), used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if self.used(len(x)) else x


def test_a_layer_that_the_first_microbatch_skips_is_folded_like_any_other(together: Together) -> None:
    expected = sequential(Dropped(lambda rows: rows > 2), 3, steps=4)
    for found in together(2, lambda peers: folded(lambda: Dropped(lambda rows: rows > 2), peers, [0, 1, 1], 4)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)


def test_a_layer_that_the_first_microbatch_skips_stays_among_what_it_saw(together: Together) -> None:
    owners = [0, 1] * 18
    for found in together(2, lambda peers: folded(lambda: Dropped(lambda rows: rows > 2), peers, owners, 30)):
        assert (found["norm.running_var"] > 0).all()
        assert (found["norm.running_var"] < 4).all()


@pytest.mark.parametrize("make", [Norms, Counters])
def test_a_discarded_step_leaves_no_trace(make: Callable[[], nn.Module]) -> None:
    model = TorchModel(make(), torch.device("cpu"))
    before = copy.deepcopy(dict(model.module.named_buffers()))
    fold = BufferFold(model.buffers(), None)
    fold.begin(1)
    fold.enter()
    model(microbatch(0, 0))
    fold.leave(0)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.module.named_buffers())
    fold.discard()
    for name, tensor in model.module.named_buffers():
        assert torch.equal(before[name], tensor), name


def test_the_state_that_is_saved_follows_replaced_buffers() -> None:
    model = TorchModel(Counters(), torch.device("cpu"))
    fold = BufferFold(model.buffers(), None)
    state = model.state()
    fold.begin(1)
    fold.enter()
    model(microbatch(0, 1))  # not this worker's, so there is no `leave`
    fold.enter()
    model(microbatch(0, 0))
    fold.leave(0)
    fold.apply()
    torch.testing.assert_close(state["total"], microbatch(0, 0).sum(0))


def test_a_model_without_buffers_costs_nothing(together: Together) -> None:
    def calls(peers: Any) -> int:
        folded(lambda: nn.Linear(CHANNELS, 2), peers, [0, 1], steps=1)
        return peers.calls

    assert together(2, calls) == [0, 0]
