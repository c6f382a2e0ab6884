"""The life of a run: total, bounded in time, and with the right members, whoever comes, goes, fails or is silent."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_ray.plan.events import (
    BETWEEN,
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
    Limits,
    Lost,
    Outcome,
    Pause,
    Phase,
    Ready,
    Refused,
    Release,
    ResizeAsked,
    Revoked,
    Run,
    Start,
    Stop,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.membership import GATHER_S, LAST_WORDS_S, MISSTART_S, REFUSED_S, STOP_GRACE_S, advance, begin
from lepton_ray.plan.recover import Position, workers_of
from lepton_ray.plan.replicas import able, awaited, crew, needed, staying

LIMITS = Limits(admit_s=60, start_s=20, settle_s=2, retries=3)
ECHO = Failure(message="worker 1 went away", is_echo=True)
MISTAKE = Failure(message="ValueError: bad", rank=1, step=3, traceback="Traceback ...")


def at(committed: int, is_reduced: bool = False) -> Position:
    return Position(committed=committed, is_reduced=is_reduced, ballot=(float(committed),))


class Play:
    """A run, what it ordered, and what must hold after each event."""

    def __init__(self, target: int = 2, size: int = 1, least: int = 1, start: int = 0, limits: Limits = LIMITS) -> None:
        self.now_s = 0.0
        self.size = size
        self.held: set[int] = set()
        self.lost: set[int] = set()
        self.generations = [0]
        self.ends = 0
        self.all: list[Command] = []
        run, commands = begin(size=size, least=least, start=start or target, target=target, limits=limits, now_s=0.0)
        self.run: Run = run
        self.last: list[Command] = []
        self._check(None, commands)

    def copy(self) -> Play:
        """Return another play that goes on from here."""
        other = copy(self)
        other.held, other.lost, other.generations, other.all = (
            {*self.held},
            {*self.lost},
            [*self.generations],
            [*self.all],
        )
        return other

    def tell(self, *events: Event) -> list[Command]:
        """Tell events; return the commands of the last one."""
        for event in events:
            was_over = self.run.phase is Phase.ENDED
            if isinstance(event, Lost):
                self.lost.add(event.worker)
            if isinstance(event, Granted):
                self.held |= event.replicas
            self.run, commands = advance(self.run, event, self.now_s)
            assert not (was_over and commands)
            self._check(event, commands)
        return self.last

    def _check(self, event: Event | None, commands: list[Command]) -> None:
        run = self.run
        for command in commands:
            match command:
                case Release(number, _, _):
                    assert number in self.held, "it is released twice, or never was held"
                    assert number not in run.replicas
                    self.held.remove(number)
                case Form(generation, members, _, sources, _):
                    assert generation == run.generation > max(self.generations)
                    self.generations.append(generation)
                    assert len({*members}) == len(members) > 0
                    assert len({worker // self.size for worker in members}) * self.size == len(members)
                    assert self.lost.isdisjoint({*members, *(sources or {}).values()})
                case Abort(generation, workers):
                    assert generation == run.generation
                    assert self.lost.isdisjoint(workers)
                    assert workers
                case Train(generation) | Pause(generation) | Stop(generation):
                    assert generation == run.generation
                case Start(workers):
                    assert workers[0] // self.size in self.held
        assert {*run.replicas} <= self.held
        assert run.asked.isdisjoint(run.replicas)
        assert len(staying(run)) + len(run.asked) <= run.target
        self.ends += sum(isinstance(command, End) for command in commands)
        assert self.ends == (run.phase is Phase.ENDED) == (run.outcome is not None)
        if run.phase not in (Phase.TRAINING, Phase.PAUSING, Phase.STARTING, Phase.ENDED):
            assert run.deadline_s is not None, f"{run.phase} waits for ever"
        assert bool(awaited(run)) is (run.phase not in (Phase.TRAINING, Phase.ENDED))
        if run.phase in BETWEEN:
            assert len(able(run)) < needed(run)
            assert (run.phase is Phase.STARTING) == (len(staying(run)) >= needed(run))
            assert not crew(run)
        elif run.phase is not Phase.ENDED:
            assert not run.done.issuperset(crew(run)), "all have answered, and nothing happens"
        self.last = commands
        self.all += commands

    # --- what a cluster that obeys would say ---

    def wait(self, time_s: float) -> list[Command]:
        """Let time pass, half a second by half a second; return all commands."""
        found = []
        for _ in range(round(2 * time_s)):
            self.now_s += 0.5
            found += self.tell(Tick())
        return found

    def grant(self) -> None:
        self.tell(Granted(self.run.asked))

    def ready(self, *numbers: int) -> None:
        for number in numbers or sorted(self.run.replicas):
            self.tell(*(Ready(worker) for worker in workers_of(number, self.size)))

    def formed(self, committed: int = 0) -> None:
        self.tell(*(Formed(worker, self.run.generation, committed) for worker in crew(self.run)))

    def left(self, *workers: int, committed: int = 5, **fields: Any) -> None:
        for worker in workers or crew(self.run):
            self.tell(Left(worker, self.run.generation, at(committed), **fields))

    def echo(self, *workers: int, committed: int = 5) -> None:
        self.left(*workers, committed=committed, failure=ECHO)

    def train(self) -> Play:
        """Come to train from the beginning."""
        self.grant()
        self.ready()
        self.formed()
        assert self.run.phase is Phase.TRAINING
        return self

    @property
    def form(self) -> Form:
        return next(command for command in reversed(self.all) if isinstance(command, Form))

    @property
    def end(self) -> End:
        return next(command for command in self.all if isinstance(command, End))


def reach(phase: Phase, **settings: Any) -> Play:
    """Return a play in a phase; this is the table of the ways into each."""
    play = Play(**settings)
    match phase:
        case Phase.WAITING:
            pass
        case Phase.STARTING:
            play.grant()
        case Phase.FORMING:
            play.grant()
            play.ready()
        case Phase.TRAINING:
            play.train()
        case Phase.PAUSING:
            play.train().tell(ResizeAsked(1, "fewer"))
        case Phase.SETTLING:
            play.train().echo(0)
        case Phase.STOPPING:
            play.train().tell(StopAsked("Ctrl-C"))
        case Phase.ENDED:
            play.train().left(is_end=True)
    return play


EVENTS: list[Event] = [
    Granted(frozenset([0, 7])),
    Refused("no room"),
    Ready(0),
    Ready(99),
    Formed(0, 1, 0),
    Formed(0, 0, 0),
    Committed(1),
    Left(0, 1, at(5)),
    Left(0, 1, None, ECHO),
    Left(1, 1, at(5, is_reduced=True), MISTAKE),
    Left(0, 1, at(5), is_end=True),
    Left(0, 0, at(5), ECHO),
    Lost(0, "it died"),
    Lost(1, "it cannot import", MISTAKE),
    Lost(99, "nobody"),
    ResizeAsked(1, "fewer"),
    ResizeAsked(4, "more"),
    Revoked(frozenset([0]), "spot"),
    Revoked(frozenset([0, 1, 99]), "spot"),
    StopAsked("Ctrl-C"),
    Broke(MISTAKE),
    Tick(),
]


# --- every phase ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", list(Phase))
def test_the_ways_into_each_phase_are_as_named(phase: Phase):
    assert reach(phase).run.phase is phase


def test_no_kind_of_event_is_missing_here():
    assert {type(event) for event in EVENTS} == {*get_args(Event)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("phase", list(Phase))
def test_every_event_is_defined_in_every_phase_and_so_is_every_second_one(phase: Phase, size: int):
    beginning = reach(phase, size=size)
    for first in EVENTS:
        play = beginning.copy()
        play.tell(first)
        for second in EVENTS:
            play.copy().tell(second)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])
@pytest.mark.parametrize("event", [Broke(MISTAKE), StopAsked("Ctrl-C")])
def test_a_broken_controller_or_a_stop_ends_a_run_from_every_phase(phase: Phase, event: Event):
    play = reach(phase)
    play.tell(event)
    is_stop = isinstance(event, StopAsked)
    if is_stop and phase in (Phase.TRAINING, Phase.PAUSING, Phase.STOPPING):
        assert play.run.phase is Phase.STOPPING
        play.left(is_end=True)
    if is_stop and phase is Phase.SETTLING:  # it goes on only to write the last checkpoint
        play.left()
        play.formed()
        assert play.last == [Train(2), Stop(2, "Ctrl-C")]
        play.left(is_end=True)
    assert play.end == End(Outcome.CANCELLED, None, "Ctrl-C") if is_stop else End(Outcome.FAILED, MISTAKE, None)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])
def test_whatever_is_awaited_in_vain_has_an_end(phase: Phase):
    """Nobody answers any more; those at work are watched by others, so they are told as lost."""
    play = reach(phase)
    for _ in range(30):
        if play.run.phase in (Phase.TRAINING, Phase.PAUSING):
            play.tell(*(Lost(worker, "silent") for worker in crew(play.run)))
        play.wait(30)
    assert play.run.phase is Phase.ENDED
    if play.end.outcome is Outcome.FAILED:
        assert play.end.failure is not None
        assert "(Faults." in play.end.failure.message


# --- a run without trouble --------------------------------------------------------------------------------------------


def test_a_run_without_trouble_goes_through_its_phases():
    play = Play()
    assert play.last == [Ask(frozenset([0, 1]))]
    assert play.tell(Granted(frozenset([0]))) == [Start((0,))]
    assert play.run.phase is Phase.WAITING
    assert play.tell(Granted(frozenset([1]))) == [Start((1,))]
    assert play.run.phase is Phase.STARTING
    play.tell(Ready(1))
    assert play.tell(Ready(0)) == [Form(1, (0, 1), None, None, "")]
    play.tell(Formed(1, 1, 0))
    assert play.tell(Formed(0, 1, 0)) == [Train(1)]
    play.left(1, is_end=True)
    assert play.tell(Left(0, 1, at(9), is_end=True)) == [End(Outcome.FINISHED, None, None)]


def test_what_is_awaited_is_said():
    play = Play()
    assert awaited(play.run) == "the scheduler has not given replicas [0, 1]"
    play.tell(Granted(frozenset([0])))
    assert awaited(play.run) == "the scheduler has not given replicas [1] and replicas [0] are starting"
    play.grant()
    play.ready()
    play.tell(Formed(1, 1, 0))
    assert awaited(play.run) == "workers [0] have not answered"


def test_replicas_of_two_are_ready_and_members_as_a_whole():
    play = Play(size=2)
    assert play.tell(Granted(frozenset([0, 1]))) == [Start((0, 1)), Start((2, 3))]
    play.tell(Ready(0), Ready(2), Ready(3))
    assert play.run.phase is Phase.STARTING
    assert play.tell(Ready(1)) == [Form(1, (0, 1, 2, 3), None, None, "")]


def test_a_run_may_begin_with_fewer_than_it_wants():
    play = Play(target=4, start=2, least=1)
    play.tell(Granted(frozenset([0, 1])))
    play.ready(0, 1)
    assert play.form.members == (0, 1)
    play.formed()
    play.grant()
    play.ready(2)
    assert play.run.phase is Phase.TRAINING  # 3 is about to come
    assert play.wait(GATHER_S) == [Pause(1)]
    play.left(0)
    play.ready(3)
    play.left(1)
    assert play.form == Form(2, (0, 1, 2, 3), play.form.settlement, {0: 0}, "1 replicas join, 0 leave")


def test_who_finished_is_what_counts_when_the_others_see_rank_0_go():
    play = reach(Phase.TRAINING)
    play.left(0, is_end=True)
    play.echo(1)
    assert play.end.outcome is Outcome.FINISHED


def test_rank_0_has_the_time_that_it_needs_to_write_the_model():
    play = reach(Phase.TRAINING)
    play.left(1, is_end=True)
    assert play.wait(60) == []
    play.left(0, is_end=True)
    assert play.end.outcome is Outcome.FINISHED


def test_the_model_is_written_by_another_when_rank_0_dies_at_the_end():
    play = reach(Phase.TRAINING)
    play.left(1, committed=9, is_end=True)
    play.tell(Lost(0, "it died"))
    assert play.form.members == (1,)
    assert play.form.settlement is not None
    assert play.form.settlement.committed == 9


# --- resize and revoke ------------------------------------------------------------------------------------------------


def test_a_run_grows_in_one_pause():
    play = reach(Phase.TRAINING)
    assert play.tell(ResizeAsked(4, "more")) == [Ask(frozenset([2, 3]))]
    play.grant()
    assert play.run.phase is Phase.TRAINING
    play.ready(2, 3)
    assert play.last == [Pause(1)]
    play.left(committed=7)
    assert (play.form.members, play.form.sources) == ((0, 1, 2, 3), {0: 0})
    assert play.form.settlement is not None
    assert (play.form.settlement.committed, play.form.settlement.holders) == (7, {0, 1})
    play.formed(7)
    assert play.last == [Train(2)]
    assert play.run.failed == 0


def test_a_run_shrinks_and_lets_go_when_the_others_are_at_work():
    play = reach(Phase.TRAINING, target=3)
    assert play.tell(ResizeAsked(1, "fewer")) == [Pause(1)]
    play.left()
    assert play.form.members == (0,)
    play.formed()
    assert play.last[1:] == [Release(n, frozenset(), "it is not needed any more") for n in (1, 2)]


def test_a_resize_that_is_taken_back_in_time_changes_nothing():
    play = reach(Phase.PAUSING)
    play.tell(ResizeAsked(2, "no, more"))
    play.left()
    assert play.form.members == (0, 1)
    assert not play.run.asked


def test_a_resize_never_goes_below_the_least():
    play = reach(Phase.TRAINING, least=2)
    assert play.tell(ResizeAsked(1, "fewer")) == []
    assert play.run.target == 2


def test_fewer_are_enough_when_fewer_are_wanted_before_the_beginning():
    play = Play(target=3)
    play.tell(Granted(frozenset([0])), ResizeAsked(1, "fewer"))
    assert play.run.phase is Phase.STARTING
    play.ready(0)
    assert play.form.members == (0,)


def test_what_is_granted_and_not_wanted_any_more_goes_back():
    play = Play(target=3)
    play.tell(Granted(frozenset([0])))
    assert play.tell(ResizeAsked(1, "fewer"))[0] == Ask(frozenset())
    assert play.tell(Granted(frozenset([1]))) == [Release(1, frozenset(), "it is not wanted any more")]


def test_a_newcomer_that_is_not_wanted_any_more_goes_back_at_once():
    play = reach(Phase.TRAINING)
    play.tell(ResizeAsked(3, "more"))
    play.grant()
    assert play.tell(ResizeAsked(2, "fewer")) == [Release(2, frozenset(), "fewer")]


def test_a_revoked_replica_is_replaced():
    play = reach(Phase.TRAINING)
    assert play.tell(Revoked(frozenset([0]), "spot")) == [Ask(frozenset([2])), Pause(1)]
    play.left()
    assert (play.form.members, play.form.sources) == ((1,), {0: 1})
    play.formed()
    assert Release(0, frozenset(), "it is not needed any more") in play.last


def test_a_revoked_replica_trains_on_while_the_others_are_too_few():
    play = reach(Phase.TRAINING, target=1)
    assert play.tell(Revoked(frozenset([0]), "spot")) == [Ask(frozenset([1]))]
    play.grant()
    play.ready(1)
    assert play.last == [Pause(1)]
    play.left()
    assert (play.form.members, play.form.sources) == ((1,), {0: 0})
    assert play.tell(Formed(1, 2, 5)) == []  # 0 has part in it: it gives its state
    assert play.tell(Formed(0, 2, 5))[:2] == [Train(2), Release(0, frozenset(), "it is not needed any more")]


def test_a_refusal_ends_a_run_that_lacks_replicas_and_no_other():
    play = Play()
    play.tell(Granted(frozenset([0])))
    assert play.tell(Refused("no room"))[0] == End(Outcome.FAILED, Failure(message="no room"), None)
    play = reach(Phase.TRAINING)
    play.tell(ResizeAsked(3, "more"), Refused("no room"))
    assert play.wait(REFUSED_S - 0.5) == []
    assert play.wait(0.5) == [Ask(frozenset([3]))]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_survivors_go_on_at_once_with_fewer():
    play = reach(Phase.TRAINING, target=3)
    play.tell(Left(2, 1, at(5, is_reduced=True), ECHO))
    assert play.last == [Abort(1, (0, 1))]
    play.tell(Lost(1, "it died"))
    assert play.last == [Release(1, frozenset([1]), "it died"), Ask(frozenset([3]))]
    (form,) = play.tell(Left(0, 1, at(6), ECHO))
    assert isinstance(form, Form)
    assert (form.generation, form.members, form.cause) == (2, (0, 2), ECHO.message)
    assert form.settlement is not None
    assert (form.settlement.committed, form.settlement.forward) == (6, {2})


def test_an_echo_without_a_death_forms_the_same_again():
    play = reach(Phase.TRAINING)
    play.echo(0)
    assert play.run.phase is Phase.SETTLING
    play.echo(1)
    assert play.form.members == (0, 1)


def test_who_does_not_answer_is_taken_for_lost():
    play = reach(Phase.SETTLING)
    assert play.wait(LIMITS.settle_s - 0.5) == []
    commands = play.wait(0.5)
    assert [type(command) for command in commands] == [Release, Ask, Form]
    assert commands[0] == Release(1, frozenset([1]), "workers [1] did not answer within 2 s")
    assert play.form.members == (0,)
    assert play.tell(Left(1, 1, at(9), ECHO)) == []  # back from the dead
    assert play.tell(Formed(1, 2, 5)) == []


def test_what_comes_of_an_old_generation_does_not_count():
    play = reach(Phase.TRAINING)
    play.echo()
    before = play.run
    play.tell(Left(0, 1, at(3), MISTAKE), Formed(1, 1, 0), Left(1, 1, at(8), is_end=True), Committed(1))
    assert play.run == before


def test_a_broken_replica_gives_its_state_when_it_alone_holds_it():
    play = reach(Phase.TRAINING, size=2)
    play.tell(Lost(0, "it died"), Lost(3, "it died"))
    assert play.run.phase is Phase.SETTLING
    play.echo(1, 2)
    assert play.run.phase is Phase.WAITING
    assert {*play.run.replicas} == {0, 1}
    play.grant()
    play.ready(2)
    assert (play.form.members, play.form.sources) == ((4, 5), {0: 2, 1: 1})
    play.formed()
    assert [command for command in play.last if isinstance(command, Release)] == [
        Release(0, frozenset([0]), "it is not needed any more"),
        Release(1, frozenset([3]), "it is not needed any more"),
    ]


def test_a_broken_replica_gives_its_place_back_when_others_hold_its_state():
    play = reach(Phase.TRAINING, size=2, least=2)
    play.tell(Lost(0, "it died"))
    play.echo()
    assert play.run.phase is Phase.WAITING
    assert Release(0, frozenset([0]), "it is not needed any more") in play.last
    assert {*play.run.replicas} == {1}


def test_a_replica_that_is_kept_for_its_state_keeps_all_of_it_and_a_whole_one_is_preferred():
    play = reach(Phase.TRAINING, size=2, least=2)
    play.tell(Revoked(frozenset([1]), "spot"), Lost(0, "it died"))
    play.echo()
    assert Release(0, frozenset([0]), "it is not needed any more") in play.last
    assert {*play.run.positions} == {2, 3}
    play.grant()
    play.ready(2, 3)
    assert (play.form.members, play.form.sources) == ((4, 5, 6, 7), {0: 2, 1: 3})


def test_a_ballot_known_to_the_controller_outlives_the_one_who_told_it():
    play = reach(Phase.TRAINING, size=2, least=2)
    play.tell(Lost(0, "it died"))
    play.tell(*(Left(worker, 1, at(5, is_reduced=True), ECHO) for worker in (2, 3)), Left(1, 1, at(6), ECHO))
    assert {*play.run.replicas} == {1}
    play.grant()
    play.ready(2, 3)
    assert play.form.settlement is not None
    assert (play.form.settlement.committed, play.form.settlement.forward) == (6, {2, 3})
    assert play.form.sources == {0: 2, 1: 3}


def test_the_place_of_what_is_lent_is_given_up_when_there_is_no_other():
    play = reach(Phase.TRAINING, size=2)
    play.tell(Lost(0, "it died"), Lost(3, "it died"))
    play.echo(1, 2)
    assert [type(command) for command in play.wait(LIMITS.admit_s)] == [Release, Release]
    assert play.wait(LIMITS.admit_s - 0.5) == []
    play.grant()
    play.ready()
    assert (play.form.settlement, play.form.sources) == (None, None)


def test_all_load_the_checkpoint_when_a_coordinate_is_lost():
    play = reach(Phase.TRAINING, size=2, target=1)
    play.tell(Lost(0, "it died"))
    play.echo(1)
    play.grant()
    play.ready()
    assert (play.form.members, play.form.settlement, play.form.sources) == ((2, 3), None, None)


def test_a_lender_that_dies_breaks_the_forming():
    play = reach(Phase.TRAINING, target=1)
    play.tell(Revoked(frozenset([0]), "spot"))
    play.grant()
    play.ready(1)
    play.left()
    assert play.run.lenders == {0}
    assert play.tell(Lost(0, "it died"))[0] == Abort(2, (1,))
    play.tell(Left(1, 2, None, ECHO))
    assert play.form == Form(3, (1,), None, None, "it died")


def test_who_was_to_go_may_be_the_last_to_hold_the_state():
    play = reach(Phase.PAUSING)
    play.left(committed=7)
    assert play.form.members == (0,)
    play.tell(Lost(0, "it died"))
    assert play.run.phase in (Phase.FORMING, Phase.WAITING)
    play.grant()
    play.ready()
    assert play.form.settlement is not None
    assert play.form.settlement.committed == 7
    assert play.form.sources == {0: 1}


@pytest.mark.parametrize("phase", [Phase.FORMING, Phase.PAUSING, Phase.SETTLING, Phase.STOPPING])
def test_a_worker_may_be_lost_in_every_phase(phase: Phase):
    play = reach(phase, target=3)
    play.tell(Lost(2, "it died"))
    assert play.run.phase is Phase.SETTLING
    play.left()
    if phase is Phase.FORMING:  # it has not begun, and begins with three
        assert (play.run.phase, play.run.asked) == (Phase.WAITING, {3})
        return
    assert play.form.members == ((0,) if phase is Phase.PAUSING else (0, 1))
    play.formed()
    assert play.run.phase is (Phase.STOPPING if phase is Phase.STOPPING else Phase.TRAINING)


def test_those_who_formed_leave_again_when_another_fails_to():
    play = reach(Phase.FORMING)
    play.tell(Formed(0, 1, 0))
    assert play.tell(Left(1, 1, None, ECHO)) == [Abort(1, (0,))]
    assert play.tell(Formed(0, 1, 0)) == []
    play.tell(Left(0, 1, None, ECHO))
    assert play.form.generation == 2
    play.tell(Formed(0, 2, 0))
    assert play.tell(Left(0, 2, None, ECHO)) == [Abort(2, (1,))]


def test_a_forming_that_takes_too_long_is_aborted_and_blames_only_those_who_stay_silent():
    play = reach(Phase.FORMING)
    assert play.wait(LIMITS.start_s) == [Abort(1, (0, 1))]
    play.left(0)
    assert [type(command) for command in play.wait(LIMITS.settle_s)] == [Release, Ask]
    assert {*play.run.replicas} == {0}


def test_who_paused_alone_does_not_wait_for_ever():
    play = reach(Phase.PAUSING)
    play.left(0)
    assert play.wait(LIMITS.settle_s) == [Abort(1, (1,))]
    assert play.wait(LIMITS.settle_s)[0] == Release(1, frozenset([1]), "workers [1] did not answer within 2 s")
    assert play.form.members == (0,)


def test_a_stop_has_a_time_limit_and_asking_again_does_not_move_it():
    play = reach(Phase.STOPPING)
    play.now_s += 1.0
    assert play.tell(StopAsked("Ctrl-C again")) == []
    play.now_s -= 1.0
    assert play.wait(STOP_GRACE_S - 0.5) == []
    assert play.wait(0.5) == [End(Outcome.CANCELLED, None, "Ctrl-C")]


def test_a_stop_writes_what_survivors_hold_although_they_are_too_few_to_go_on():
    play = reach(Phase.TRAINING, least=2)
    play.tell(Lost(1, "it died"))
    play.echo(0)
    assert play.run.phase is Phase.WAITING
    assert [type(command) for command in play.tell(StopAsked("Ctrl-C"))] == [Form, Ask]
    assert not play.run.asked
    play.formed()
    assert play.last == [Train(2), Stop(2, "Ctrl-C")]


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_failures_in_a_row_without_a_step_are_bounded():
    play = reach(Phase.TRAINING)
    for _ in range(LIMITS.retries):
        play.echo(committed=0)
        play.formed(0)
    play.echo(committed=0)
    assert play.end.failure is not None
    assert "4 failures in a row" in play.end.failure.message


@pytest.mark.parametrize("is_told", [True, False])
def test_failures_with_a_step_in_between_are_not(is_told: bool):
    play = reach(Phase.TRAINING, limits=replace(LIMITS, retries=1))
    committed = 0
    for _ in range(10):
        committed += not is_told
        if is_told:
            play.tell(Committed(play.run.generation))
        play.echo(committed=committed)
        play.formed(committed)
    assert play.run.phase is Phase.TRAINING


def test_a_generation_that_does_not_form_is_a_failure_in_a_row_whatever_was_done_before():
    play = reach(Phase.TRAINING, target=3, limits=replace(LIMITS, retries=2))
    play.echo(committed=7)
    for _ in range(2):
        assert play.run.outcome is None
        play.echo(committed=7)
    assert play.end.failure is not None


def test_a_lone_worker_may_die_as_often_as_it_likes_with_steps_in_between():
    play = reach(Phase.TRAINING, target=1)
    for number in range(10):
        play.tell(Committed(play.run.generation), Lost(number, "it died"))
        play.grant()
        play.ready()
        play.formed()
    assert play.run.phase is Phase.TRAINING


def test_an_error_of_the_users_code_is_tried_once_more():
    play = reach(Phase.TRAINING)
    play.left(1, failure=MISTAKE)
    play.echo(0)
    assert play.run.phase is Phase.FORMING
    play.formed()
    play.left(1, failure=MISTAKE)
    play.echo(0)
    assert play.end == End(Outcome.FAILED, MISTAKE, None)


def test_the_same_error_on_all_ranks_is_one_try():
    play = reach(Phase.TRAINING)
    play.left(0, 1, failure=MISTAKE)
    assert play.run.phase is Phase.FORMING
    play.formed()
    play.left(0, 1, failure=MISTAKE)
    assert play.end.outcome is Outcome.FAILED


def test_errors_that_differ_by_rank_are_told_apart_and_still_end_the_run():
    play = reach(Phase.TRAINING)
    other = replace(MISTAKE, message="ValueError: worse")
    play.left(0, failure=MISTAKE)
    play.left(1, failure=other)
    play.formed()
    play.left(0, failure=MISTAKE)
    play.left(1, failure=other)
    assert play.end.failure == MISTAKE


def test_another_error_or_another_step_is_tried_again():
    play = reach(Phase.TRAINING)
    for step in range(6):
        play.left(1, failure=replace(MISTAKE, step=step), committed=step)
        play.echo(0, committed=step)
        play.formed(step)
    assert play.run.phase is Phase.TRAINING


@pytest.mark.parametrize("change", [{"is_final": True}, {"step": None}])
def test_an_error_that_no_second_try_can_mend_ends_the_run_when_all_have_answered(change: dict[str, Any]):
    failure = replace(MISTAKE, **change)
    play = reach(Phase.TRAINING)
    play.left(1, failure=failure)
    assert play.run.phase is Phase.SETTLING
    assert play.wait(LAST_WORDS_S)[-1] == End(Outcome.FAILED, failure, None)
    play = reach(Phase.TRAINING)
    play.left(1, failure=failure)
    play.echo(0)
    assert play.end.failure == failure


def test_code_that_starts_nowhere_ends_a_run_that_has_not_trained():
    play = reach(Phase.STARTING)
    assert play.tell(Lost(1, "it cannot import", MISTAKE))[-1] == End(Outcome.FAILED, MISTAKE, None)


def test_a_newcomer_that_does_not_start_is_replaced_with_patience_and_disturbs_nobody():
    play = reach(Phase.TRAINING)
    play.tell(ResizeAsked(3, "more"))
    pauses = []
    for number in range(2, 12):
        play.grant()
        play.tell(Lost(number, "it cannot import", MISTAKE))
        waited = 0.0
        while not play.run.asked:
            play.wait(0.5)
            waited += 0.5
        pauses.append(waited)
    assert play.run.phase is Phase.TRAINING
    assert pauses == sorted(pauses)
    assert max(pauses) == MISSTART_S


def test_replicas_that_never_start_end_a_run_that_needs_them():
    play = Play()
    for number in range(2 * LIMITS.retries + 1):
        play.grant()
        play.tell(Lost(number, "it died"))
    assert play.end.failure is not None
    assert (
        "7 replicas were lost before they could train (Faults.retries); the last: it died" in play.end.failure.message
    )


def test_a_start_that_takes_too_long_names_those_who_are_missing():
    play = Play(size=2)
    play.grant()
    play.tell(Ready(0), Ready(2), Ready(3))
    commands = play.wait(LIMITS.start_s)
    assert commands[0] == Release(0, frozenset([1]), "workers [1] did not start within 20 s (Faults.start_timeout_s)")
    play = Play(size=2)
    play.grant()
    (end,) = play.wait(LIMITS.start_s)
    assert isinstance(end, End)
    assert end.failure is not None
    assert "workers [0, 1, 2, 3]" in end.failure.message  # not one has started: it will not get better
    play = reach(Phase.TRAINING, target=1)
    play.tell(Lost(0, "it died"))
    play.grant()
    assert [type(command) for command in play.wait(LIMITS.start_s)] == [Release, Ask]  # it did before


def test_whom_the_others_blame_is_replaced_when_all_live_and_it_fails_again():
    play = reach(Phase.TRAINING, target=3)
    for _ in range(2):
        play.left(0, 2, failure=ECHO, suspect=1, committed=0)
        play.left(1, failure=ECHO, suspect=0, committed=0)
        if play.form.generation == 2:
            assert play.form.members == (0, 1, 2)
            play.formed()
    assert play.form.members == (0, 2)
    play.formed()
    play.wait(REFUSED_S)  # at once, another might well get the same place
    assert play.run.asked == {3}


# --- whatever happens -------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """What a controller can see, in any order: some answer, some do not, some twice, some too late."""

    @initialize(size=st.integers(1, 2), counts=st.lists(st.integers(1, 3), min_size=3, max_size=3))
    def begin(self, size: int, counts: list[int]) -> None:
        least, start, wanted = sorted(counts)
        self.play = Play(target=wanted, size=size, least=least, start=start)
        self.committed = 0

    @property
    def run(self) -> Run:
        return self.play.run

    def workers(self) -> list[int]:
        return [worker for number in sorted(self.run.replicas) for worker in workers_of(number, self.play.size)]

    @precondition(lambda self: self.run.asked)
    @rule(data=st.data())
    def scheduler_grants(self, data: st.DataObject) -> None:
        some = data.draw(st.sets(st.sampled_from(sorted(self.run.asked)), min_size=1))
        self.play.tell(Granted(frozenset(some)))

    @rule()
    def scheduler_refuses(self) -> None:
        self.play.tell(Refused("no room"))

    @precondition(lambda self: self.run.replicas)
    @rule(data=st.data())
    def worker_is_ready(self, data: st.DataObject) -> None:
        self.play.tell(Ready(data.draw(st.sampled_from(self.workers()))))

    @precondition(lambda self: crew(self.run))
    @rule(data=st.data(), age=st.sampled_from([0, 0, 0, 1]))
    def worker_has_formed(self, data: st.DataObject, age: int) -> None:
        worker = data.draw(st.sampled_from(crew(self.run)))
        self.play.tell(Formed(worker, self.run.generation - age, self.committed))

    @rule()
    def a_step_is_committed(self) -> None:
        if self.run.phase in (Phase.TRAINING, Phase.PAUSING, Phase.STOPPING):
            self.committed += 1
            self.play.tell(Committed(self.run.generation))

    @precondition(lambda self: crew(self.run))
    @rule(
        data=st.data(),
        age=st.sampled_from([0, 0, 0, 1]),
        failure=st.sampled_from([None, ECHO, ECHO, MISTAKE]),
        is_reduced=st.booleans(),
        has_state=st.sampled_from([True, True, True, False]),
        is_end=st.sampled_from([False, False, False, True]),
    )
    def worker_leaves(
        self,
        data: st.DataObject,
        age: int,
        failure: Failure | None,
        is_reduced: bool,
        has_state: bool,
        is_end: bool,
    ) -> None:
        worker = data.draw(st.sampled_from(crew(self.run)))
        position = at(self.committed, is_reduced) if has_state else None
        suspect = data.draw(st.none() | st.sampled_from(crew(self.run)))
        self.play.tell(Left(worker, self.run.generation - age, position, failure, is_end and failure is None, suspect))

    @precondition(lambda self: self.run.replicas)
    @rule(data=st.data(), failure=st.sampled_from([None, None, None, MISTAKE]))
    def worker_is_lost(self, data: st.DataObject, failure: Failure | None) -> None:
        self.play.tell(Lost(data.draw(st.sampled_from(self.workers())), "it died", failure))

    @rule(wanted=st.integers(1, 4))
    def somebody_resizes(self, wanted: int) -> None:
        self.play.tell(ResizeAsked(wanted, "somebody asked"))

    @precondition(lambda self: self.run.replicas)
    @rule(data=st.data())
    def replicas_are_revoked(self, data: st.DataObject) -> None:
        some = data.draw(st.sets(st.sampled_from(sorted(self.run.replicas)), min_size=1))
        self.play.tell(Revoked(frozenset(some), "spot"))

    @rule(time_s=st.sampled_from([0.5, 2.0, 2.0, 25.0, 70.0]))
    def time_passes(self, time_s: float) -> None:
        self.play.wait(time_s)

    @precondition(lambda self: self.run.phase is not Phase.ENDED)
    @rule(chance=st.integers(0, 9))
    def somebody_stops(self, chance: int) -> None:
        if chance == 0:
            self.play.tell(StopAsked("Ctrl-C"))

    @invariant()
    def time_limits_are_near(self) -> None:
        run = getattr(self, "play", None) and self.run
        if run and run.deadline_s is not None:
            assert run.deadline_s <= self.play.now_s + max(LIMITS.admit_s, LIMITS.start_s, STOP_GRACE_S)

    def teardown(self) -> None:
        """From now on all obey: the run comes to train with all that it wants, or to its end."""
        if not hasattr(self, "play"):
            return
        play = self.play
        for _ in range(300):
            is_complete = len(play.run.members) == play.run.target * play.size
            if play.run.phase is Phase.ENDED or (play.run.phase is Phase.TRAINING and is_complete):
                return
            if play.run.asked:
                play.grant()
            play.ready()
            if play.run.phase is Phase.FORMING:
                play.formed(self.committed)
            elif play.run.phase in (Phase.PAUSING, Phase.SETTLING):
                play.left(committed=self.committed)
            elif play.run.phase is Phase.STOPPING:
                play.left(committed=self.committed, is_end=True)
            else:
                self.committed += 1
                play.tell(Committed(play.run.generation))
            play.now_s += GATHER_S
            play.tell(Tick())
        pytest.fail(f"all obey, and it is {play.run.phase}")


Life.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
