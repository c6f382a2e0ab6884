"""The life of a run, as a function: `advance(run, event, now_s) -> (run, commands)`.

    waiting -> starting -> forming -> training -> ended
                  any phase -> stopping -> ended      (cancelled, driver gone, failed)

Every phase but training has a deadline. A failure that others report because a worker went away (PeersLost) waits a
moment for its cause, so that the run ends with the cause and not with an echo. While it trains, a run that failed
waits a moment for the other workers as well: rank 0 may be writing a checkpoint, and holds the last records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Phase(str, Enum):
    WAITING = "waiting"
    STARTING = "starting"
    FORMING = "forming"
    TRAINING = "training"
    STOPPING = "stopping"
    ENDED = "ended"


class Outcome(str, Enum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


CAUSE_GRACE_S = 3.0
"""How long an echo waits for its cause; Ray tells of a dead process within 0.1 s."""
LAST_WORDS_S = 10.0
"""How long the other workers may take to notice a failure and to write down what they hold."""
STOP_GRACE_S = 60.0
"""How long workers may take to reach a step's end and write the last checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed."""

    message: str
    rank: int | None = None
    step: int | None = None
    traceback: str = ""
    is_echo: bool = False
    """Seen only because another worker went away."""

    @property
    def is_users(self) -> bool:
        """Tell an error of the user's code in a step, after which the next try may have the same processes."""
        return self.step is not None and not self.is_echo


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Time limits of the phases, in seconds."""

    admit_s: float
    start_s: float
    """For starting, and again for forming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One life of a job in its controller."""

    workers: int
    limits: Limits
    phase: Phase = Phase.WAITING
    generation: int = 0
    ready: frozenset[int] = frozenset()
    """Ranks that have done what the phase waits for, or failed at it."""
    deadline_s: float | None = None
    failure: Failure | None = None
    cancel_reason: str | None = None
    outcome: Outcome | None = None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The scheduler gave the job its workers."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The scheduler cannot give the job its workers."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has done what the phase waits for: started, formed, or trained to the end."""

    rank: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Broke:
    """A worker ended with an error."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the run to stop at the next step boundary."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Granted | Refused | Ready | Broke | StopAsked | Tick

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the scheduler for workers."""


@dataclass(frozen=True, slots=True)
class Start:
    """Have every worker import what the job needs."""


@dataclass(frozen=True, slots=True)
class Form:
    """Have the workers form the group of a generation and build the model."""

    generation: int


@dataclass(frozen=True, slots=True)
class Train:
    """Set the workers going."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Have the workers stop at the next step boundary, with a checkpoint."""

    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """The run is over: free what it holds and write the outcome down."""

    outcome: Outcome
    failure: Failure | None = None
    reason: str | None = None


Command = Ask | Start | Form | Train | Stop | End


def begin(workers: int, limits: Limits, generation: int, now_s: float) -> tuple[Run, list[Command]]:
    """Return a new life of a run, and the order to ask for its workers.

    generation: the last one of its earlier lives, 0 for a new run.
    """
    return Run(workers=workers, limits=limits, generation=generation, deadline_s=now_s + limits.admit_s), [Ask()]


def advance(run: Run, event: Event, now_s: float) -> tuple[Run, list[Command]]:
    """Return the run after an event, and what is to be done. Events that no longer matter change nothing."""
    if run.phase is Phase.ENDED:
        return run, []
    match event:
        case Granted():
            if run.phase is not Phase.WAITING:
                return run, []
            return _enter(run, Phase.STARTING, now_s + run.limits.start_s), [Start()]
        case Refused(reason):
            return _end(run, Outcome.FAILED, Failure(message=reason))
        case Ready(rank, phase):
            return _ready(run, rank, phase, now_s)
        case Broke(failure):
            return _broke(run, failure, now_s)
        case StopAsked(reason):
            return _stop(run, reason, now_s)
        case Tick():
            return _tick(run, now_s)


def _enter(run: Run, phase: Phase, deadline_s: float | None) -> Run:
    return replace(run, phase=phase, ready=frozenset(), deadline_s=deadline_s)


def _end(run: Run, outcome: Outcome, failure: Failure | None = None) -> tuple[Run, list[Command]]:
    run = replace(_enter(run, Phase.ENDED, None), outcome=outcome, failure=failure)
    return run, [End(outcome, failure, run.cancel_reason)]


def _ready(run: Run, rank: int, phase: Phase, now_s: float) -> tuple[Run, list[Command]]:
    is_done = phase is Phase.TRAINING and run.phase is Phase.STOPPING
    if phase is not run.phase and not is_done:
        return run, []
    run = replace(run, ready=run.ready | {rank})
    if len(run.ready) < run.workers:
        return run, []
    if run.failure is not None:
        return _end(run, Outcome.FAILED, run.failure)
    match run.phase:
        case Phase.STARTING:
            run = replace(_enter(run, Phase.FORMING, now_s + run.limits.start_s), generation=run.generation + 1)
            return run, [Form(run.generation)]
        case Phase.FORMING:
            return _enter(run, Phase.TRAINING, None), [Train()]
        case Phase.TRAINING:
            return _end(run, Outcome.FINISHED)
        case _:
            return _end(run, Outcome.CANCELLED)


def _broke(run: Run, failure: Failure, now_s: float) -> tuple[Run, list[Command]]:
    is_training = run.phase in (Phase.TRAINING, Phase.STOPPING)
    if not failure.is_echo and (failure.rank is None or not is_training):
        return _end(run, Outcome.FAILED, failure)
    if run.failure is None or (run.failure.is_echo and not failure.is_echo):
        grace_s = CAUSE_GRACE_S if failure.is_echo else LAST_WORDS_S
        run = replace(run, failure=failure, deadline_s=now_s + grace_s)
    run = replace(run, ready=run.ready | {failure.rank} if failure.rank is not None else run.ready)
    if len(run.ready) == run.workers:
        return _end(run, Outcome.FAILED, run.failure)
    return run, []


def _stop(run: Run, reason: str, now_s: float) -> tuple[Run, list[Command]]:
    if run.phase is Phase.STOPPING or run.failure is not None:  # it is ending already
        return run, []
    run = replace(run, cancel_reason=reason)
    if run.phase is not Phase.TRAINING:
        return _end(run, Outcome.CANCELLED)
    # Workers that have already finished stay counted.
    return replace(run, phase=Phase.STOPPING, deadline_s=now_s + STOP_GRACE_S), [Stop(reason)]


def _tick(run: Run, now_s: float) -> tuple[Run, list[Command]]:
    if run.deadline_s is None or now_s < run.deadline_s:
        return run, []
    if run.failure is not None:
        return _end(run, Outcome.FAILED, run.failure)
    if run.phase is Phase.STOPPING:
        return _end(run, Outcome.CANCELLED)
    missing = sorted(set(range(run.workers)) - run.ready)
    what = {
        Phase.WAITING: f"the scheduler did not admit the job within {run.limits.admit_s:g} s (Faults.admit_timeout_s)",
        Phase.STARTING: f"workers {missing} did not start within {run.limits.start_s:g} s (Faults.start_timeout_s)",
        Phase.FORMING: (
            f"workers {missing} did not form their group within {run.limits.start_s:g} s (Faults.start_timeout_s)"
        ),
    }[run.phase]
    return _end(run, Outcome.FAILED, Failure(message=what))
