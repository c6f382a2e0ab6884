"""The arrays that a process makes in shared memory, and its views of those that its peers made.

Whoever holds an array keeps its memory, whatever groups come and go. Peers find an array by the inode and descriptor of
its segment, which travel in the first round of an operation; they map a segment once, and let go of those of a rank as
soon as it has freed one.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lepton_ray.collective.calls import Array
from lepton_ray.collective.memory import Segment, address_of, copy, read_process
from lepton_ray.errors import PeerLost

_BEYOND = 1 << 64  # any address


class Place(NamedTuple):
    """Where an array lies, as peers need it. Private memory has no inode."""

    address: int
    inode: int = 0
    descriptor: int = 0
    offset: int = 0
    freed: int = 0
    """How many segments the rank has freed so far."""


class Heap:
    """The arrays that this process shares, whatever groups it is in; one array serves one group after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: list[tuple[int, ...]] = []
        """Begin, end, inode and descriptor of each, sorted; replaced, never changed."""
        self._dead: deque[int] = deque()
        """Beginnings of those that nobody holds any more. The collector of garbage may add to it at any moment."""
        self._freed = 0

    def empty(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make shared memory, zeros at first."""
        segment = Segment.create(size_bytes)
        begin, end = segment.address, segment.address + segment.data.nbytes
        self._bury()
        with self._lock:
            self._segments = sorted([*self._segments, (begin, end, segment.inode, segment.descriptor)])
        segment.map.at_end = partial(self._drop, begin, segment.descriptor)
        return segment.data[:size_bytes]

    def find(self, array: Array) -> Place:
        """Say where an array lies."""
        if self._dead:
            self._bury()
        address = address_of(array)
        segments = self._segments
        at = bisect_right(segments, (address, _BEYOND)) - 1
        if at >= 0:
            begin, end, inode, descriptor = segments[at]
            if address + array.nbytes <= end:
                return Place(address, inode, descriptor, address - begin, self._freed)
        return Place(address, freed=self._freed)

    def _drop(self, begin: int, descriptor: int) -> None:
        self._dead.append(begin)
        os.close(descriptor)

    def _bury(self) -> None:
        """Forget the segments that nobody holds any more."""
        with self._lock:
            while self._dead:
                begin = self._dead.popleft()
                self._segments = [each for each in self._segments if each[0] != begin]
                self._freed += 1


HEAP = Heap()


class Holdings:
    """The shared arrays of a rank's peers, as far as it has seen them."""

    def __init__(self, pids: Sequence[int], names: Sequence[int]) -> None:
        """pids: of the ranks. names: what errors call them."""
        self._pids, self._names = pids, names
        self._foreign: list[dict[int, Segment]] = [{} for _ in pids]
        self._foreign_freed = [0] * len(pids)

    def address(self, rank: int, place: Place) -> int:
        """Return where this process sees a peer's array in shared memory. Raises PeerLost."""
        return self._segment(rank, place).address + place.offset

    def view(self, rank: int, place: Place, start: int, like: Array) -> Array:
        """Show a part of a peer's array in shared memory, from element `start` on. Raises PeerLost."""
        at = place.offset + start * like.itemsize
        return self._segment(rank, place).data[at : at + like.nbytes].view(like.dtype)

    def read(self, rank: int, place: Place, start: int, target: Array) -> None:
        """Copy a part of a peer's array, wherever it lies. Raises PeerLost."""
        if place.inode:
            copy(self.view(rank, place, start, target), target)
            return
        try:
            read_process(self._pids[rank], place.address + start * target.itemsize, target.view(np.uint8))
        except OSError as error:
            raise PeerLost(f"the memory of rank {self._names[rank]} cannot be read ({error.strerror})") from error

    def _segment(self, rank: int, place: Place) -> Segment:
        seen = self._foreign[rank]
        if self._foreign_freed[rank] != place.freed:
            self._foreign_freed[rank] = place.freed
            seen.clear()
        if place.inode not in seen:
            try:
                seen[place.inode] = Segment.attach(self._pids[rank], place.descriptor, place.inode)
            except OSError as error:
                raise PeerLost(f"the memory of rank {self._names[rank]} cannot be reached ({error})") from error
        return seen[place.inode]

    def release(self) -> None:
        """Let go of what is theirs."""
        self._foreign = [{} for _ in self._pids]
