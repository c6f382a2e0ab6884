"""Ranks of whatever MPI their mpiexec belongs to, through mpi4py."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import orders
from mpi4py import MPI
from workload import Run

if __name__ == "__main__":
    ranks = MPI.COMM_WORLD
    values = np.frombuffer(mmap.mmap(-1, 4 * orders.largest()), np.float32)  # begins on a page
    values.fill(0)

    def all_reduce(count: int) -> Any:
        buffer = [values[:count], MPI.FLOAT]
        return lambda: ranks.Allreduce(MPI.IN_PLACE, buffer)

    orders.serve(Run.asked(), orders.place(), {"private": all_reduce}, ranks.Barrier)
