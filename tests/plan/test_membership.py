"""The life of a run: total, bounded in time, ends once, and with the cause rather than its echo."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lepton_ray.plan.membership import (
    CAUSE_GRACE_S,
    LAST_WORDS_S,
    STOP_GRACE_S,
    Ask,
    Broke,
    Command,
    End,
    Event,
    Failure,
    Form,
    Granted,
    Limits,
    Outcome,
    Phase,
    Ready,
    Refused,
    Run,
    Start,
    Stop,
    StopAsked,
    Tick,
    Train,
    advance,
    begin,
)

LIMITS = Limits(admit_s=10, start_s=20)
CAUSE = Failure(message="ValueError: bad", rank=1, step=3, traceback="Traceback ...")
ECHO = Failure(message="rank 1 went away", rank=0, is_echo=True)
WORK = (Phase.STARTING, Phase.FORMING, Phase.TRAINING)
EVENTS = st.one_of(
    st.just(Granted()),
    st.builds(Refused, st.just("no room")),
    st.builds(Ready, st.integers(0, 2), st.sampled_from(WORK)),
    st.builds(Broke, st.sampled_from([CAUSE, ECHO])),
    st.builds(StopAsked, st.just("Ctrl-C")),
    st.just(Tick()),
)


def play(*events: Event, workers: int = 2, now_s: float = 0) -> tuple[Run, list[Command]]:
    """Return the run after events, and the commands of the last one."""
    run, commands = begin(workers, LIMITS, 0, now_s)
    for event in events:
        run, commands = advance(run, event, now_s)
    return run, commands


def all_ready(phase: Phase, workers: int = 2) -> list[Event]:
    return [Ready(rank, phase) for rank in range(workers)]


STARTING = [Granted()]
FORMING = [*STARTING, *all_ready(Phase.STARTING)]
TRAINING = [*FORMING, *all_ready(Phase.FORMING)]
REACH: dict[Phase, list[Event]] = {
    Phase.WAITING: [],
    Phase.STARTING: STARTING,
    Phase.FORMING: FORMING,
    Phase.TRAINING: TRAINING,
    Phase.STOPPING: [*TRAINING, StopAsked("Ctrl-C")],
    Phase.ENDED: [*TRAINING, *all_ready(Phase.TRAINING)],
}


def test_a_run_without_trouble_goes_through_its_phases() -> None:
    assert play()[1] == [Ask()]
    assert play(*STARTING)[1] == [Start()]
    assert play(*FORMING)[1] == [Form(1)]
    assert play(*TRAINING)[1] == [Train()]
    run, commands = play(*REACH[Phase.ENDED])
    assert commands == [End(Outcome.FINISHED)]
    assert run.generation == 1


@pytest.mark.parametrize("phase", list(Phase))
def test_the_ways_into_each_phase_are_as_named(phase: Phase) -> None:
    assert play(*REACH[phase])[0].phase is phase


@given(st.lists(st.tuples(EVENTS, st.floats(0, 40)), max_size=30), st.integers(1, 3))
def test_any_events_in_any_order_are_defined_and_end_a_run_once(
    events: list[tuple[Event, float]], workers: int
) -> None:
    run, commands = begin(workers, LIMITS, 4, 0)
    now_s, ends = 0.0, 0
    for event, wait_s in events:
        now_s += wait_s
        was_over = run.phase is Phase.ENDED
        run, commands = advance(run, event, now_s)
        assert not (was_over and commands)
        ends += sum(isinstance(command, End) for command in commands)
        assert (run.phase is Phase.ENDED) == (run.outcome is not None) == (ends == 1)
        assert run.generation in (4, 5)


@pytest.mark.parametrize("phase", [p for p in Phase if p is not Phase.ENDED])
@pytest.mark.parametrize("event", [Broke(CAUSE), StopAsked("Ctrl-C"), Refused("no room")])
def test_trouble_ends_a_run_from_every_phase(phase: Phase, event: Event) -> None:
    run, _ = play(*REACH[phase], event)
    if phase in (Phase.TRAINING, Phase.STOPPING):  # the workers may take a moment to write down what they hold
        run, _ = advance(run, Tick(), STOP_GRACE_S)
    assert run.phase is Phase.ENDED
    stops = isinstance(event, StopAsked)
    assert run.outcome is (Outcome.CANCELLED if stops else Outcome.FAILED)
    assert stops or run.failure in (CAUSE, Failure(message="no room"))


@pytest.mark.parametrize("last", [Ready(0, Phase.TRAINING), Broke(ECHO), Broke(replace(CAUSE, rank=0, message="mine"))])
def test_a_failed_training_ends_with_its_first_cause_when_all_have_answered(last: Event) -> None:
    run, commands = play(*TRAINING, Broke(CAUSE))
    assert commands == []
    assert advance(run, Tick(), LAST_WORDS_S - 0.1) == (run, [])
    assert advance(run, last, 1)[1] == [End(Outcome.FAILED, CAUSE)]
    assert advance(run, Tick(), LAST_WORDS_S)[1] == [End(Outcome.FAILED, CAUSE)]


@pytest.mark.parametrize(
    ("phase", "limit_s", "words"),
    [
        (Phase.WAITING, 10, "admit_timeout_s"),
        (Phase.STARTING, 20, "workers [0, 1] did not start within 20 s"),
        (Phase.FORMING, 20, "workers [0, 1] did not form their group within 20 s"),
    ],
)
def test_a_phase_that_takes_too_long_fails_and_says_who_was_awaited(phase: Phase, limit_s: float, words: str) -> None:
    run, _ = play(*REACH[phase])
    assert advance(run, Tick(), limit_s - 0.1) == (run, [])
    _, (end,) = advance(run, Tick(), limit_s)
    assert isinstance(end, End)
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert words in end.failure.message


def test_a_deadline_names_only_those_who_are_missing() -> None:
    run, _ = play(Granted(), Ready(0, Phase.STARTING))
    _, (end,) = advance(run, Tick(), 20)
    assert isinstance(end, End)
    assert end.failure is not None
    assert "workers [1]" in end.failure.message


def test_training_has_no_deadline() -> None:
    run, _ = play(*TRAINING)
    assert advance(run, Tick(), 1e9) == (run, [])


@pytest.mark.parametrize("phase", [Phase.FORMING, Phase.TRAINING, Phase.STOPPING])
def test_an_echo_waits_for_its_cause(phase: Phase) -> None:
    run, commands = play(*REACH[phase], Broke(ECHO))
    assert commands == []
    assert advance(run, Tick(), CAUSE_GRACE_S - 0.1)[1] == []
    reason = "Ctrl-C" if phase is Phase.STOPPING else None
    assert advance(run, Broke(CAUSE), 1)[1] == [End(Outcome.FAILED, CAUSE, reason)]
    late, commands = advance(run, Tick(), CAUSE_GRACE_S)
    assert commands == [End(Outcome.FAILED, ECHO, reason)]
    assert advance(late, Broke(CAUSE), CAUSE_GRACE_S) == (late, [])


def test_a_stop_does_not_prolong_the_wait_for_a_cause() -> None:
    run, _ = play(*TRAINING, Broke(ECHO), StopAsked("Ctrl-C"))
    run, _ = advance(run, Tick(), CAUSE_GRACE_S)
    assert run.outcome is Outcome.FAILED
    assert run.failure == ECHO


def test_a_stop_lets_the_workers_reach_a_step_boundary() -> None:
    run, commands = play(*TRAINING, Ready(0, Phase.TRAINING), StopAsked("Ctrl-C"))
    assert commands == [Stop("Ctrl-C")]
    assert advance(run, StopAsked("again"), 1) == (run, [])
    _, commands = advance(run, Ready(1, Phase.TRAINING), 1)
    assert commands == [End(Outcome.CANCELLED, None, "Ctrl-C")]


def test_late_answers_of_an_earlier_phase_do_not_count() -> None:
    run, commands = play(*TRAINING, *all_ready(Phase.STARTING), *all_ready(Phase.FORMING))
    assert (run.phase, commands) == (Phase.TRAINING, [])


class Life(RuleBasedStateMachine):
    """What a controller can see: each worker answers each order once, and ticks come every half second."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.run, commands = begin(3, LIMITS, 0, 0)
        self.orders: list[Command] = list(commands)
        self.unanswered: dict[int, Phase] = {}
        self.first_trouble: Failure | None = None

    def tell(self, event: Event) -> None:
        before = self.run
        self.run, commands = advance(self.run, event, self.now_s)
        assert before.phase is not Phase.ENDED or commands == []
        self.orders += commands
        for command in commands:
            phases = {Start: Phase.STARTING, Form: Phase.FORMING, Train: Phase.TRAINING}
            if type(command) in phases:
                assert not self.unanswered, "a worker got an order before it had answered the last one"
                self.unanswered = dict.fromkeys(range(3), phases[type(command)])

    @precondition(lambda self: self.run.phase is Phase.WAITING)
    @rule(is_granted=st.booleans())
    def scheduler_answers(self, is_granted: bool) -> None:
        self.tell(Granted() if is_granted else Refused("no room"))

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), answer=st.sampled_from(["ready", "ready", "ready", "cause", "echo"]))
    def worker_answers(self, data: st.DataObject, answer: str) -> None:
        rank = data.draw(st.sampled_from(sorted(self.unanswered)))
        phase = self.unanswered.pop(rank)
        if answer == "ready":
            self.tell(Ready(rank, phase))
            return
        failure = replace(CAUSE if answer == "cause" else ECHO, rank=rank)
        if self.run.phase is not Phase.ENDED and (answer == "cause" or self.first_trouble is None):
            self.first_trouble = failure
        self.tell(Broke(failure))

    @rule()
    def somebody_stops(self) -> None:
        self.tell(StopAsked("Ctrl-C"))

    @rule(halves=st.integers(1, 30))
    def time_passes(self, halves: int) -> None:
        for _ in range(halves):
            self.now_s += 0.5
            self.tell(Tick())

    @invariant()
    def orders_make_sense(self) -> None:
        kinds = [type(order) for order in self.orders]
        regular = [kind for kind in kinds if kind not in (Stop, End)]
        assert regular == [Ask, Start, Form, Train][: len(regular)]
        assert kinds.count(Stop) <= 1
        assert kinds.count(End) == (self.run.phase is Phase.ENDED)
        assert End not in kinds[:-1]

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        is_busy = self.run.phase is Phase.TRAINING and self.run.failure is None
        assert self.run.phase is Phase.ENDED or is_busy or self.run.deadline_s is not None
        if self.run.deadline_s is not None:
            assert self.run.deadline_s <= self.now_s + max(LIMITS.start_s, STOP_GRACE_S)

    @invariant()
    def the_outcome_tells_what_happened(self) -> None:
        end = next((order for order in self.orders if isinstance(order, End)), None)
        if end is None:
            return
        if end.outcome is Outcome.FINISHED:
            assert self.first_trouble is None
        if self.first_trouble is not None and not self.first_trouble.is_echo:
            assert end.failure is not None
            assert not end.failure.is_echo
        assert (end.failure is not None) == (end.outcome is Outcome.FAILED)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
