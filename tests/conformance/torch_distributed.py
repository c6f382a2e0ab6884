"""Run torch's own tests of process groups on a backend: `python tests/conformance/torch_distributed.py lepton`.

The tests are those of the torch wheel (torch.testing._internal.distributed.distributed_test), read from its source with
the backend's name put where they ask for Gloo: what is left out for Gloo is what is left out here. Those of all-to-all
on CPUs, which ask for MPI, are run as well.

Prints one line for each test that fails, why others are skipped, and the counts. Takes some minutes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import types
import unittest
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("backend", choices=["lepton", "gloo"])
parser.add_argument("-k", default="", metavar="TEXT", help="only tests whose name holds this")
parser.add_argument("--world", type=int, default=3)
parser.add_argument("--verbose", action="store_true", help="name each test as it is run")
arguments = parser.parse_args()

# Read by the tests when they are imported.
os.environ["BACKEND"] = arguments.backend
os.environ["WORLD_SIZE"] = str(arguments.world)
os.environ["TEMP_DIR"] = tempfile.mkdtemp()
os.environ["INIT_METHOD"] = f"file://{os.environ['TEMP_DIR']}/shared_init_file"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # says nothing but errors
logging.disable(logging.WARNING)

import torch  # noqa: E402
import torch.multiprocessing  # noqa: E402
from torch.testing._internal.common_distributed import DistTestCases  # noqa: E402

import lepton_ray.collective.torch_backend  # noqa: E402, F401

SOURCE = "torch.testing._internal.distributed.distributed_test"
REPLACED = [
    ('BACKEND != "gloo"', 'BACKEND not in ("gloo", "lepton")'),
    ('BACKEND == "gloo"', 'BACKEND in ("gloo", "lepton")'),
    ('require_backend_is_available({"gloo"})', 'require_backend_is_available({"gloo", "lepton"})'),
    ('BACKEND != "mpi", "Only MPI supports', 'BACKEND not in ("mpi", "gloo", "lepton"), "Only MPI supports'),
]


def adapted() -> types.ModuleType:
    spec = find_spec(SOURCE)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    for old, new in REPLACED:
        assert old in text, f"torch {torch.__version__} has no {old!r} in its tests"
        text = text.replace(old, new)
    module = types.ModuleType("adapted_distributed_test")
    module.__file__ = spec.origin
    sys.modules[module.__name__] = module
    exec(compile(text, spec.origin, "exec", dont_inherit=True), module.__dict__)  # not our __future__
    return module


for feature in ("gpu", "cuda", "ddp", "subgroup", "plugin"):
    DistTestCases.backend_feature[feature].add("lepton")
tests = adapted()


class Conformance(tests.TestDistBackend, tests.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
    def setUp(self) -> None:
        super().setUp()
        # Forked, since importing torch takes longer than any test. This process has started no threads.
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


# torch.distributed.monitored_barrier refuses every other backend by its name, and these ask for Gloo's very words.
GLOO_ONLY = "test_monitored_barrier"


def main() -> int:
    names = [name for name in unittest.defaultTestLoader.getTestCaseNames(Conformance) if arguments.k in name]
    if arguments.backend != "gloo":
        left_out = [name for name in names if name.startswith(GLOO_ONLY)]
        names = [name for name in names if name not in left_out]
    suite = unittest.TestSuite(Conformance(name) for name in names)
    runner = unittest.TextTestRunner(verbosity=2 if arguments.verbose else 0, stream=sys.stdout)
    result = runner.run(suite)
    for reason, count in Counter(reason for _, reason in result.skipped).most_common():
        print(f"skipped {count:4d}: {reason}")
    if arguments.backend != "gloo":
        print(f"left out {len(left_out)}: {GLOO_ONLY}*, which is of Gloo alone")
    failed = sorted(test.id().rpartition(".")[2] for test, _ in result.failures + result.errors)
    for name in failed:
        print(f"FAILED {name}")
    passed = result.testsRun - len(result.skipped) - len(failed)
    print(f"{arguments.backend}: {passed} passed, {len(result.skipped)} skipped, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
