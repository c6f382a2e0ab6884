"""Ranks of this machine that are joined by a group of ours and by torch's gloo; also what the memory allows them."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import orders
from workload import Run

BLOCK_BYTES = 256 << 10
SECRET = b"of this benchmark"


def serve(run: Run, rank: int, meeting: str) -> None:
    """Be one rank. meeting: a file."""
    import torch
    import torch.distributed as dist

    from lepton_ray.collective import shm
    from lepton_ray.collective.group import Group
    from lepton_ray.collective.kernel import addresses_of, sum_into_all

    torch.set_num_threads(1)
    world = run.workers
    store = dist.FileStore(meeting, world)

    def exchange(address: bytes) -> Sequence[bytes]:
        store.set(f"address {rank}", address)
        return [store.get(f"address {peer}") for peer in range(world)]

    group = Group(rank, world, secret=SECRET)
    group.form(exchange)
    assert group.transport == "shared memory"
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("gloo", store),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    # torch's memory begins on a cache line; numpy's does not, and copies to it take up to three times as long.
    largest = orders.largest()
    registered, private, spare = group.empty(largest), torch.empty(largest).numpy(), group.empty(largest)
    for array in (registered, private, spare):
        array.fill(0)

    kernel = sum_into_all(registered.dtype)

    def ours(array: Any, has_kernel: bool = True) -> Any:
        def make(count: int) -> Any:
            shm.sum_into_all = sum_into_all if has_kernel else lambda dtype: None
            part = array[:count]
            return lambda: group.allreduce(part)

        return make

    def gloo(count: int) -> Any:
        tensor = torch.from_numpy(private[:count])
        return lambda: dist.all_reduce(tensor)

    def limit(count: int, has_kernel: bool = False) -> Any:
        part = count // world
        # Of a rank's share of the traffic: its part of its own array and of all others.
        here, others = registered[:part], [spare[part * i : part * (i + 1)] for i in range(world - 1)]
        step = max(1024, min(BLOCK_BYTES, (1 << 20) // world) // 4)
        if has_kernel:
            addresses = addresses_of([array.ctypes.data for array in (here, *others)])
            return lambda: kernel and kernel(addresses, 0, part)
        return lambda: stream(here, others, step)

    acts = {
        "registered": ours(registered),
        "registered, no kernel": ours(registered, has_kernel=False),
        "private": ours(private),
        "torch gloo": gloo,
        "memory limit": limit,
        "memory limit, kernel": functools.partial(limit, has_kernel=True),
    }
    orders.serve(run, orders.place(), acts, group.barrier)
    dist.destroy_process_group()
    group.close()


def stream(here: Any, others: Sequence[Any], step: int) -> None:
    """Read and write every element once."""
    for start in range(0, here.size, step):
        own = here[start : start + step]
        for other in others:
            np.add(own, other[start : start + step], out=own)
        for other in others:
            other[start : start + step] = own


if __name__ == "__main__":
    run = Run.asked()
    meeting = os.path.join(tempfile.mkdtemp(dir=os.environ["BENCH_FOLDER"]), "meeting")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=serve, args=(run, rank, meeting)) for rank in range(run.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise SystemExit(any(process.exitcode for process in processes))
