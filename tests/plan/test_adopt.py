"""A controller that comes back: it lets those train who do, settles what is broken, and orders again what got lost."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from lepton_ray.plan.adopt import At, Past, Word, adopt, recall
from lepton_ray.plan.events import (
    Abort,
    Ask,
    End,
    Event,
    Form,
    Formed,
    Granted,
    Left,
    Limits,
    Lost,
    Outcome,
    Phase,
    Ready,
    Release,
    ResizeAsked,
    Revoked,
    Run,
    Start,
    Step,
    Stop,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.membership import advance, begin
from lepton_ray.plan.recover import Position

LIMITS = Limits(admit_s=60, start_s=20, settle_s=2, retries=3)
JOB = Run(size=1, least=1, start=2, target=2, limits=LIMITS)
TO_TRAIN = [Granted(frozenset([0, 1])), Ready(0), Ready(1), Formed(0, 1, 0), Formed(1, 1, 0)]
AT_WORK = Word(at=At.JOINED, generation=1)
WHY = "it did not answer the controller that came back"


def at(committed: int) -> Position:
    return Position(committed=committed, ballot=(float(committed),))


def past(events: Iterable[Event]) -> Past:
    """Return what is on record after some events."""
    run, commands = begin(size=1, least=1, start=2, target=2, limits=LIMITS, now_s=0.0)
    found = recall(Past(), None, commands)
    for event in events:
        run, commands = advance(run, event, 0.0)
        found = recall(found, event, commands)
    return found


def come_back(events: Iterable[Event], words: dict[int, Word], held: Iterable[int] = (0, 1)) -> Step:
    return adopt(JOB, past(events), held=[*held], words=words, now_s=100.0)


def test_what_is_on_record_is_recalled():
    found = past([*TO_TRAIN, ResizeAsked(3, "more"), StopAsked("Ctrl-C")])
    assert found.form == Form(1, (0, 1), None, None, "")
    assert (found.trained, found.started, found.next_replica) == (1, {0, 1}, 3)
    assert (found.target, found.cancel_reason, found.end) == (3, "Ctrl-C", None)


def test_those_at_work_go_on_undisturbed():
    run, commands = come_back(TO_TRAIN, {0: AT_WORK, 1: AT_WORK})
    assert (run.phase, run.generation, run.members) == (Phase.TRAINING, 1, (0, 1))
    assert commands == [Train(1)]  # it may never have been given


def test_an_order_to_go_on_that_was_never_given_is_given_when_all_have_formed():
    run, commands = come_back(TO_TRAIN[:-1], {0: AT_WORK, 1: AT_WORK})
    assert (run.phase, commands) == (Phase.TRAINING, [Train(1)])


def test_who_has_left_meanwhile_is_settled_with():
    left = Word(at=At.LEFT, generation=1, position=at(7))
    run, commands = come_back(TO_TRAIN, {0: left, 1: AT_WORK})
    assert (run.phase, commands) == (Phase.SETTLING, [Abort(1, (1,))])
    run, (form,) = advance(run, Left(1, 1, at(7)), 100.0)
    assert isinstance(form, Form)
    assert (form.generation, form.members, form.settlement and form.settlement.committed) == (2, (0, 1), 7)


def test_who_died_meanwhile_is_lost_and_the_others_go_on():
    run, commands = come_back(TO_TRAIN, {0: AT_WORK})
    assert commands == [Abort(1, (0,)), Release(1, frozenset([1]), WHY), Ask(frozenset([2]))]
    run, (form,) = advance(run, Left(0, 1, at(7)), 100.0)
    assert isinstance(form, Form)
    assert form.members == (0,)


def test_a_generation_that_was_never_ordered_is_formed_under_the_next_number():
    events = [*TO_TRAIN, Left(0, 1, at(5)), Left(1, 1, at(5))]
    assert past(events).form == Form(2, (0, 1), past(events).form.settlement, {0: 0}, "")
    left = Word(at=At.LEFT, generation=1, position=at(5))
    _, commands = come_back(events, {0: left, 1: left})
    (form,) = commands
    assert isinstance(form, Form)
    assert (form.generation, form.sources, form.settlement and form.settlement.holders) == (3, {0: 0}, {0, 1})


def test_a_state_that_is_older_than_what_was_trained_is_of_no_use():
    events = [*TO_TRAIN, Lost(1, "silent"), Left(0, 1, at(5)), Formed(0, 2, 5)]
    old = Word(at=At.LEFT, generation=1, position=at(5))
    run, commands = come_back(events, {1: old})  # 0 has died; 1 was taken for dead, and is back
    assert Release(0, frozenset([0]), WHY) in commands
    assert commands[-1] == Form(3, (1,), None, None, "the controller came back")


def test_who_was_to_go_may_hold_what_the_others_have_lost():
    events = [*TO_TRAIN, Revoked(frozenset([1]), "spot"), Left(0, 1, at(5)), Left(1, 1, at(5))]
    assert past(events).form.members == (0,)
    _, commands = come_back(events, {1: Word(at=At.LEFT, generation=1, position=at(5))})
    form = next(command for command in commands if isinstance(command, Form))
    assert (form.sources, form.settlement and form.settlement.committed) == ({0: 1}, 5)


def test_a_run_whose_members_are_all_gone_begins_again():
    run, commands = come_back(TO_TRAIN, {})
    assert commands == [
        Release(0, frozenset([0]), WHY),
        Release(1, frozenset([1]), WHY),
        Ask(frozenset([2, 3])),
    ]
    assert (run.phase, run.deadline_s) == (Phase.WAITING, 100.0 + LIMITS.admit_s)


@pytest.mark.parametrize("is_started", [True, False])
def test_who_never_started_is_started_and_who_did_and_is_gone_is_lost(is_started: bool):
    events = [Granted(frozenset([0, 1]))] if is_started else []
    words = {0: Word(at=At.STARTING)} if is_started else {}
    _, commands = come_back(events, words)
    assert Start((0,)) in commands
    assert (Start((1,)) in commands) is not is_started
    assert (Release(1, frozenset([1]), WHY) in commands) is is_started


def test_who_became_ready_meanwhile_is_taken():
    ready = Word(at=At.READY)
    _, commands = come_back([Granted(frozenset([0, 1]))], {0: ready, 1: ready})
    assert commands == [Form(1, (0, 1), None, None, "")]


def test_the_end_of_the_training_counts_although_nobody_heard_it():
    end = Word(at=At.LEFT, generation=1, position=at(9), is_end=True)
    run, commands = come_back(TO_TRAIN, {0: end, 1: end})
    assert commands == [Train(1), End(Outcome.FINISHED, None, None)]


def test_what_was_asked_before_still_counts():
    _, commands = come_back([*TO_TRAIN, StopAsked("Ctrl-C")], {0: AT_WORK, 1: AT_WORK})
    assert commands == [Train(1), Stop(1, "Ctrl-C")]
    run, commands = come_back([*TO_TRAIN, ResizeAsked(3, "more")], {0: AT_WORK, 1: AT_WORK})
    assert (run.target, commands) == (3, [Train(1), Ask(frozenset([3]))])


def test_an_end_that_is_on_record_is_ordered_again():
    events = [*TO_TRAIN, Left(0, 1, at(9), is_end=True), Left(1, 1, at(9), is_end=True)]
    run, commands = come_back(events, {})
    assert (run.phase, run.outcome, commands) == (Phase.ENDED, Outcome.FINISHED, [End(Outcome.FINISHED, None, None)])
    assert advance(run, Tick(), 200.0) == (run, [])
