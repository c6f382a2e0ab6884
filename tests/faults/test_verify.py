"""`lepton_ray verify`: a whole run passes, and whatever was done to its journal or its model shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lepton_ray import ConfigError
from lepton_ray.cli import main
from lepton_ray.verify import verify
from tests.train.test_loop import live

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has ended."""
    storage = str(tmp_path_factory.mktemp("whole"))
    live(storage, "run", num_workers=1)
    folder = Path(storage, "run")
    _change(folder, _form)
    return folder


def _form(records: Records) -> None:
    """Add what a controller writes, which this run had none of."""
    records.insert(1, {"event": "generation", "generation": 1, "workers": [0], "cause": ""})


def _change(folder: Path, change: Callable[[Records], None]) -> None:
    paths = sorted(folder.glob("journal-*.jsonl"))
    records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    change(records)
    for path in paths[1:]:
        path.unlink()
    paths[0].write_text("".join(json.dumps(record) + "\n" for record in records))


def _steps(records: Records) -> Records:
    return [record for record in records if record["event"] == "step"]


def _delete(records: Records) -> None:
    records.remove(_steps(records)[3])


def _double(records: Records) -> None:
    records.append(_steps(records)[3])


def _less(records: Records) -> None:
    _steps(records)[3]["work"][0][0] -= 1


def _more(records: Records) -> None:
    _steps(records)[3]["work"][0][0] *= 2


def _others(records: Records) -> None:
    _steps(records)[3]["work"][0][1] ^= 1


def _epoch(records: Records) -> None:
    _steps(records)[3]["epoch"] += 1


def _cut(records: Records) -> None:
    _steps(records)[3]["work"].pop()


def _generation(records: Records) -> None:
    _steps(records)[3]["generation"] += 1


def _end(records: Records) -> None:
    next(record for record in records if record["event"] == "trained")["sha256"] = "0" * 64


def test_a_whole_run_passes(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(whole))[0] == []
    assert main(["verify", str(whole)]) == 0
    assert "every sample was used exactly once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_delete, "step 3 is not on record"),
        (_double, "step 3 is on record 2 times"),
        (_less, "1 samples lost"),
        (_more, "samples repeated"),
        (_others, "other samples than its own"),
        (_epoch, "is on record in epoch 1"),
        (_cut, "microbatches instead of"),
        (_generation, "generation"),
        (_end, "trained weights have the sha256"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_whatever_was_altered_shows(
    change: Callable[[Records], None], found: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    _change(folder, change)
    problems, _ = verify(str(folder))
    assert any(found in problem for problem in problems), problems
    assert main(["verify", str(folder)]) == 1
    assert "problems" in capsys.readouterr().out


def test_an_altered_model_shows(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "the trained weights have" in verify(str(folder))[0][0]


def test_a_folder_without_a_run_is_refused(storage: str) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        verify(storage)
