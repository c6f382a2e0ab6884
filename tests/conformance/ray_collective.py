"""Run Ray's own tests of its collective API on a backend: `python tests/conformance/ray_collective.py lepton FOLDER`.

FOLDER is python/ray/util/collective/tests of a checkout of Ray, whose wheel has no tests. Run are its tests of one node
without GPUs, and python/ray/tests/test_util_collective_gloo.py, which Ray's CI runs. Wherever they name GLOO, or leave
the backend out, the one asked for takes its place, in the driver and in every process of Ray. In a run of ours, GLOO is
not even registered: what passes was carried by us.

Tests are changed in nothing else, but one cluster serves all those of a file, where some files start one for each test.
Prints the tests that fail, those left out and why, and the counts. Each of some 180 tests starts two actors: this takes
a quarter of an hour and more on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

LEFT_OUT = {
    "test_two_groups_in_one_cluster": "it asks for the class of Ray's GLOO backend, and for a time limit kept in it",
}
NAMES = {"lepton": "LEPTON", "gloo": "GLOO"}
PACKAGE = "ray.util.collective.tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=list(NAMES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("-k", default="", metavar="TEXT", help="only tests that match this, as with pytest")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    files = sorted(folder.glob("single_node_cpu_tests/test_*.py"))
    top = folder.parents[2]
    files += top.glob("tests/test_util_collective_gloo.py")
    if not files:
        parser.error(f"{folder} has no tests. Give python/ray/util/collective/tests of a checkout of Ray.")

    def hook() -> None:  # Ray wants a function with a name
        put_in_place(asked.backend)

    hook()
    os.environ.pop("RAY_ADDRESS", None)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    start = ray.init

    def init(**options: Any) -> Any:
        # Made anew for each cluster, since Ray writes into it.
        runtime_env = {"worker_process_setup_hook": hook, "env_vars": dict(environment)}
        return start(address="local", include_dashboard=False, log_to_driver=False, runtime_env=runtime_env, **options)

    ray.init = init
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    provide_package(folder)

    plugin = Plugin(asked.backend)
    settings = ["-c", os.devnull, "--rootdir", str(top), "--noconftest", "--import-mode=importlib", "--timeout=180"]
    shown = ["-v", "-rf", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*settings, *shown, "-k", asked.k, *map(str, files)], [plugin])
    for name, reason in plugin.left_out:
        print(f"left out {name}: {reason}")
    counts = ", ".join(f"{plugin.outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed"))
    print(f"{asked.backend}: {counts}, {len(plugin.left_out)} left out")
    return int(code)


def put_in_place(backend: str) -> None:
    """Let a backend stand for Ray's own ones in this process: of the driver, or of Ray."""
    import ray.util.collective as collective
    from ray.util.collective.backend_registry import _global_registry
    from ray.util.collective.types import Backend

    assert collective.is_backend_available("GLOO"), "Ray registers it on import"
    if backend == "lepton":
        from lepton_ray.collective import register

        register()
        del _global_registry._map["GLOO"]
    Backend.GLOO = Backend.NCCL = NAMES[backend]


def provide_package(folder: Path) -> None:
    """Put the folder where the tests import their helpers from. Processes of Ray get those by value."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package


class Plugin:
    """Leaves tests out, counts, and has the fixtures that the tests take from two conftest.py of Ray."""

    def __init__(self, backend: str) -> None:
        self.outcomes: list[str] = []
        self.left_out: list[tuple[str, str]] = []
        self._leave_out = {} if backend == "gloo" else LEFT_OUT

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.left_out += [(item.name, self._leave_out[item.name]) for item in items if item.name in self._leave_out]
        items[:] = [item for item in items if item.name not in self._leave_out]
        for item in items:
            cloudpickle.register_pickle_by_value(item.module)
        if helpers := sys.modules.get(f"{PACKAGE}.cpu_util"):
            cloudpickle.register_pickle_by_value(helpers)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.outcomes.append("passed" if report.passed else "failed")

    @pytest.fixture(scope="module")
    def ray_start_single_node(self) -> Iterator[Any]:
        yield ray.init(num_cpus=8)
        ray.shutdown()

    @pytest.fixture(scope="module")
    def ray_start_regular_shared(self) -> Iterator[Any]:
        yield ray.init(num_cpus=1)
        ray.shutdown()

    @pytest.fixture
    def shutdown_only(self) -> Iterator[None]:
        ray.shutdown()  # of the fixtures before
        yield
        ray.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
