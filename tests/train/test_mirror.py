"""Copies of the state that leave in the background come back bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lepton_ray.cluster.vault import Vault
from lepton_ray.errors import CheckpointError
from lepton_ray.train.mirror import Bytes, Mirror, place_of, read, step_of

LIMIT_S = 20


class Memory:
    """Where a test lets the copies go."""

    every = 1

    def __init__(self, rest: float = 0.0) -> None:
        self.rest = rest
        self.vault, self.gate, self.tried = Vault(versions=1), threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def keep(self, place: int, data: Bytes) -> None:
        self.tried.release()
        assert self.gate.wait(LIMIT_S)
        self.vault.keep(place, data)

    def kept(self) -> list[int]:
        return self.vault.kept()

    def fetch(self, place: int) -> Bytes | None:
        return self.vault.data(place)


def nothing() -> None:
    """Nothing has to be done before."""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    yield mirror
    mirror.close()


def state(value: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {"a": torch.full((3, 5), value), "b": torch.tensor([1, 2], dtype=torch.int64)}
    return tensors, {"moments": {0: torch.full((2,), -value, dtype=torch.float64)}, "scale": (value, None)}


def saved(mirror: Mirror, memory: Memory, step: int, after: Callable[[], None] = nothing) -> None:
    if not mirror.is_busy():
        mirror.save(memory, 1, step, *state(float(step)), after)


def wait(mirror: Mirror) -> None:
    assert mirror._last is not None
    mirror._last.result(LIMIT_S)


def test_what_was_mirrored_comes_back(mirror: Mirror) -> None:
    memory = Memory()
    for step in (3, 4):
        saved(mirror, memory, step)
        wait(mirror)
    assert memory.kept() == [place_of(1, 4)]
    assert step_of(place_of(1, 4)) == 4
    found = memory.fetch(place_of(1, 4))
    assert found is not None
    (tensors, told), (expected, plain) = read(found), state(4.0)
    assert [*tensors] == [*expected]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert torch.equal(told["moments"][0], plain["moments"][0])
    assert told["scale"] == plain["scale"]
    assert memory.fetch(place_of(1, 3)) is None


def test_training_goes_on_while_a_copy_is_on_its_way(mirror: Mirror) -> None:
    memory = Memory()
    memory.gate.clear()
    saved(mirror, memory, 1)
    assert memory.tried.acquire(timeout=LIMIT_S)
    saved(mirror, memory, 2)  # left out
    memory.gate.set()
    wait(mirror)
    assert memory.kept() == [place_of(1, 1)]
    saved(mirror, memory, 3)
    wait(mirror)
    assert memory.kept() == [place_of(1, 3)]


def test_a_rest_follows_a_copy_where_it_is_wanted(mirror: Mirror) -> None:
    memory = Memory(rest=1e9)
    for step in (1, 2):
        saved(mirror, memory, step)
        wait(mirror)
    assert memory.kept() == [place_of(1, 1)]


def test_what_cannot_be_kept_leaves_the_older_copy(mirror: Mirror) -> None:
    def fail() -> None:
        raise OSError("it is not on record")

    memory = Memory()
    saved(mirror, memory, 1)
    wait(mirror)
    saved(mirror, memory, 2, fail)
    wait(mirror)
    assert memory.kept() == [place_of(1, 1)]


@pytest.mark.parametrize(("versions", "held"), [(1, [(2, 5)]), (2, [(2, 4), (2, 5)])])
def test_a_vault_holds_the_newest_and_nothing_that_comes_late(versions: int, held: list[tuple[int, int]]) -> None:
    vault = Vault(versions)
    assert vault.kept() == []
    for generation, step in ((1, 9), (2, 4), (2, 5), (1, 10), (2, 3)):
        vault.keep(place_of(generation, step), np.full(3, step, np.uint8))
    assert vault.kept() == [place_of(*each) for each in held]
    data = vault.data(place_of(2, 5))
    assert data is not None
    assert data.tolist() == [5, 5, 5]
    assert vault.data(place_of(1, 9)) is None


def test_damaged_bytes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the mirror is not a safetensors file"):
        read(np.zeros(5, np.uint8))
