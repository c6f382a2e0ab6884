"""Samples per second, as a figure that does not jump with every step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

WINDOW_S = 2.0
"""They are measured over at least so long, or since the last record that carried them."""


@dataclass(slots=True)
class Speed:
    """The speed of one worker's run."""

    since_s: float = field(default_factory=time.perf_counter)
    samples: int = 0
    value: float = 0.0

    def add(self, samples: int) -> float:
        """Take in what was done just now; return the speed."""
        self.samples += samples
        elapsed_s = time.perf_counter() - self.since_s
        if elapsed_s >= WINDOW_S or not self.value:
            self.value = round(self.samples / max(elapsed_s, 1e-9), 1)
        if elapsed_s >= WINDOW_S:
            self.since_s, self.samples = time.perf_counter(), 0
        return self.value
