"""Measure, while a group forms, what `plan.transport` decides by: the network between nodes, memory, and codecs.

A few messages, and transfers that grow as long as they are quick. On a link of 1 Gbit/s that takes about 25 ms; on one
of 1 Mbit/s half a second. All ranks take part and end with the same figures. A process measures itself once: its next
group, perhaps of survivors who want to go on, takes what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from lepton_ray.collective.across import Across
from lepton_ray.collective.calls import SUM, Array
from lepton_ray.collective.links import Flow
from lepton_ray.collective.mesh import Mesh
from lepton_ray.collective.row import bytes_of
from lepton_ray.collective.wire import CODECS
from lepton_ray.plan.transport import Route, Speeds, Wire, ring_messages

# What a node sends at once. What shapes a link often lets a first burst pass, so a larger transfer says more.
_TRANSFERS_BYTES = (64 << 10, 256 << 10, 1 << 20)
# A transfer of so many seconds is large enough. The last is repeated, for it may have met a busy moment, unless it took
# very long: that is a slow link, whatever the moment.
_LONG_S, _VERY_LONG_S = 0.01, 0.02
# Numbers that are encoded, a piece that fits the cache; and that are added up, more than fit.
_PIECE, _ARRAY = 64 << 10, 1 << 19


def measure(
    mesh: Mesh, across: Across, allgather: Callable[[Array], Array], attempt: Callable[[Route], None]
) -> Speeds:
    """Measure with all ranks. attempt: sums next to nothing along a route."""

    def slowest(seconds: list[float]) -> list[float]:
        """Return the most of all ranks."""
        found: list[float] = allgather(np.array(seconds)).max(axis=0).tolist()
        return found

    latency_s, ring_s = slowest([_best(partial(attempt, route)) for route in (Route.EXCHANGE, Route.RING)])
    start_s = max(0.0, ring_s - ring_messages(len(across.counts)) * latency_s)
    for size_bytes in _TRANSFERS_BYTES:
        transfer = partial(_time, partial(_transfer, mesh, across, size_bytes // across.sharing))
        (took_s,) = slowest([transfer()])
        if took_s > _LONG_S:
            break
    if took_s < _VERY_LONG_S:
        took_s = min(took_s, *slowest([transfer()]))
    bandwidth = size_bytes / max(took_s - latency_s, took_s / 4)
    memory, bf16, int8 = (4 * _PIECE / each for each in slowest(_own_seconds()))
    return Speeds(latency_s=latency_s, start_s=start_s, bandwidth=bandwidth, memory=memory, bf16=bf16, int8=int8)


@cache
def _own_seconds() -> list[float]:
    """Return how long this process takes to add up a piece, and to encode and decode it in each format."""
    array = np.ones(_ARRAY, np.float32)
    total, piece, decoded = array.copy(), array[:_PIECE], np.empty(_PIECE, np.float32)
    seconds = [_best(lambda: SUM.apply(total, array, out=total)) * _PIECE / _ARRAY]
    for wire in (Wire.BF16, Wire.INT8):
        codec = CODECS[wire]()
        data = np.empty(codec.size(_PIECE), np.uint8)
        seconds.append(_best(partial(codec.encode, piece, data)) + _best(partial(codec.decode, data, decoded)))
    return seconds


def _transfer(mesh: Mesh, across: Across, size_bytes: int) -> None:
    """Send to the next node while as much comes from the one before, on all lanes at once."""
    if across.lane is None:
        return
    flow = Flow(mesh.watch, mesh.timeout_s, outlet=across.lane.link(1), inlet=across.lane.link(-1))
    data = np.zeros(size_bytes, np.uint8)
    flow.send(bytes_of(data))
    flow.receive(bytes_of(np.empty_like(data)))
    flow.flush()


def _best(act: Callable[[], object]) -> float:
    return min(_time(act) for _ in range(3))


def _time(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s
