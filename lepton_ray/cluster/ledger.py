"""What the journal has of a run's progress: decides which records of the workers are new."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any


class Ledger:
    """Workers may send a record again, when the one that sent it first may have died before it arrived."""

    def __init__(self) -> None:
        self.next_step = 0
        """The first step that there is no record of."""
        self._next_epoch = 0
        self._since = 0
        """The generation that started from a checkpoint last: what older ones still send does not count."""
        self._grown = asyncio.Event()

    def is_new(self, record: Mapping[str, Any]) -> bool:
        """Take down a record; return whether the journal is to have it."""
        match record["event"]:
            case "started" | "resumed":
                self._since = record["generation"]
                self.next_step, self._next_epoch = record["step"], record.get("epoch", 0)
            case "step":
                if record["step"] < self.next_step or record["generation"] < self._since:
                    return False
                self.next_step = record["step"] + 1
                self._grown.set()
            case "epoch":
                if record["epoch"] < self._next_epoch or record["generation"] < self._since:
                    return False
                self._next_epoch = record["epoch"] + 1
        return True

    async def reach(self, step: int) -> None:
        """Return when there are records of all steps before this one."""
        while self.next_step < step:
            self._grown.clear()
            await self._grown.wait()
