"""What the benchmarks share: interleaved rounds, facts about the machine, a table and one JSON line.

Peers and ours are measured in turns, in an order that turns with the round, so that a busy moment of the machine or a
warm cache falls on all of them. Figures are medians over rounds; ratios are taken round by round before their median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "ray", "numpy", "keras", "safetensors")


def arguments(doc: str, *, quick: str, parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.Namespace:
    """Read --rounds and --quick. doc: of the script. quick: what the short form does. parents: have further options."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0], parents=list(parents))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help=quick)
    return options.parse_args()


def interleave(rounds: int, methods: Mapping[str, Callable[[], float | None]]) -> dict[str, list[float]]:
    """Run every method once a round; return what each took or returned, by round.

    A method that returns a number has measured itself, in a unit of its own; of any other the seconds are taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            start = time.perf_counter()
            own = methods[name]()
            seconds[name].append(time.perf_counter() - start if own is None else own)
            print(f"  round {turn + 1}/{rounds}  {name}: {seconds[name][-1]:.4g}", file=sys.stderr, flush=True)
    return seconds


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of ours / peer, round by round."""
    return statistics.median(a / b for a, b in zip(ours, peer))


def machine() -> dict[str, object]:
    """Describe where and with what a figure was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def report(
    benchmark: str,
    ours: str,
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    targets: Mapping[str, float],
    **more: object,
) -> None:
    """Print a table, and the same as one JSON line (the last line).

    measured: what was measured -> method -> figures by round. ours: the method that the others are compared with.
    targets: what was aimed at -> what was found. more: further facts for the JSON line.
    """
    figures: dict[str, dict[str, dict[str, object]]] = {}
    for what, methods in measured.items():
        print(f"\n{what:<40}{'median':>12}{'least':>12}{'most':>12}{'ours/this':>11}")
        figures[what] = {}
        for name, seconds in methods.items():
            has_ratio = ours in methods and name != ours and min(seconds) > 0
            ratio = median_ratio(methods[ours], seconds) if has_ratio else None
            median = statistics.median(seconds)
            shown = "" if ratio is None else f"{ratio:.2f}"
            print(f"  {name:<38}{median:>12.4f}{min(seconds):>12.4f}{max(seconds):>12.4f}{shown:>11}")
            figures[what][name] = {"median": median, "rounds": list(seconds), "ours_to_this": ratio}
    print("\ntargets")
    for name, found in targets.items():
        print(f"  {name:<66}{found:>8.2f}")
    print()
    line = {"benchmark": benchmark, "ours": ours, "figures": figures, "targets": targets, **more, "machine": machine()}
    print(json.dumps(line))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
