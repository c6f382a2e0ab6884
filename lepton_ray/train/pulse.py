"""Whether this process gets on with its training: it counts the pieces of work that it begins.

A worker whose training hangs still answers questions. The others notice when they wait for it; a lone worker has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Written by the training thread, read by any."""

    def __init__(self) -> None:
        self._beats = 0
        self._is_expected = False

    @property
    def beats(self) -> int | None:
        """Count the pieces of work begun so far; None while none has to be."""
        return self._beats if self._is_expected else None

    def beat(self) -> None:
        """Begin another microbatch, block of an evaluation, or transaction."""
        self._beats += 1

    @contextmanager
    def expected(self, is_expected: bool = True) -> Iterator[None]:
        """Say whether work is to be done meanwhile."""
        before, self._is_expected = self._is_expected, is_expected
        self._beats += 1
        try:
            yield
        finally:
            self._is_expected = before


PULSE = Pulse()
"""Of the one job that this process does at a time."""
