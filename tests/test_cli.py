"""The command line, against a real cluster."""

from __future__ import annotations

import json

import pytest

from lepton_ray import DistributedTrainer
from lepton_ray.cli import main


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("warm", "status", "stop"))


@pytest.mark.slow
def test_warm_workers_are_what_the_next_job_uses(
    ray_cluster: None, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    assert main(["warm", "--workers", "2", "--minutes", "1"]) == 0
    assert "2 workers (1 CPU) are warm" in capsys.readouterr().out
    main(["status"])
    assert len(json.loads(capsys.readouterr().out)["warm"]) >= 2
    data = (torch.randn(32, 4), torch.randint(0, 2, (32,)))
    job = DistributedTrainer(torch.nn.Linear(4, 2), data, num_workers=2, name="warmed", storage=storage).submit()
    main(["status", "warmed"])
    assert json.loads(capsys.readouterr().out)["name"] == "warmed"
    admitted = next(record for record in job.events() if record["event"] == "admitted")
    assert admitted["reason"].startswith("2 warm and 0 new")
    job.wait()


@pytest.mark.slow
def test_stop_of_a_job_that_is_not_there_says_so(ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "nothing"]) == 2
    assert "no job named 'nothing'" in capsys.readouterr().err
