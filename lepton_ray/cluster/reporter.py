"""Carry records from a worker to its controller, in batches, off the training thread.

A batch is sent again until the controller has taken it, so that one that comes back misses nothing; it knows what it
has already.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from lepton_ray.cluster.names import CALL_TIMEOUT_S
from lepton_ray.errors import WaitTimeout

PERIOD_S = 0.1
"""How long a record may wait for company. The progress line is drawn less often than that."""


class Reporter:
    """`report` costs the training thread an append; a thread sends what has gathered, one batch after the other."""

    def __init__(self, controller: Any, worker: int) -> None:
        self._controller, self._worker = controller, worker
        self._records: deque[dict[str, Any]] = deque()
        self._over = threading.Event()
        self._lock = threading.Lock()
        """Held while a batch is on its way."""
        self._thread = threading.Thread(target=self._run, name="lepton-report", daemon=True)
        self._thread.start()

    def report(self, event: str, /, **fields: Any) -> None:
        """Hand over a record."""
        self._records.append({"event": event, **fields})

    def close(self) -> None:
        """Send what is left and wait until the controller has it."""
        self._over.set()
        self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Send what was reported so far and wait until the controller has it. May be called from any thread."""
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while not self._send():
            if time.monotonic() > deadline_s:
                raise WaitTimeout(f"the controller took no records for {CALL_TIMEOUT_S:g} s")
            time.sleep(PERIOD_S)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_S):
            try:
                self._send()
            except RayActorError:
                return  # the lease ends this process

    def _send(self) -> bool:
        """Send what has gathered; return whether the controller has it. Raises RayActorError when that is gone."""
        with self._lock:
            batch = [self._records.popleft() for _ in range(len(self._records))]
            if not batch:
                return True
            try:
                ray.get(self._controller.report.remote(self._worker, batch), timeout=CALL_TIMEOUT_S)
            except BaseException as error:
                self._records.extendleft(reversed(batch))
                if not isinstance(error, (ActorUnavailableError, GetTimeoutError)):
                    raise
                return False
            return True
