"""Microseconds of an all-reduce between processes of one machine: ours, torch's gloo, and what the memory allows.

    python benchmarks/allreduce.py [--rounds 5] [--quick]

2 and 4 processes, one thread each, fp32 sums in place. In every round each method is called some times, in turns; a
figure is the median over the calls of the slowest rank. "registered" are arrays in the group's own memory, as the
gradient buckets of the trainer, "private" any others. Up to 16 KB both are copied by all and summed by all.

The limit: every element of every rank has to be read once and written once. All processes at once do just that, each on
arrays of its own of the size of its part, `x += y; y = x` in blocks that stay in the cache, without meeting anybody;
by numpy, and by the kernel in C. "no kernel" is ours where no compiler is.

Expected before measuring, on two cores of a virtual machine, from a prototype: 2 ranks 7-10 us at 4 KB, 12 at 64 KB,
50 at 1 MB, 1.7 ms at 16 MB, 8.7 ms at 64 MB registered, 0.80 of the limit; private 14 ms at 64 MB, a quarter less for
reading instead of writing each other's memory; gloo 0.3-0.6 ms up to 64 KB, 1-2.7 ms at 1 MB, 16 ms, 60 ms.
Targets, as ratios in the same run. 2 ranks, registered against gloo: at least 15 x up to 1 MB, 9 x at 16 MB, 6 x at
64 MB; at least 0.80 of numpy's limit at 64 MB without the kernel, 0.95 of the kernel's with it (expected: a quarter
faster than numpy); private at least 3.5 x gloo from 16 MB; 4 KB at most 10 us and at least 20 x
gloo. 4 ranks on 2 cores: at least 6 x gloo at 1 and 16 MB.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from harness import arguments, interleave, median_ratio, report

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "64 MB": 64 << 20}
GLOO, REGISTERED, PRIVATE, LIMIT = "torch gloo", "registered", "private", "memory limit"
NUMPY, KERNEL_LIMIT = "registered, no kernel", "memory limit, kernel"
METHODS = (REGISTERED, NUMPY, PRIVATE, GLOO, LIMIT, KERNEL_LIMIT)
BLOCK_BYTES = 256 << 10
SECRET = b"of this benchmark"


def main() -> None:
    asked = arguments(__doc__, quick="one round of few calls, up to 1 MB")
    sizes = {name: size for name, size in SIZES.items() if not asked.quick or size <= 1 << 20}
    measured: dict[str, dict[str, list[float]]] = {}
    for world in (2, 4):
        with Ranks(world) as ranks:
            for name, size in sizes.items():
                calls = 3 if asked.quick else max(3, min(200, (64 << 20) // size))
                measured[f"{world} ranks, {name}, us"] = interleave(
                    1 if asked.quick else asked.rounds, {each: ranks.measure(each, size, calls) for each in METHODS}
                )
    report("allreduce", REGISTERED, measured, targets=targets(measured))


def targets(measured: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Return what the targets are about."""

    def times(world: int, size: str, method: str, against: str) -> dict[str, float]:
        found = measured.get(f"{world} ranks, {size}, us")
        if found is None:
            return {}
        return {f"{world} ranks, {size}: {method} x {against}": median_ratio(found[against], found[method])}

    least = {"4 KB": 20, "64 KB": 15, "1 MB": 15, "16 MB": 9, "64 MB": 6}
    wanted = {f"{name} (>= {factor})": times(2, name, REGISTERED, GLOO) for name, factor in least.items()}
    wanted |= {f"{name} private (>= 3.5)": times(2, name, PRIVATE, GLOO) for name in ("16 MB", "64 MB")}
    wanted |= {f"{name}, 4 ranks (>= 6)": times(4, name, REGISTERED, GLOO) for name in ("1 MB", "16 MB")}
    found = {f"{key}: {inner}": value for key, ratios in wanted.items() for inner, value in ratios.items()}
    found["4 KB, us (<= 10)"] = statistics.median(measured["2 ranks, 4 KB, us"][REGISTERED])
    if large := measured.get("2 ranks, 64 MB, us"):
        found["64 MB, no kernel, part of the limit (>= 0.80)"] = median_ratio(large[LIMIT], large[NUMPY])
        found["64 MB, part of the kernel's limit (>= 0.95)"] = median_ratio(large[KERNEL_LIMIT], large[REGISTERED])
        found["64 MB, times as fast as without the kernel"] = median_ratio(large[NUMPY], large[REGISTERED])
    return found


class Ranks:
    """Processes that are joined by gloo and by a group of ours, and do what they are told."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, world, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        port = self._pipes[0].recv()
        addresses = [pipe.recv() for pipe in self._pipes if self._tell_port(pipe, port)]
        for pipe in self._pipes:
            pipe.send(addresses)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def measure(self, method: str, size_bytes: int, calls: int) -> Callable[[], float]:
        """Return what calls a method some times and gives the microseconds of the slowest rank, median over calls."""

        def run() -> float:
            for pipe in self._pipes:
                pipe.send((method, size_bytes, calls))
            by_rank = [pipe.recv() for pipe in self._pipes]
            return statistics.median(map(max, zip(*by_rank))) * 1e6

        return run

    def _tell_port(self, pipe: Connection, port: int) -> bool:
        pipe.send(port)
        return True


def serve(rank: int, world: int, pipe: Connection) -> None:
    """Be one rank."""
    import torch
    import torch.distributed as dist

    from lepton_ray.collective.group import Group

    torch.set_num_threads(1)
    store = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        pipe.send(store.port)
    port = pipe.recv()
    store = store or dist.TCPStore("127.0.0.1", port, world, is_master=False)
    group = Group(rank, world, secret=SECRET)

    def exchange(address: bytes) -> Sequence[bytes]:
        pipe.send(address)
        addresses: Sequence[bytes] = pipe.recv()
        return addresses

    group.form(exchange)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    assert group.transport == "shared memory"
    largest = max(SIZES.values()) // 4
    # torch's memory begins on a cache line; numpy's does not, and copies to it take up to three times as long.
    registered, private, spare = group.empty(largest), torch.empty(largest).numpy(), group.empty(largest)
    for array in (registered, private, spare):
        array.fill(0)
    while (order := pipe.recv()) is not None:
        pipe.send(clock(group, world, (registered, private, spare), *order))
    dist.destroy_process_group()
    group.close()


def clock(group: Any, world: int, memory: Sequence[Any], method: str, size_bytes: int, calls: int) -> list[float]:
    """Return the seconds of each call."""
    import torch
    import torch.distributed as dist

    from lepton_ray.collective import shm
    from lepton_ray.collective.kernel import sum_into_all

    registered, private, spare = memory
    shm.sum_into_all = (lambda dtype: None) if method == NUMPY else sum_into_all
    kernel = sum_into_all(registered.dtype)
    count = size_bytes // 4
    tensor = torch.from_numpy(private[:count])
    part = count // world
    # Of a rank's share of the traffic: its part of its own array and of all others.
    here, others = registered[:part], [spare[part * i : part * (i + 1)] for i in range(world - 1)]
    act: Callable[[], object] = {
        REGISTERED: lambda: group.allreduce(registered[:count]),
        NUMPY: lambda: group.allreduce(registered[:count]),
        PRIVATE: lambda: group.allreduce(private[:count]),
        GLOO: lambda: dist.all_reduce(tensor),
        LIMIT: lambda: stream(here, others, max(1024, min(BLOCK_BYTES, (1 << 20) // world) // 4)),
        KERNEL_LIMIT: lambda: kernel and kernel([here, *others]),
    }[method]
    seconds = []
    act()
    group.barrier()
    for _ in range(calls):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return seconds


def stream(here: Any, others: Sequence[Any], step: int) -> None:
    """Read and write every element once."""
    for start in range(0, here.size, step):
        own = here[start : start + step]
        for other in others:
            np.add(own, other[start : start + step], out=own)
        for other in others:
            other[start : start + step] = own


if __name__ == "__main__":
    main()
