"""Carry records from a worker to its controller, in batches, off the training thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import ray
from ray.exceptions import RayActorError

from lepton_ray.cluster.names import CALL_TIMEOUT_S

PERIOD_S = 0.1
"""How long a record may wait for company. The progress line is drawn less often than that."""


class Reporter:
    """`report` costs the training thread an append; a thread sends what has gathered."""

    def __init__(self, controller: Any, rank: int, generation: int) -> None:
        self._controller, self._rank, self._generation = controller, rank, generation
        self._records: deque[dict[str, Any]] = deque()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._last: Any = None
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
        self._send()
        if self._last is not None:
            ray.get(self._last, timeout=CALL_TIMEOUT_S)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_S):
            try:
                self._send()
            except RayActorError:
                return  # the lease ends this process

    def _send(self) -> None:
        """Send the gathered records; a worker's shares of steps travel as rows of one record."""
        rows: list[list[Any]] = []
        batch: list[dict[str, Any]] = []
        with self._lock:
            while self._records:
                record = self._records.popleft()
                if record["event"] == "work":
                    rows.append([record["step"], record["first"], record["sizes"]])
                else:
                    batch.append(record)
            if rows:
                batch.append({"event": "work", "rank": self._rank, "rows": rows})
            if batch:
                self._last = self._controller.report.remote(self._generation, batch)
