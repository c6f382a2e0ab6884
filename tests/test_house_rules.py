"""The rules of the house that a reader should not have to watch: layers, purity, public names, types, style."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

from lepton_ray import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lepton_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE = 450
RAY_SHELLS = {"cluster", "job.py", "trainer.py", "cli.py"}  # the layers from cluster up

PUBLIC_NAMES = {
    "Batch",
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "ConfigError",
    "DistributedTrainer",
    "EarlyStopping",
    "Elastic",
    "Faults",
    "Job",
    "LeptonError",
    "OuterSGD",
    "Parallel",
    "PeerLost",
    "PerEpoch",
    "Resources",
    "Result",
    "RunCancelled",
    "RunFailed",
    "Sync",
    "TensorBoard",
    "WaitTimeout",
    "WorkerFailed",
    "attach",
}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's folder, with nothing of the caller's Ray or Keras settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "KERAS_"))}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


def relative(module: Path) -> str:
    return str(module.relative_to(ROOT))


def module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements that run on import."""
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_types:
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from module_level(node)


def imported(statements: Iterator[ast.AST]) -> set[str]:
    """Return the full names of the modules that the statements import."""
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


# --- layers and purity ------------------------------------------------------------------------------------------------


def test_imports_keep_to_the_layers():
    done = python("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", sorted((PACKAGE / "plan").glob("*.py")), ids=relative)
def test_plans_are_pure(module):
    names = imported(ast.walk(ast.parse(module.read_text())))
    roots = {name.partition(".")[0] for name in names}
    assert roots <= {*sys.stdlib_module_names, "lepton_ray"}
    assert not roots & {"time", "datetime", "random", "secrets", "os", "pathlib", "logging", "threading", "subprocess"}


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_ray_is_imported_by_its_shells_only(module):
    if module.relative_to(PACKAGE).parts[0] in RAY_SHELLS or module == PACKAGE / "collective" / "ray_group.py":
        return
    names = imported(module_level(ast.parse(module.read_text())))
    assert not {name for name in names if name.partition(".")[0] == "ray"}


# --- the package from outside -----------------------------------------------------------------------------------------


def test_public_names_are_these():
    import lepton_ray

    assert set(lepton_ray.__all__) == PUBLIC_NAMES
    assert len(lepton_ray.__all__) == len(PUBLIC_NAMES)
    assert set(lepton_ray.__all__) <= set(dir(lepton_ray))
    for name in lepton_ray.__all__:
        assert getattr(lepton_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(lepton_ray, "no_such_name")  # noqa: B009 - the lazy lookup is what is tested


def test_import_is_quick_and_loads_neither_torch_nor_ray():
    code = (
        "import json, sys, time; start_s = time.perf_counter(); import lepton_ray; end_s = time.perf_counter();"
        "print(json.dumps([end_s - start_s, sorted({'torch', 'ray', 'keras', 'numpy'} & {*sys.modules})]))"
    )
    runs = []
    for _ in range(3):
        done = python("-c", code)
        assert done.returncode == 0, done.stderr
        took_s, heavy = json.loads(done.stdout)
        assert heavy == []
        runs.append(took_s)
    assert statistics.median(runs) < 0.3


ERRORS = sorted(
    (
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, BaseException) and kind.__module__ == errors.__name__
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind):
    fields = {"rank": 3, "step": 17, "worker_traceback": "Traceback: here"} if kind is errors.WorkerFailed else {}
    before = kind("batch=3 cannot feed 4 workers", **fields)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == str(before)
    assert vars(after) == vars(before) == fields


def test_all_errors_are_one_tree():
    assert all(issubclass(kind, errors.LeptonError) for kind in ERRORS)
    assert {kind.__name__ for kind in ERRORS} <= PUBLIC_NAMES


# --- style and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [("check", "--no-cache"), ("format", "--check", "--no-cache")], ids=lambda args: args[0]
)
def test_ruff_is_content(args):
    done = python("-m", "ruff", *args, ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_is_content():
    done = python("-m", "mypy")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_module_is_short_and_says_what_it_does(module):
    text = module.read_text()
    assert len(text.splitlines()) < LONGEST_MODULE
    assert not text or ast.get_docstring(ast.parse(text))


# --- around the package -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["train_digits", "train_text"])
def test_jobs_explain_themselves(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    for option in ("--workers", "--epochs", "--batch", "--seed", "--name", "--storage", "--precision"):
        assert option in shown


def test_cluster_yaml_fits_the_schema_of_ray():
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "cluster.yaml").read_text()), schema)
