"""What leaves a worker: records for the journal, and calls of the user's callbacks.

Every worker gathers the same records; that of rank 0 sends them, when they are stable. The others keep them for a
while, so that whoever takes the place of a rank 0 that died sends what the journal lacks.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lepton_ray.callbacks import Callback, RunView
from lepton_ray.data.datasets import qualified_name

Report = Callable[..., None]
"""(event name, **fields): hand a record to the journal; returns at once."""

KEPT_RECORDS = 20_000
"""Published records that a worker can send again: at a thousand steps per second those of 20 s."""
_MARK = "_lepton_ray_callback"
_HOOKS = {"step": "on_step", "epoch": "on_epoch"}


def is_of_callback(error: BaseException) -> bool:
    """Tell whether a callback raised this: it would raise at another step if the run went on."""
    return bool(getattr(error, _MARK, False))


class Outbox:
    """The records of one worker, and the callbacks, which are called in the process of rank 0."""

    def __init__(self, report: Report, callbacks: Sequence[Callback], name: str, path: str) -> None:
        self.is_first = False
        """This worker has rank 0."""
        self.stop_reason: str | None = None
        """Why a callback wishes to stop."""
        self._report, self._callbacks = report, callbacks
        self._pending: deque[tuple[str, dict[str, Any]]] = deque()
        """Of what is committed, but perhaps not yet by all."""
        self._published: deque[tuple[str, dict[str, Any]]] = deque(maxlen=KEPT_RECORDS)
        self._saved: deque[dict[str, Any]] = deque()
        """Checkpoints of which the callbacks have not been told; a thread that writes adds to them."""
        self._untold: deque[tuple[str, dict[str, Any]]] = deque()
        """Published, but perhaps not in the memory that the other workers know of."""
        self.covered = 0
        """How many of these are in the memory that was voted on last."""
        self._view = RunView(name=name, path=path, stop=self._ask_to_stop)
        self.told = self.memory()
        """What the other workers know of the callbacks' memory."""

    def put(self, event: str, record: dict[str, Any]) -> None:
        """Take a record of what was committed just now."""
        self._pending.append((event, record))

    def now(self, event: str, /, **fields: Any) -> None:
        """Send a record at once, if this is rank 0."""
        if self.is_first:
            self._report(event, **fields)

    def publish(self, step: int, epoch: int) -> None:
        """Hand out the records that are pending: they are stable now. step, epoch: done so far."""
        self._view.step, self._view.epoch = step, epoch
        while self._pending:
            event, record = self._pending.popleft()
            self._published.append((event, record))
            if self._callbacks and event in _HOOKS:
                self._untold.append((event, record))
            if self.is_first:
                self._report(event, **record)
                if event in _HOOKS:
                    self.call(_HOOKS[event], record)
        while self._saved:
            self.call("on_checkpoint", self._saved.popleft())

    def publish_again(self, since_step: int) -> None:
        """Send what was published of this step and later: the journal lacks it."""
        for event, record in self._published:
            if self.is_first and record["step"] >= since_step:
                self._report(event, **record)

    def tail(self, since_step: int) -> list[list[list[Any]]]:
        """Return what the journal may lack: published from a step on, and pending."""
        published = [list(each) for each in self._published if each[1]["step"] >= since_step]
        return [published, [list(each) for each in self._pending]]

    def load_tail(self, tail: list[list[list[Any]]]) -> None:
        """Take over what another worker's `tail` returned."""
        published, pending = ([(event, record) for event, record in part] for part in tail)
        self._published, self._pending = deque(published, maxlen=KEPT_RECORDS), deque(pending)

    def rewind(self, step: int) -> None:
        """Forget what was done from this step on: it is done again."""
        self._pending.clear()
        self._untold.clear()
        self._published = deque((p for p in self._published if p[1]["step"] < step), maxlen=KEPT_RECORDS)

    def checkpoint_event(self, kind: str, **fields: Any) -> None:
        """Take news from the thread that writes; callbacks hear of it in the training thread."""
        self._report(kind, **fields)
        if kind == "checkpoint_saved":
            self._saved.append(fields)

    def call(self, hook: str, record: Mapping[str, Any]) -> None:
        """Call a hook of all callbacks."""
        for callback in self._callbacks:
            try:
                getattr(callback, hook)(self._view, record)
            except BaseException as error:
                with suppress(AttributeError):
                    setattr(error, _MARK, True)
                raise

    def _ask_to_stop(self, reason: str) -> None:
        self.stop_reason = reason

    # --- what callbacks remember -------------------------------------------------------------------------------------

    def states(self) -> list[list[Any]]:
        """Return the state of each callback, with the name of its class."""
        return [[qualified_name(callback), callback.state_dict()] for callback in self._callbacks]

    def load_states(self, saved: Sequence[Sequence[Any]]) -> None:
        """Give each callback the state of the first one of its class that is left; callbacks may come and go."""
        waiting = list(saved)
        for callback in self._callbacks:
            found = next((pair for pair in waiting if pair[0] == qualified_name(callback)), None)
            if found is not None:
                waiting.remove(found)
                callback.load_state_dict(found[1])
        self.told = self.memory()

    def memory(self) -> bytes:
        """Return what another worker needs to call the callbacks from here on; nothing where there are none."""
        return pickle.dumps((self.states(), self.stop_reason)) if self._callbacks else b""

    def untold(self) -> bytes:
        """Return the memory, if the other workers do not know it as it is."""
        memory = self.memory() if self.is_first else b""
        return memory if memory != self.told else b""

    def vote(self) -> bytes:
        """Return the memory for a ballot, if the other workers do not know it as it is; all call this before one."""
        self.covered = len(self._untold)
        return self.untold()

    def agreed(self, covered: int) -> None:
        """Know that the memory which all share holds what was published first, up to so many records."""
        for _ in range(min(covered, len(self._untold))):
            self._untold.popleft()

    def take_over(self) -> None:
        """Become the one whose callbacks are called: also with what those of rank 0 may have taken with them."""
        self._pending.extendleft(reversed(self._untold))
        self._untold.clear()

    def remember(self, memory: bytes) -> None:
        """Take over what the callbacks of another worker remember."""
        if memory:
            states, self.stop_reason = pickle.loads(memory)  # made by another worker of this run
            self.load_states(states)
