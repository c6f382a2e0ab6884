"""The error tree.

    LeptonError
    ├── ConfigError (ValueError)     the user's input cannot work; raised before any actor starts where it can be known
    ├── RunFailed (RuntimeError)     a run ended without its result; its journal and last checkpoint are kept
    │   └── WorkerFailed             user code raised in a worker: rank, step and the original traceback
    ├── RunCancelled                 somebody asked the run to stop; it can be resumed
    ├── CheckpointError              a checkpoint is missing, truncated or altered
    ├── PeerLost (ConnectionError)   a collective lost a peer
    └── WaitTimeout (TimeoutError)   a wait met its limit; says what it waited for

Every error keeps its fields through pickling, since most of them cross a process border.
"""

from __future__ import annotations

from typing import TypeVar


class LeptonError(Exception):
    """Base of everything that lepton_ray raises on purpose."""


class ConfigError(LeptonError, ValueError):
    """The user's input cannot work: what was asked, what was found, what to change."""


class RunFailed(LeptonError, RuntimeError):
    """A run ended without its result. Its journal and its last checkpoint are kept."""


class WorkerFailed(RunFailed):
    """User code raised in a worker."""

    def __init__(self, message: str, rank: int, step: int, worker_traceback: str) -> None:
        super().__init__(message)
        self.rank, self.step, self.worker_traceback = rank, step, worker_traceback

    def __str__(self) -> str:
        place = ", ".join(f"{name} {at}" for name, at in (("rank", self.rank), ("step", self.step)) if at >= 0)
        return f"{self.args[0]}{f' ({place})' if place else ''}\n\n{self.worker_traceback}".rstrip()

    def __reduce__(self) -> tuple[type, tuple[str, int, int, str]]:
        return type(self), (self.args[0], self.rank, self.step, self.worker_traceback)


class RunCancelled(LeptonError):
    """Somebody asked the run to stop. It goes on from its last checkpoint when started again under its name."""


class CheckpointError(LeptonError):
    """A checkpoint is missing, truncated or altered; the message names the file."""


class PeerLost(LeptonError, ConnectionError):
    """A collective lost a peer, or was aborted."""

    peer: int | None = None
    """The rank that is silent, where it is sure that the connection to it is the cause."""


class WaitTimeout(LeptonError, TimeoutError):
    """A wait met its limit. The message says what it waited for."""

    peer: int | None = None
    """As for PeerLost."""


E = TypeVar("E", bound="PeerLost | WaitTimeout")


def blame(error: E, peer: int | None) -> E:
    """Note on an error that a rank is silent; return it, to be raised where no variable keeps it and its frames."""
    error.peer = peer
    return error


def silent_peer(error: BaseException | None) -> int | None:
    """Return the rank whose silence is at the bottom of an error, if that is it."""
    while error is not None:
        if isinstance(error, (PeerLost, WaitTimeout)) and error.peer is not None:
            return error.peer
        error = error.__cause__
    return None
