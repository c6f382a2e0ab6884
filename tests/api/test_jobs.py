"""The scripts in jobs/ run as they are, in a short form where they have one.

The others are run elsewhere: `listing_keras.py` by test_keras_api.py, `train_digits.py` by test_ray_job.py.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("script", "most"), [("minimal", 0.69), ("factory", 100.0)])
def test_short_scripts_train_and_print_metrics(
    script: str,
    most: float,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # runs are kept below
    runpy.run_path(str(JOBS / f"{script}.py"), run_name="__main__")
    metrics = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert 0 < metrics["test_loss"] < most  # with two classes, a model that knows nothing has 0.693


def test_text_is_learnt_from_a_file(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be. " * 1000)
    small = ["--steps", "30", "--batch", "8", "--features", "16", "--layers", "1", "--lr", "0.03"]
    monkeypatch.setattr(sys, "argv", ["train_text.py", "--data", str(text), "--storage", str(tmp_path), *small])
    runpy.run_path(str(JOBS / "train_text.py"), run_name="__main__")
    said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    assert float(said["Test loss"].split()[0]) < 4  # 8 bits say nothing
    assert Path(said["Run folder"].strip()).parent == tmp_path
