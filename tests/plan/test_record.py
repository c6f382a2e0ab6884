"""Every event and every command survives a journal."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from lepton_ray.plan.events import (
    Abort,
    Ask,
    Broke,
    Command,
    Committed,
    End,
    Event,
    Failure,
    Form,
    Formed,
    Granted,
    Left,
    Lost,
    Outcome,
    Pause,
    Ready,
    Refused,
    Release,
    ResizeAsked,
    Revoked,
    Start,
    Stop,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.record import plain, revived
from lepton_ray.plan.recover import Position, Settlement

MISTAKE = Failure(message="ValueError: bad", rank=1, step=3, traceback="Traceback ...")
WHERE = Position(committed=5, is_reduced=True, ballot=(0.1, float("inf"), -0.0))
SETTLED = Settlement(committed=5, holders=frozenset([1, 2]), forward=frozenset([2]), ballot=(0.1,), reason="so")
VALUES: list[Event | Command] = [
    Granted(frozenset([3, 1])),
    Refused("no room"),
    Ready(2),
    Formed(2, 1, 5),
    Committed(4),
    Left(1, 2, WHERE, MISTAKE, suspect=3),
    Left(1, 2, None, is_end=True),
    Lost(1, "it died", MISTAKE),
    Lost(1, "it died"),
    ResizeAsked(3, "more"),
    Revoked(frozenset([1]), "spot"),
    StopAsked("Ctrl-C"),
    Broke(MISTAKE),
    Tick(),
    Ask(frozenset()),
    Start((2, 3)),
    Form(2, (1, 2), SETTLED, {0: 1, 1: 2}, "it died"),
    Form(1, (0,), None, None, ""),
    Train(1),
    Pause(1),
    Abort(1, (0, 2)),
    Release(2, frozenset([5]), "it died"),
    Stop(1, "Ctrl-C"),
    End(Outcome.FAILED, MISTAKE, None),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_it_comes_back_as_it_was(value: Any):
    assert revived(json.loads(json.dumps(plain(value)))) == value


def test_no_kind_is_missing_here():
    assert {type(value) for value in VALUES} == {*get_args(Event), *get_args(Command)}
