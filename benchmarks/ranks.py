"""Start the ranks of a method in processes that last and act on order, so that methods can take turns call by call."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from launch import running, script

CORES = len(os.sched_getaffinity(0))
# What a root, and more ranks than cores, need of Open MPI. The others let both pass.
_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
_MANY = "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
_ASK = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_LIBRARIES = {"Open MPI": "Open MPI", "MPICH": "MPICH", "Intel(R) MPI": "Intel MPI"}


class Ranks:
    """Running ranks, each at the other end of a connection."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections

    def measure(self, act: str, count: int, calls: int) -> Callable[[], float]:
        """Return what calls an act some times and gives the microseconds of the slowest rank, median over calls.

        count: of float32 values, or what else the act is told.
        """

        def run() -> float:
            for connection in self._connections:
                connection.send((act, count, calls))
            by_rank = [connection.recv() for connection in self._connections]
            return statistics.median(map(max, zip(*by_rank))) * 1e6

        return run


@contextlib.contextmanager
def ranks(command: Sequence[str], folder: Path, world: int, largest: int = 0, **asked: object) -> Iterator[Ranks]:
    """Start the ranks of a peer: `world` processes that call `peers/orders.py`'s `serve`.

    largest: the most float32 values that an order will name. asked: what else `Run.asked` reads.
    """
    place = str(Path(tempfile.mkdtemp(dir=folder)) / "orders")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(world)
        with running(command, folder, orders=place, workers=world, largest=largest, **{"steps": 0, **asked}) as run:
            run.wait_for("connected", world)
            connections = [Connection(listener.accept()[0].detach()) for _ in range(world)]
            yield Ranks(connections)
            for connection in connections:
                connection.send(None)
            run.wait()


def mpi(python: str, world: int) -> tuple[str, list[str]]:
    """Find the MPI of an interpreter: its name and the command that starts its ranks, or why it has none."""
    beside = Path(python).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        return f"MPI, as there is no mpiexec beside {python} or on the PATH", []
    asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True)
    if asked.returncode:
        return f"MPI, as {python} has none: {asked.stderr.strip().splitlines()[-1]}", []
    name = next((name for begin, name in _LIBRARIES.items() if asked.stdout.startswith(begin)), asked.stdout.split()[0])
    many = [_MANY] if world > CORES else []
    return name, ["env", *_AS_ROOT, *many, mpiexec, "-n", str(world), python, *script("mpi_ranks.py")[1:]]
