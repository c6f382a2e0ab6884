"""Run a whole job in this process, without Ray: the trainer's own preparation, one `Task` per rank, a real journal.

Ranks are threads, joined by real groups. torch's generators are shared by the threads of a process, so with two ranks
or more a model must not draw random numbers, and `transform=` must not either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from lepton_ray import DistributedTrainer, journal
from lepton_ray.collective.group import Group
from lepton_ray.collective.wire import Feedback
from lepton_ray.prepare import with_place
from lepton_ray.result import Result, make_result
from lepton_ray.storage import Folder
from lepton_ray.train.job import Task
from lepton_ray.train.model import Model
from lepton_ray.train.peers import Alone, Peers

Records = list[dict[str, Any]]


class ThreadPeers:
    """One member of a group of threads; counts its calls, so that a test can say how often workers met."""

    def __init__(self, group: Group) -> None:
        self.rank, self.world, self.calls, self._group = group.rank, group.world, 0, group

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        self.calls += 1
        feedback = None if residual is None else Feedback(residual.numpy())
        self._group.allreduce(tensor.detach().view(-1).numpy(), wire=wire, feedback=feedback)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.calls += 1
        self._group.broadcast(tensor.detach().view(-1).numpy())

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._group.send(tensor.detach().view(-1).numpy(), to)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        self._group.recv(tensor.detach().view(-1).numpy(), source)

    @property
    def is_in_one_node(self) -> bool:
        return self._group.is_in_one_node

    def explain(self, size_bytes: int) -> str:
        return self._group.explain(size_bytes)


def form(world: int, nodes: str = "") -> list[Group]:
    """Join `world` groups, each in a thread of its own. nodes: a letter each, for the node that it says it is on."""
    addresses, barrier = [b""] * world, threading.Barrier(world, timeout=10)
    groups = [
        Group(rank, world, secret=b"of this test", timeout_s=10, node=nodes[rank : rank + 1]) for rank in range(world)
    ]

    def join(group: Group) -> None:
        def exchange(address: bytes) -> list[bytes]:
            addresses[group.rank] = address
            barrier.wait()
            return addresses

        group.form(exchange)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(join, groups))
    return groups


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a job left."""

    records: Records
    """Of all lives of the run, as in its journal (a job that does not train: what it reported)."""
    result: Result
    models: list[Model]
    """Each rank's own copy."""
    outputs: list[Any]
    """Numbered blocks of a prediction, of all ranks."""

    def of(self, event: str) -> Records:
        """Return the records of one kind."""
        return of(self.records, event)

    @property
    def losses(self) -> list[float]:
        """Return the training loss of each step."""
        return [record["train_loss"] for record in self.of("step")]


def of(records: Records, event: str) -> Records:
    """Return the records of one kind."""
    return [record for record in records if record["event"] == event]


def run_job(
    model: Any,
    train_data: Any,
    test_data: Any = None,
    *,
    storage: str,
    name: str = "job",
    num_workers: int = 1,
    nodes: str = "",
    mode: str = "train",
    at: Callable[[str, dict[str, Any]], None] = lambda event, fields: None,
    wish: Callable[[], bool] = lambda: False,
    record: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> Done:
    """Do a job to its end; the same name and storage again go on from the newest checkpoint, as in a new process.

    options: as DistributedTrainer takes them. mode: "train", "evaluate" or "predict" (of test_data).
    nodes: see `form`.
    at: called with every record before it is written, `record` with a step before its work counts as recorded; either
    may raise, which is how a test lets a run fail at any moment. wish: whether somebody asks the run to stop.
    Raises what the first rank that failed raised; the journal stays as it is.
    """
    trainer = DistributedTrainer(model, train_data, test_data, num_workers=num_workers, storage=storage, **options)
    folder = Folder(storage).sub(name)
    patience_s = trainer._faults.collective_timeout_s
    spec = replace(with_place(trainer._prepared.spec, name, folder.url), mode=mode, patience_s=patience_s)
    earlier = journal.read(folder)
    generation = 1 + max((int(found.get("generation", 0)) for found in earlier), default=0)
    book, told, lock = journal.Journal(folder), [], threading.Lock()
    if mode == "train" and not earlier:
        book.append("header", config=trainer._prepared.config)
    groups = form(num_workers, nodes) if num_workers > 1 else []
    tasks: dict[int, Task] = {}

    def report(rank: int, event: str, fields: dict[str, Any]) -> None:
        with lock:
            at(event, fields)
            if mode == "train":
                book.append(event, **{"generation": generation, **fields})
            told.append({"event": event, **fields})

    def work(peers: Peers) -> list[Any]:
        try:
            task = tasks[peers.rank] = Task(
                spec,
                train_source=trainer._train if mode == "train" else None,
                test_source=trainer._test,
                device=torch.device("cpu"),
                report=lambda event, /, **fields: report(peers.rank, event, fields),
                record=record,
                wish=wish,
            )
            task.join(peers, generation)
            is_over, outputs = task.run()
            assert is_over
            task.close()
            return outputs
        except BaseException:
            for group in groups:
                group.abort()
            if peers.rank in tasks:
                tasks[peers.rank].close()
            raise

    try:
        if groups:
            with ThreadPoolExecutor(num_workers) as pool:
                futures = [pool.submit(work, ThreadPeers(group)) for group in groups]
            failed = [future.exception() for future in futures if future.exception() is not None]
            for error in sorted(failed, key=lambda error: isinstance(error, ConnectionError)):  # the cause first
                raise error
            outputs = [block for future in futures for block in future.result()]
        else:
            outputs = work(Alone())
    finally:
        book.close()
        for group in groups:
            group.close()
        torch.set_deterministic_debug_mode("default")
    records: Records = journal.read(folder) if mode == "train" else told
    return Done(
        records=records,
        result=make_result(name, folder.url, records, trainer._model),
        models=[tasks[rank].parts.model for rank in sorted(tasks)],
        outputs=sorted(outputs, key=lambda block: block[0]),
    )
