"""Workers as threads of this process, joined by real rings over loopback sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lepton_ray.collective.ring import Ring
from lepton_ray.train.peers import Alone, Peers

Act = Callable[[Peers], Any]


class ThreadPeers:
    """One member of a group of threads; counts its calls, so that a test can say how often workers met."""

    def __init__(self, ring: Ring) -> None:
        self.rank, self.world, self.calls, self._ring = ring.rank, ring.world, 0, ring

    def allreduce(self, tensor: torch.Tensor) -> None:
        self.calls += 1
        self._ring.allreduce(tensor.detach().view(-1).numpy())

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.calls += 1
        self._ring.broadcast(tensor.detach().view(-1).numpy())


def form(world: int) -> list[Ring]:
    """Join `world` rings, each in a thread of its own."""
    addresses, barrier = [b""] * world, threading.Barrier(world, timeout=10)
    rings = [Ring(rank, world, secret=b"of this test", timeout_s=10) for rank in range(world)]

    def join(ring: Ring) -> None:
        def exchange(address: bytes) -> list[bytes]:
            addresses[ring.rank] = address
            barrier.wait()
            return addresses

        ring.form(exchange)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(join, rings))
    return rings


@pytest.fixture
def together() -> Iterator[Callable[[int, Act], list[Any]]]:
    """Return run(world, act): `act(peers)` by every worker at once; results in the order of ranks."""
    groups: dict[int, list[Ring]] = {}

    def run(world: int, act: Act) -> list[Any]:
        if world == 1:
            return [act(Alone())]
        if world not in groups:
            groups[world] = form(world)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(lambda ring: act(ThreadPeers(ring)), groups[world]))

    yield run
    for group in groups.values():
        for ring in group:
            ring.close()
