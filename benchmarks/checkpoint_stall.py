"""Seconds of training that a checkpoint of 100 M parameters costs: torch.save, DCP async_save, and ours.

    python benchmarks/checkpoint_stall.py [--rounds 5] [--folder /on/the/disk/to/measure]

Four linear layers of 5016 x 5016 (403 MB of fp32) with SGD, one process, one torch thread. `blocked` is the time inside
the call. `lost` adds what the steps take longer while the save goes on in the background, in comparison with
steps just before. `on disk` is from the call until the checkpoint can be loaded. Every method saves once before the
first round, as a run of some length would have; that first save is shown by itself (ours comes after `prepare`).

Expected before measuring: DCP async copies into fresh memory at 1.5 to 2 GB/s, 0.2 to 0.27 s; with its staging cached
it copies into warm memory, 0.06 to 0.1 s, as ours does, the first time too. Ours therefore blocks for 0.25 to 0.4 x
DCP async as it comes, and about 1 x the cached one. On disk, ours comes later than both, since it hashes (SHA-256, 1.4
GB/s) and calls fsync. (That neither peer does was expected too, and is wrong: DCP syncs its files, torch.save does
not.) Target: blocked <= 0.5 x DCP async.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import interleave, median_ratio, report
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint import Checkpointer

SIZE = 5016
STEPS_BEFORE = 5
OURS = "lepton_ray"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", default=tempfile.gettempdir())
    asked = options.parse_args()
    folder = tempfile.mkdtemp(prefix="checkpoint-stall-", dir=asked.folder)
    warnings.filterwarnings("ignore", module="torch.distributed")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        measure(asked.rounds, folder)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder)


def measure(rounds: int, folder: str) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(SIZE, SIZE) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x_BD = torch.randn(8, SIZE)
    saver = Checkpointer(Folder(folder).sub("ours"), keep=1)
    # kept from save to save by the caller, it keeps its copies; what needs a GPU is switched off
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x_BD).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    def torch_save(path: str) -> None:
        torch.save(model.state_dict(), path)

    def dcp_async(path: str) -> object:
        return dcp.async_save(model.state_dict(), checkpoint_id=path)

    def dcp_async_cached(path: str) -> object:
        return dcp.async_save(model.state_dict(), checkpoint_id=path, async_stager=stager)

    saves = 0

    def ours(path: str) -> object:
        nonlocal saves
        saves += 1
        saver.save(saves, model.state_dict(), {"step": saves})
        return saver._last  # the future of the commit; a training loop has no need of it

    methods = {"torch.save": torch_save, "DCP async": dcp_async, "DCP async, cached": dcp_async_cached, OURS: ours}
    lost = {name: [] for name in methods}
    on_disk = {name: [] for name in methods}

    def once(name: str) -> float:
        path = os.path.join(folder, "peer")
        usual = statistics.median(step() for _ in range(STEPS_BEFORE))
        start = time.perf_counter()
        pending = methods[name](path)
        blocked = time.perf_counter() - start
        later = [step(), step()]
        while pending is not None and not pending.done():
            later.append(step())
        if pending is not None:
            pending.result()
        on_disk[name].append(blocked if pending is None else time.perf_counter() - start)
        lost[name].append(blocked + max(0.0, sum(later) - usual * len(later)))
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        return blocked

    saver.prepare(model.state_dict(), {"step": 0})
    saver.wait()
    step()
    first = {name: once(name) for name in methods}
    for kept in (lost, on_disk):
        for seconds in kept.values():
            seconds.clear()
    blocked = interleave(rounds, {name: lambda name=name: once(name) for name in methods})
    saver.close()
    stager.close()
    report(
        "checkpoint_stall",
        OURS,
        {
            "blocked, s": blocked,
            "blocked by the first save, s": {name: [seconds] for name, seconds in first.items()},
            "lost (blocked + slower steps), s": lost,
            "on disk after (whole steps), s": on_disk,
        },
        targets={"blocked <= 0.5 x DCP async": median_ratio(blocked[OURS], blocked["DCP async"])},
    )


if __name__ == "__main__":
    main()
