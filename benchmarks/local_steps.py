"""Seconds to the same test loss over a slow network: local steps of 100, against torch DDP that sums in every step.

    python benchmarks/local_steps.py [--rounds 3] [--rate 100mbit] [--quick]      (as root)

The byte-level language model of jobs/train_text.py (1.0 M parameters) on Python's help pages, 2 workers of one thread,
each in a network namespace of its own, joined by a virtual cable whose both ends send at 100 Mbit/s. In every round DDP
on gloo trains for 400 steps, and its test loss is measured. Then ours trains with local steps until its test loss,
measured after every exchange (in int8), is as low. Both take the same batches (2 windows of 64 bytes per worker), the
same AdamW and the same first weights; the clock stands still while a test loss is measured. The workers' mean is taken
as it is (`OuterSGD(lr=1.0, momentum=0.0)`), with nothing in the background: in so short a run DiLoCo's momentum is
slower. `no network` shows what of the time is compute: the steps of two workers that never meet.

Expected before measuring: 4.0 MB of gradients take 320 ms at 100 Mbit/s and a step of a worker 22 ms, so DDP needs 340
ms a step and local steps 25 ms, exchange included. A simulation without network needs 500 local steps for the loss of
400 steps together (as many for 300 steps, a third more for 600: small local batches are noisier). That makes 137 s
against 12.6 s, 10.9 times. Target: at least 10 times sooner. A slower processor makes it less: it is a ratio of bytes
to arithmetic.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from harness import interleave, median_ratio, report

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

FEATURES, LAYERS, LR, BATCH = 192, 2, 1e-3, 4
STEPS, MOST_STEPS = 400, 1500
OURS, DDP, NO_NETWORK = "lepton_ray, local steps", "torch DDP, gloo", "no network"
WORLD = 2
SECRET = b"of this benchmark"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rate", default="100mbit", help="of the network, as tc writes it")
    options.add_argument("--steps", type=int, default=100, help="between two exchanges")
    options.add_argument("--quick", action="store_true", help="does it run? one round of 20 steps")
    asked = options.parse_args()
    if os.geteuid():
        print("Left out: network namespaces need root.")
        return
    steps, every = (20, 10) if asked.quick else (STEPS, asked.steps)
    with Network(asked.rate) as network, Workers(network) as workers:
        reached: list[float] = []
        taken: dict[str, list[float]] = {"steps of DDP": [], "steps of ours": []}

        def ddp() -> float:
            seconds, loss, _ = workers.run("ddp", steps)
            reached.append(loss)
            taken["steps of DDP"].append(steps)
            return seconds

        def ours() -> float:
            seconds, loss, done = workers.run("local", every, reached[-1], 40 if asked.quick else MOST_STEPS)
            if loss > reached[-1] and not asked.quick:
                raise SystemExit(f"local steps came to a test loss of {loss:.4f} only, DDP to {reached[-1]:.4f}.")
            taken["steps of ours"].append(done)
            return seconds

        def alone() -> float:
            return workers.run("alone", steps)[0]

        seconds: dict[str, list[float]] = {DDP: [], OURS: [], NO_NETWORK: []}
        for _ in range(1 if asked.quick else asked.rounds):  # in a fixed order: ours has to know what DDP reached
            for name, found in interleave(1, {DDP: ddp, OURS: ours, NO_NETWORK: alone}).items():
                seconds[name] += found
    report(
        "local_steps",
        OURS,
        {f"to the test loss of {steps} steps of DDP, s": seconds, "steps": taken},
        targets={"times sooner than DDP (>= 10)": median_ratio(seconds[DDP], seconds[OURS])},
        test_loss_nats=reached,
        rate=asked.rate,
        local_steps=every,
    )


# --- the network -----------------------------------------------------------------------------------------------------


class Network:
    """Two namespaces, joined by a cable with a limited rate. Named after this process, and gone with it."""

    def __init__(self, rate: str) -> None:
        self.names = [f"lepton-{os.getpid()}-{rank}" for rank in range(WORLD)]
        self.cards = [f"lep{os.getpid() % 100_000}{'ab'[rank]}" for rank in range(WORLD)]
        self.hosts = [f"10.98.0.{rank + 1}" for rank in range(WORLD)]
        self._rate = rate

    def __enter__(self) -> Network:
        for name in self.names:
            call("ip", "netns", "add", name)
        first, second = self.cards
        call("ip", "link", "add", first, "netns", self.names[0], "type", "veth", "peer", second, "netns", self.names[1])
        for name, card, host in zip(self.names, self.cards, self.hosts):
            call("ip", "-n", name, "addr", "add", f"{host}/24", "dev", card)
            call("ip", "-n", name, "link", "set", card, "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
            limit = f"tbf rate {self._rate} burst 256kb latency 50ms".split()
            call("tc", "-n", name, "qdisc", "add", "dev", card, "root", *limit)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def enter(namespace: str) -> None:
    """Move this process into a network namespace (`os.setns` is new in Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns({namespace})")


# --- the workers -----------------------------------------------------------------------------------------------------


class Workers:
    """Processes, each in its namespace, that train when they are told to."""

    def __init__(self, network: Network) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            place = network.names[rank], network.cards[rank], network.hosts
            process = context.Process(target=serve, args=(rank, place, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)

    def run(self, kind: str, *how: float) -> tuple[float, float, int]:
        """Train; return the seconds and the test loss of rank 0, and the steps done."""
        for pipe in self._pipes:
            pipe.send((kind, how))
        if kind == "local":  # the workers form a group
            addresses = [pipe.recv() for pipe in self._pipes]
            for pipe in self._pipes:
                pipe.send(addresses)
        return [pipe.recv() for pipe in self._pipes][0]


def serve(rank: int, place: tuple[str, str, Sequence[str]], pipe: Connection) -> None:
    """Be one worker."""
    namespace, card, hosts = place
    enter(namespace)
    os.environ.update(GLOO_SOCKET_IFNAME=card, MASTER_ADDR=hosts[0], MASTER_PORT="29511")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    while (order := pipe.recv()) is not None:
        kind, how = order
        act: Callable[..., tuple[float, float, int]] = {"ddp": with_ddp, "alone": alone}.get(kind, with_ours)
        pipe.send(act(rank, *how, *((pipe, hosts[rank]) if kind == "local" else ())))
    dist.destroy_process_group()


def make_model() -> Any:
    import torch
    import train_text

    torch.manual_seed(0)
    return train_text.ByteModel(FEATURES, LAYERS)


def make_optimizer(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=LR)


def text() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return (training inputs, targets) and 256 windows of test data, as the job cuts them."""
    import train_text

    inputs, targets = train_text.windows(train_text.read_text(None))
    order = np.random.default_rng(0).permutation(len(inputs))
    test, train = order[:256], order[256:]
    return (inputs[train], targets[train]), (inputs[test], targets[test])


def plain_steps(model: Any, rank: int, steps: int, world: int) -> float:
    """Train as one writes it by hand, with the batches that ours take; return the seconds."""
    import torch
    import train_text

    from lepton_ray.data.order import order

    (inputs, targets), _ = text()
    optimizer = make_optimizer(model)
    share = BATCH // WORLD
    start = time.perf_counter()
    for step in range(steps):
        epoch, index = divmod(step, len(inputs) // BATCH)
        if index == 0:
            ids = order(0, epoch, len(inputs))
        own = ids[index * BATCH + rank * share :][:share]
        optimizer.zero_grad()
        total, count = train_text.loss(model(torch.from_numpy(inputs[own])), torch.from_numpy(targets[own]))
        (total / count).backward()
        optimizer.step()
    return time.perf_counter() - start


def with_ddp(rank: int, steps: int) -> tuple[float, float, int]:
    from torch.nn.parallel import DistributedDataParallel

    model = make_model()
    seconds = plain_steps(DistributedDataParallel(model), rank, steps, WORLD)
    return seconds, loss_of(model), steps


def alone(rank: int, steps: int) -> tuple[float, float, int]:
    model = make_model()
    return plain_steps(model, rank, steps, 1), loss_of(model), steps


def loss_of(model: Any) -> float:
    """Return the test loss in nats per byte."""
    import torch
    import train_text

    inputs, targets = (torch.from_numpy(part) for part in text()[1])
    with torch.no_grad():
        total, count = train_text.loss(model.eval()(inputs), targets)
    return float(total) / count


class Clock:
    """Seconds, without those between `stop` and `start`."""

    def __init__(self) -> None:
        self.seconds, self._since_s = 0.0, 0.0

    def start(self) -> None:
        self._since_s = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._since_s


def with_ours(
    rank: int, every: int, goal: float, most_steps: int, pipe: Connection, host: str
) -> tuple[float, float, int]:
    """Train with what a worker runs, without Ray: the trainer's own preparation, and a task."""
    import torch
    import train_text

    from lepton_ray import Batch, Checkpoints, DistributedTrainer, OuterSGD, Sync
    from lepton_ray.collective.group import Group
    from lepton_ray.collective.wire import Feedback
    from lepton_ray.prepare import with_place
    from lepton_ray.train.job import Task

    class Wire:
        """The other worker, as on another node: both are on one machine, and would find that they share its memory."""

        world, is_in_one_node = WORLD, False

        def __init__(self) -> None:
            self.rank, self._group = rank, Group(rank, WORLD, secret=SECRET, host=host, node=str(rank))
            self._group.form(self._exchange)
            self.close, self.explain = self._group.close, self._group.explain

        def _exchange(self, address: bytes) -> Sequence[bytes]:
            pipe.send(address)
            addresses: Sequence[bytes] = pipe.recv()
            return addresses

        def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
            feedback = None if residual is None else Feedback(residual.numpy())
            self._group.allreduce(tensor.detach().view(-1).numpy(), wire=wire, feedback=feedback)

        def broadcast(self, tensor: torch.Tensor) -> None:
            self._group.broadcast(tensor.detach().view(-1).numpy())

    train, test = text()
    wire = Wire()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistributedTrainer(
            make_model(),
            train,
            test,
            num_workers=WORLD,
            loss=train_text.loss,
            optimizer=make_optimizer,
            batch=Batch(samples=BATCH),
            steps=most_steps,
            sync=Sync.local(steps=every, outer=OuterSGD(lr=1.0, momentum=0.0), delay=0, wire="int8"),
            validate_every=every,
            checkpoints=Checkpoints(every_steps=most_steps),
        )
        found: list[tuple[float, float, int]] = []
        stopped: list[bool] = []
        clock = Clock()

        def tell(event: str, /, **fields: Any) -> None:
            """Stop the clock at the record of a step, which comes before its measure, and go on after that."""
            if event == "step" and (fields["step"] + 1) % every == 0:
                clock.stop()
            elif event == "validated" and not stopped:
                found[:] = [(clock.seconds, fields["test_loss"], fields["step"])]
                stopped.extend([True] if fields["test_loss"] <= goal else [])
                clock.start()

        task = Task(
            replace(with_place(trainer._prepared.spec, "local", folder), threads=1),
            train_source=trainer._train,
            test_source=trainer._test,
            device=torch.device("cpu"),
            report=tell,
            record=lambda step: None,
            wish=lambda: bool(stopped),
        )
        task.join(wire, 1)
        clock.start()
        task.run()
        task.close()
    wire.close()
    return found[0] if rank == 0 else (0.0, 0.0, 0)


if __name__ == "__main__":
    main()
