"""Small processes that are the ranks of groups. They do what they are told through pipes, and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lepton_ray.collective import row, shm
from lepton_ray.collective.calls import MAX, SUM, Array
from lepton_ray.collective.group import Group

SECRET = b"of these tests"
GROUPS: dict[str, Group] = {}
"""Of this process, by name."""


class Member:
    """One process."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self.pid = self._start(theirs)
        theirs.close()

    def _start(self, pipe: Connection) -> int:
        """Start a process that serves a connection; return its id."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.process = context.Process(target=serve, args=(pipe,), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        return self.process.pid

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Let the process call function(*args); `result` gives what it returns."""
        self._pipe.send((function, args))

    def say(self, message: Any) -> None:
        self._pipe.send(message)

    def hear(self, limit_s: float = 20) -> Any:
        assert self._pipe.poll(limit_s), "the member does not answer"
        return self._pipe.recv()

    def result(self, limit_s: float = 20) -> Any:
        """Return what the call returned; raise what it raised."""
        outcome, value = self.hear(limit_s)
        if outcome == "raised":
            raise value
        return value

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.kill(self.pid, how)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


@contextmanager
def members(count: int) -> Iterator[list[Member]]:
    made = [Member() for _ in range(count)]
    try:
        yield made
    finally:
        for member in made:
            member.close()


def together(those: Sequence[Member], function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) in all at once; return what each returned, by rank."""
    for member in those:
        member.tell(function, *args)
    return [member.result() for member in those]


def form(those: Sequence[Member], name: str = "group", timeout_s: float = 20, nodes: str = "") -> None:
    """Join processes into a group, ranks in their order. nodes: a letter for each rank; all on one node by default."""
    for rank, member in enumerate(those):
        member.tell(_join, name, rank, len(those), timeout_s, nodes[rank : rank + 1])
    addresses = [member.hear() for member in those]
    for member in those:
        member.say(addresses)
    for member in those:
        member.result()


def leave(name: str = "group") -> None:
    GROUPS.pop(name).close()


def inventory() -> tuple[int, int, int]:
    """Count descriptors, threads, and mapped segments of this process."""
    with open("/proc/self/maps") as maps:
        segments = sum("memfd:lepton_ray" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), segments


def array_like(group: Group, source: Array, way: str) -> Array:
    """Copy an array to where an operation takes this way: "in place" is the group's memory, others are private."""
    shared = group._shared if group._across is None else group._across.shared
    if shared is not None:
        shared.can_read = way != "staged"
    array = group.empty(source.size, source.dtype) if way == "in place" else np.empty_like(source)
    array[:] = source
    return array


def shrink() -> None:
    """Take every way at a hundredth of the usual sizes."""
    shm.SMALL_BYTES, shm.COPY_BYTES, shm.SLOT_BYTES = 256, 1024, 4096
    shm._BLOCK_BYTES, shm._READ_BYTES = 2048, 8192
    row._PIECE_BYTES = 4096


OPERATIONS: dict[str, Callable[[Group, Array], object]] = {
    "allreduce": lambda group, array: group.allreduce(array),
    "allgather": lambda group, array: group.allgather(array),
    "reducescatter": lambda group, array: group.reducescatter(array, MAX),
    "broadcast": lambda group, array: group.broadcast(array, 1),
    "reduce": lambda group, array: group.reduce(array, 1, SUM),
    "barrier": lambda group, array: group.barrier(),
    "int8": lambda group, array: group.allreduce(array, wire="int8"),
}


def repeat(operation: str, count: int, way: str, name: str = "group") -> tuple[str, str, float]:
    """Repeat an operation until it raises; return the error's type and text, and when it came."""
    group = GROUPS[name]
    array = array_like(group, np.ones(count, np.float32), way)
    try:
        while True:
            array.fill(1)
            OPERATIONS[operation](group, array)
    except OSError as error:
        return type(error).__name__, str(error), time.monotonic()


def _join(pipe: Connection, name: str, rank: int, world: int, timeout_s: float, node: str) -> None:
    def exchange(address: bytes) -> Sequence[bytes]:
        pipe.send(address)
        addresses: Sequence[bytes] = pipe.recv()
        return addresses

    group = Group(rank, world, secret=SECRET, node=node)
    group.form(exchange)
    group.limit(timeout_s)
    GROUPS[name] = group


def serve(pipe: Connection) -> None:
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            value = function(pipe, *args) if function is _join else function(*args)
            pipe.send(("done", value))
        except BaseException as error:
            pipe.send(("raised", error))
