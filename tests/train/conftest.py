"""Workers as threads of this process, joined by real rings over loopback sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lepton_ray.collective.ring import Ring
from lepton_ray.train.peers import Alone, Peers
from tests.train.in_process import ThreadPeers, form

Act = Callable[[Peers], Any]


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
