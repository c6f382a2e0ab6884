"""Workers as threads of this process, joined by real groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lepton_ray.collective.group import Group
from lepton_ray.train.peers import Alone, Peers
from tests.train.in_process import ThreadPeers, form

Act = Callable[[Peers], Any]


@pytest.fixture
def together() -> Iterator[Callable[[int, Act], list[Any]]]:
    """Return run(world, act): `act(peers)` by every worker at once; results in the order of ranks."""
    groups: dict[int, list[Group]] = {}

    def run(world: int, act: Act) -> list[Any]:
        if world == 1:
            return [act(Alone())]
        if world not in groups:
            groups[world] = form(world)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(lambda each: act(ThreadPeers(each)), groups[world]))

    yield run
    for group in groups.values():
        for each in group:
            each.close()
