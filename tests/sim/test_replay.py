"""A run is replayed from its journal: the same orders, or the first that differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_ray.journal import Journal, read
from lepton_ray.plan import membership
from lepton_ray.plan.events import Run, Step
from lepton_ray.plan.record import began, remembered, told
from lepton_ray.sim import faults
from lepton_ray.sim.controller import Began
from lepton_ray.sim.replay import replay
from lepton_ray.sim.world import World
from lepton_ray.storage import Folder


def live(seed: int, folder: Path) -> tuple[World, list[dict[str, Any]]]:
    """Live a seed, write down in a journal what its controller was told and ordered, and read it."""
    world = World(faults.setting(seed), seed)
    faults.plan(world, seed)
    world.live(1000.0)
    journal = Journal(Folder(str(folder)))
    journal.append("header", name="something else")
    journal.append_many(
        began(what.how, what.arguments, orders) if isinstance(what, Began) else told(what, now_s, orders)
        for now_s, what, orders in world.controller.journal
    )
    journal.close()
    return world, read(Folder(str(folder)))


@pytest.mark.parametrize("seed", range(12))
def test_the_planner_orders_again_what_it_has_ordered(seed: int, tmp_path: Path):
    world, records = live(seed, tmp_path)
    assert replay(records) == []
    assert remembered(records) == world.controller.past


def test_some_of_these_lives_have_more_than_one_controller(tmp_path: Path):
    lives = [live(seed, tmp_path / str(seed))[1] for seed in range(12)]
    assert any(record.get("how") == "adopt" for records in lives for record in records)


def test_another_planner_is_told_where_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, records = live(0, tmp_path)
    real = membership._form

    def form(run: Run, *arguments: Any) -> Step:
        return real(replace(run, cause="because"), *arguments)

    monkeypatch.setattr(membership, "_form", form)
    differences = replay(records)
    assert differences
    assert "Ready: ordered" in differences[0]
    assert "because" in differences[0]


def test_a_journal_without_what_was_told_cannot_be_replayed():
    with pytest.raises(ValueError, match="nothing can be replayed"):
        replay([{"event": "header"}])
