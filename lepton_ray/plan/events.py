"""What the state machine of a run is made of: the run, the events that it is told, the commands that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from lepton_ray.plan.recover import Position, Settlement


class Phase(str, Enum):
    WAITING = "waiting"
    """For the scheduler: the run holds too few replicas to go on."""
    STARTING = "starting"
    """It holds enough, but they have not built the model yet."""
    FORMING = "forming"
    TRAINING = "training"
    PAUSING = "pausing"
    """For a change of the members, at the next end of a transaction."""
    SETTLING = "settling"
    """After a failure: the survivors say where they stand."""
    STOPPING = "stopping"
    ENDED = "ended"


BETWEEN = (Phase.WAITING, Phase.STARTING)
"""Phases in which there is no generation."""


class Outcome(str, Enum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed."""

    message: str
    rank: int | None = None
    step: int | None = None
    traceback: str = ""
    is_echo: bool = False
    """Seen only because another worker went away."""
    is_final: bool = False
    """Trying again cannot help."""

    @property
    def is_users(self) -> bool:
        """Tell an error of the user's code in a step, after which the next try may have the same processes."""
        return self.step is not None and not self.is_echo


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Time limits in seconds, and how often a run tries again."""

    admit_s: float
    start_s: float
    """For starting, and again for forming."""
    settle_s: float
    """For a worker to leave its collectives after an abort."""
    retries: int
    """Failures in a row, without a transaction in between, that a run survives, and bad starts of each replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """The workers that hold one copy of the model. Which ones: `recover.workers_of`."""

    start_by_s: float
    ready: frozenset[int] = frozenset()
    """Workers that are able to join a generation."""
    ready_s: float | None = None
    """Since when all of them are."""
    gone: frozenset[int] = frozenset()
    """Those that are no more. A replica without all its workers cannot go on, but those left may hold state."""
    is_revoked: bool = False
    """It is to go at the next change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One life of a job in its controller. Numbers of replicas and workers are never used again."""

    size: int
    """Workers of a replica."""
    least: int
    """Replicas to go on with after a loss."""
    start: int
    """Replicas to begin with."""
    target: int
    """Replicas wanted now."""
    limits: Limits
    phase: Phase = Phase.WAITING
    generation: int = 0
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    asked: frozenset[int] = frozenset()
    """Replicas that the scheduler has been asked for and has not given yet."""
    next_replica: int = 0
    """Numbers from here on were never used."""
    ask_at_s: float = 0.0
    """No replacement is asked for before, while the others train."""
    members: tuple[int, ...] = ()
    """Workers of the generation, by rank; none between two generations."""
    lenders: frozenset[int] = frozenset()
    """Workers that only give their state away while the generation forms."""
    done: frozenset[int] = frozenset()
    """Members and lenders that have joined (while it forms) or left (after that)."""
    ended: frozenset[int] = frozenset()
    """Those that left at the end of the training."""
    positions: Mapping[int, Position] = field(default_factory=dict)
    """Where workers stand that do not train now. Those that hold no state are not among them."""
    settlement: Settlement | None = None
    """Where the next generation begins, if those of its holders that are still there hold all coordinates."""
    suspects: tuple[int, ...] = ()
    """Whom those who left blame, one vote each."""
    deadline_s: float | None = None
    failure: Failure | None = None
    """Why the run ends as soon as all have said their last words."""
    errors: Mapping[tuple[str, int | None], int] = field(default_factory=dict)
    """Errors of the user's code, as (message, step) -> generation that met it last."""
    committed: int = -1
    """Transactions in the state that the generation began with; -1 before one did."""
    has_trained: bool = False
    failed: int = 0
    """Failures since the last transaction that was committed."""
    misstarts: int = 0
    """Replicas lost outside of a generation since the last one was formed."""
    cause: str = ""
    """Why the next generation is formed."""
    cancel_reason: str | None = None
    outcome: Outcome | None = None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The scheduler gave the job replicas that it was asked for."""

    replicas: frozenset[int]


@dataclass(frozen=True, slots=True)
class Refused:
    """The scheduler cannot give the job what it was asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has started and built the model: it can join a generation."""

    worker: int


@dataclass(frozen=True, slots=True)
class Formed:
    """A worker has joined a generation, or, as a lender, given its state to it.

    committed: transactions in the state that it begins with.
    """

    worker: int
    generation: int
    committed: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A generation has committed transactions. It need not be told of each."""

    generation: int


@dataclass(frozen=True, slots=True)
class Left:
    """A member or lender has left its generation, and lives.

    position: None when it holds no state that is of use. failure: what made it leave; None where it was asked to, or is
    at the end: of the training, or of a stop that all agreed on. suspect: the worker that it takes for the cause.
    """

    worker: int
    generation: int
    position: Position | None
    failure: Failure | None = None
    is_end: bool = False
    suspect: int | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone, or must be taken for gone. failure: of the user's code, which will not start anywhere."""

    worker: int
    reason: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class ResizeAsked:
    """Somebody wants another number of replicas."""

    target: int
    reason: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """Replicas must be given up soon, by number: their node is going, or others need the place."""

    replicas: frozenset[int]
    reason: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the run to stop at the next step boundary."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broke:
    """The controller itself failed."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Granted | Refused | Ready | Formed | Committed | Left | Lost | ResizeAsked | Revoked | StopAsked | Broke | Tick

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """Want these replicas of the scheduler, and no longer those of an earlier order that it has not given yet."""

    replicas: frozenset[int]


@dataclass(frozen=True, slots=True)
class Start:
    """Have the workers of a replica import and build what the job needs."""

    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """Have workers form a generation: the members, and sources that are none.

    members: by rank. settlement: where all go on; who is none of its holders copies the state. sources: coordinate ->
    worker that it is copied from. Both are None when all load the newest checkpoint.
    """

    generation: int
    members: tuple[int, ...]
    settlement: Settlement | None
    sources: Mapping[int, int] | None
    cause: str


@dataclass(frozen=True, slots=True)
class Train:
    """Set the members going."""

    generation: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Have the members pause at the next end of a transaction."""

    generation: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Break what these workers wait for in a generation; each says where it stands."""

    generation: int
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Give a replica back. gone: those of its workers that are no more, or must not go on."""

    replica: int
    gone: frozenset[int]
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Have the members stop at the next step boundary, with a checkpoint."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """The run is over: free what it holds and write the outcome down."""

    outcome: Outcome
    failure: Failure | None = None
    reason: str | None = None


Command = Ask | Start | Form | Train | Pause | Abort | Release | Stop | End

Step = tuple[Run, list[Command]]
"""A run after an event, and what is to be done."""
