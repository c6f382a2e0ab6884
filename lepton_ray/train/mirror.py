"""Copies of the training state in the memory of another process, for when no worker is left that holds it.

As with a checkpoint, training waits for one copy of the state, and a thread does the rest; the bytes are those of a
checkpoint's file, which hold the whole state. Where an earlier copy is still on its way, the next one is left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_ray.train.checkpoint import copy_into
from lepton_ray.train.checkpoint_format import apart, parse, plan_file, together

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

_STEPS = 1 << 32  # a float64, as which a place is voted on, has 21 bits more for the generation


class Mirrors(Protocol):
    """Where the copies are, and how often they are made; nothing of them outlives the run."""

    @property
    def every(self) -> int:
        """Steps between two copies."""

    @property
    def rest(self) -> float:
        """After a copy comes a rest so many times as long."""

    def keep(self, place: int, data: Bytes) -> None:
        """Keep a state instead of an older one. Returns when it is there."""

    def kept(self) -> Sequence[int]:
        """Return the places of the states that are kept; see `place_of`."""

    def fetch(self, place: int) -> Bytes | None:
        """Return the state of a place, if it is still there."""


def place_of(generation: int, step: int) -> int:
    """Return a number for a state: those of later generations are larger, and in a generation those of later steps."""
    return generation * _STEPS + step


def step_of(place: int) -> int:
    """Return the step of a place."""
    return place % _STEPS


class Mirror:
    """Makes the copies of one worker. One caller, one background thread."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._last: Future[None] | None = None
        self._rest_until_s = 0.0
        self._thread = ThreadPoolExecutor(1, "lepton-mirror")

    def is_busy(self) -> bool:
        """Tell whether an earlier copy is on its way, or there is a rest after it."""
        return (self._last is not None and not self._last.done()) or time.perf_counter() < self._rest_until_s

    def save(
        self,
        mirrors: Mirrors,
        generation: int,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Any,
        after: Callable[[], None],
    ) -> None:
        """Copy a stable state, and send it in the background; not while busy. after: as of `Checkpointer.save`."""
        both = together(tensors, state)
        plan = plan_file(both)
        start, stop = len(plan.head), len(plan.head) + plan.size_bytes
        if self._buffer.numel() < stop:
            self._buffer = torch.empty(stop, dtype=torch.uint8)
        self._buffer[:start] = torch.frombuffer(bytearray(plan.head), dtype=torch.uint8)
        ready = copy_into(both, plan, self._buffer[start:stop])
        data = self._buffer[:stop].numpy()
        self._last = self._thread.submit(self._send, mirrors, generation, step, data, ready, after)

    def _send(
        self,
        mirrors: Mirrors,
        generation: int,
        step: int,
        data: Bytes,
        ready: torch.Event | None,
        after: Callable[[], None],
    ) -> None:
        began_s = time.perf_counter()
        try:
            if ready is not None:
                ready.synchronize()
            after()
            mirrors.keep(place_of(generation, step), data)
        except Exception as error:  # noqa: BLE001 - each store has errors of its own; the next copy may succeed
            log.warning("The state after %s steps could not be mirrored (%s: %s).", step, type(error).__name__, error)
        ended_s = time.perf_counter()
        self._rest_until_s = ended_s + mirrors.rest * (ended_s - began_s)

    def close(self) -> None:
        """Send no more."""
        self._thread.shutdown(wait=False)


def read(data: Bytes) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors and the state that were mirrored. Raises CheckpointError."""
    return apart(parse(torch.from_numpy(np.array(data)), "the mirror"), "the mirror")
