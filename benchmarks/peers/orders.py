"""How a rank of `ranks.py` connects, and does what it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client

from workload import Run


def place() -> str:
    """Return where orders come from."""
    return os.environ["BENCH_ORDERS"]


def largest() -> int:
    """Return the most float32 values that an order names."""
    return int(os.environ["BENCH_LARGEST"])


def serve(
    run: Run,
    place: str,
    acts: Mapping[str, Callable[[int], Callable[[], object]]],
    barrier: Callable[[], object],
) -> None:
    """Act on orders until there are no more.

    acts: name -> what makes a call on so many float32 values.
    """
    with Client(place, "AF_UNIX") as connection:
        run.mark("connected")
        while (order := connection.recv()) is not None:
            name, count, calls = order
            connection.send(clock(acts[name](count), barrier, calls))


def clock(act: Callable[[], object], barrier: Callable[[], object], calls: int) -> list[float]:
    """Return the seconds of each call, after a tenth more that are not counted: cores that slept need a while."""
    seconds = []
    for _ in range(1 + calls // 10):
        act()
    barrier()
    for _ in range(calls):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return seconds
