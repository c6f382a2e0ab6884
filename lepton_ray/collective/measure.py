"""Measure, while a group forms, what `plan.transport` decides by: the network between nodes, memory, and codecs.

A few messages and two to four transfers, which grow as long as they are quick. On a link of 1 Gbit/s that takes about
15 ms; on one of 1 Mbit/s about half a second. All ranks take part and end with the same figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from lepton_ray.collective.across import Across
from lepton_ray.collective.calls import SUM, Array
from lepton_ray.collective.links import Flow
from lepton_ray.collective.mesh import Mesh
from lepton_ray.collective.row import bytes_of
from lepton_ray.collective.wire import CODECS
from lepton_ray.plan.transport import Speeds, Wire

_MESSAGES = 4
# The second is of the same size: what shapes a link often lets a first burst pass.
_TRANSFERS_BYTES = (64 << 10, 64 << 10, 256 << 10, 1 << 20)
_LONG_S, _VERY_LONG_S = 0.004, 0.02  # a transfer that takes longer is the last; the first one only if very long
# Numbers that are encoded, a piece that fits the cache; and that are added up, more than fit.
_PIECE, _ARRAY = 64 << 10, 1 << 20


def measure(mesh: Mesh, across: Across, allgather: Callable[[Array], Array], barrier: Callable[[], None]) -> Speeds:
    """Measure with all ranks. barrier: the one of `across`."""

    def slowest(seconds: list[float]) -> list[float]:
        """Return the most of all ranks."""
        found: list[float] = allgather(np.array(seconds)).max(axis=0).tolist()
        return found

    (latency_s,) = slowest([min(_time(barrier) for _ in range(_MESSAGES))])
    for index, size_bytes in enumerate(_TRANSFERS_BYTES):
        (took_s,) = slowest([_time(partial(_transfer, mesh, across, size_bytes))])
        bandwidth = across.sharing * size_bytes / max(took_s - latency_s, took_s / 4)
        if took_s > (_LONG_S if index else _VERY_LONG_S):
            break
    array = np.ones(_ARRAY, np.float32)
    total, piece, decoded = array.copy(), array[:_PIECE], np.empty(_PIECE, np.float32)
    seconds = [_best(lambda: SUM.apply(total, array, out=total)) * _PIECE / _ARRAY]
    for wire in (Wire.BF16, Wire.INT8):
        codec = CODECS[wire]()
        data = np.empty(codec.size(_PIECE), np.uint8)
        seconds.append(_best(partial(codec.encode, piece, data)) + _best(partial(codec.decode, data, decoded)))
    memory, bf16, int8 = (piece.nbytes / each for each in slowest(seconds))
    return Speeds(latency_s=latency_s, bandwidth=bandwidth, memory=memory, bf16=bf16, int8=int8)


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
