"""The failure drill, as a user runs it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lepton_ray.cli import main
from lepton_ray.drill import FAULTS, drill, table


@pytest.mark.slow
def test_a_drill_shows_what_became_of_each_fault(ray_cluster: None, storage: str) -> None:
    faults = ["a worker is killed", "resized to one worker"]
    said: list[str] = []
    outcomes = drill(2, storage, faults, said.append)
    assert [each.fault for each in outcomes] == faults
    assert all(each.is_well and not each.redone for each in outcomes), outcomes
    assert all(0 <= each.detected_s <= each.recovered_s < 30 for each in outcomes if each.detected_s is not None)
    console = Console(width=130, record=True, file=io.StringIO())
    console.print(table(outcomes))
    shown = console.export_text()
    assert shown.count("the same") == 2
    assert shown.count("0 / 0") == 2


@pytest.mark.parametrize(
    ("asked", "found"), [(["--fault", "an earthquake"], next(iter(FAULTS))), (["--workers", "1"], "at least 2 workers")]
)
def test_a_drill_that_cannot_be_is_refused(
    asked: list[str], found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # so that what is set here is forgotten afterwards
    assert main(["drill", *asked]) == 2
    assert found in capsys.readouterr().err
