"""torchft: two replica groups of one worker, their lighthouse, and who starts a dead one again.

Without a word this is the one that starts the others; with a number, that replica group.
"""

import datetime
import os
import socket
import subprocess
import sys
import time

from faulty import data, make_model, make_optimizer
from workload import Run

HEARTBEAT_MS, JOIN_MS = 1000, 1000
"""A replica is given up after so long (5 s as shipped); a quorum waits so long for stragglers."""
TIMEOUT = datetime.timedelta(seconds=30)
BATCH = 8


def supervise(run: Run) -> None:
    """Start all, and again whoever dies, until told to end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bind = ["--bind", f"127.0.0.1:{port}", "--min_replicas", "1"]
    times = ["--join_timeout_ms", str(JOIN_MS), "--heartbeat_timeout_ms", str(HEARTBEAT_MS)]
    subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "torchft_lighthouse"), *bind, *times])
    env = {**os.environ, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
    time.sleep(1)
    groups = [None] * run.workers
    while True:
        for i, group in enumerate(groups):
            if group is None or group.poll() is not None:
                groups[i] = subprocess.Popen([sys.executable, __file__, str(i)], env=env)
        time.sleep(0.02)


def train(run: Run, group: int) -> None:
    """Be one replica group."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    inner = make_model(run)
    own = make_optimizer(run, inner)

    def load(state: dict) -> None:
        inner.load_state_dict(state["model"])
        own.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": inner.state_dict(), "optimizer": own.state_dict()},
        replica_id=f"group{group}",
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        timeout=TIMEOUT,
        hostname="127.0.0.1",
    )
    model, optimizer = DistributedDataParallel(manager, inner), Optimizer(manager, own)
    x, y = (torch.from_numpy(array)[group :: run.workers] for array in data(run))
    while manager.current_step() < run.steps:
        at = manager.current_step() * BATCH % (len(x) - BATCH)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[at : at + BATCH]), y[at : at + BATCH]).backward()
        optimizer.step()


if __name__ == "__main__":
    if sys.argv[1:]:
        train(Run.asked(), int(sys.argv[1]))
    else:
        supervise(Run.asked())
