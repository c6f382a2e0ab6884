"""Reduce and move arrays between the processes of one node, through memory that they share.

Small arrays: everybody copies its own into a slot, one meeting, everybody sums all slots in the order of ranks. Larger
ones are cut into a part for each rank (`layout`). Those that lie in the group's memory (`empty`) are reduced in place:
each rank reads its part of all arrays and writes the result into all: by numpy, block by block while it is in the
cache, or in one pass (`kernel`). So every element is read once and written once, by all cores together. Nobody writes
into the private memory of another: after an error it may be in use for something else. There each rank reduces its part
into its own array, then fetches the parts of the others, by process_vm_readv where that is allowed, otherwise through
the slots.

Every operation begins with a meeting at which all ranks show what they call and where their array is; from then on
all know the same and choose the same way. Every rank ends with the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton_ray.collective.board import WORDS_BYTES, Board
from lepton_ray.collective.calls import HEADER, SUM, Array, Reduction, mismatch
from lepton_ray.collective.holdings import Holdings, Place
from lepton_ray.collective.kernel import sum_into_all
from lepton_ray.collective.layout import Way, blocks, choose, even_parts, turns, whole_part
from lepton_ray.collective.memory import Segment, read_process
from lepton_ray.errors import PeerLost

SLOT_BYTES = 512 << 10
# Copying both ways costs less than a second meeting. In the group's memory there is nothing to copy.
COPY_BYTES, SMALL_BYTES = 128 << 10, 16 << 10
# A block of all ranks' arrays is in the cache of one core, so that what has been read is written without being fetched.
_BLOCK_BYTES, _BLOCKS_BYTES = 256 << 10, 1 << 20
_READ_BYTES = 4 << 20  # between two looks whether the group has ended
_KINDS = 64  # of small arrays, by dtype and size, whose views of the slots are kept

# What a rank shows at the first meeting of an operation: header, and the fields of `Place`.
_NOTE = struct.Struct(f"<{HEADER.size}sqqqqq")
_NOTE_BYTES = 128  # a pair of cache lines
PROOF_AT = 2048  # left to whoever forms the group
_SLOTS_AT = 4096
SEGMENT_BYTES = _SLOTS_AT + 2 * SLOT_BYTES


class _Begun(NamedTuple):
    """An operation after its first meeting."""

    way: Way
    arrays: list[Array]
    """By rank: copies in the slots (COPY), or the arrays themselves (IN_PLACE)."""
    addresses: list[int]
    """By rank, in private memory (READ)."""


class SharedMemory:
    """The operations of one rank. Not for several threads at once, except for `board.end`; errors are final.

    They are those of `Ring`, with the header that all ranks must show.
    """

    def __init__(
        self,
        rank: int,
        segments: Sequence[Segment],
        pids: Sequence[int],
        pidfds: Mapping[int, int],
        *,
        can_read: bool,
        timeout_s: float,
        watch: Callable[[], object],
        names: Sequence[int] | None = None,
    ) -> None:
        """segments: by rank, SEGMENT_BYTES each. can_read: whether every rank can read every other's private memory.

        pidfds, timeout_s, watch, names: as `Board`.
        """
        self._rank, self._world, self._pids, self.can_read = rank, len(segments), pids, can_read
        self._names = names or range(self._world)
        sum_into_all(np.dtype(np.float32))  # what has to be compiled is compiled now
        self.board = Board(rank, segments, pidfds, timeout_s=timeout_s, watch=watch, names=names)
        self.holdings = Holdings(pids)
        self._peers = [(rank + step) % self._world for step in range(1, self._world)]
        # What is written for a round lies at the parity of the round.
        self._notes = [
            [memoryview(each.map)[at : at + _NOTE.size] for each in segments]
            for at in (WORDS_BYTES, WORDS_BYTES + _NOTE_BYTES)
        ]
        self._headers = [[note[: HEADER.size] for note in notes] for notes in self._notes]
        self._slots = [
            [each.data[at : at + SLOT_BYTES] for each in segments] for at in (_SLOTS_AT, _SLOTS_AT + SLOT_BYTES)
        ]
        self._typed_slots: dict[tuple[Any, int], list[list[Array]]] = {}
        self._scratch = np.empty(_BLOCK_BYTES, np.uint8)

    def release(self) -> None:
        """Let go of all memory of the group but of the arrays that somebody holds."""
        self.board.release()
        self.holdings.release()
        self._notes, self._headers, self._slots, self._typed_slots = [], [], [], {}

    def barrier(self, header: bytes) -> None:
        self._begin(header, np.empty(0, np.uint8))

    def allreduce(self, header: bytes, array: Array, op: Reduction) -> None:
        begun = self._begin(header, array)
        if begun.way is Way.COPY:
            _sum_up(begun.arrays, array, op)
            return
        bounds = even_parts(array.size, self._world, array.itemsize)
        if begun.way is Way.IN_PLACE:
            self._reduce_everywhere(begun, array, bounds, op)
        else:
            self._reduce_parts(begun, array, bounds, op)
            self._spread_parts(begun, array, bounds)

    def reducescatter(self, header: bytes, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        """Reduce within `array` what lies between the bounds of this rank."""
        begun = self._begin(header, array)
        if begun.way is Way.COPY:
            part = slice(bounds[self._rank], bounds[self._rank + 1])
            if part.start < part.stop:  # an array of nothing may be a read-only one
                _sum_up([each[part] for each in begun.arrays], array[part], op)
        else:
            self._reduce_parts(begun, array, bounds, op)

    def reduce(self, header: bytes, array: Array, root: int, op: Reduction) -> None:
        self.reducescatter(header, array, whole_part(array.size, self._world, root), op)

    def broadcast(self, header: bytes, array: Array, root: int) -> None:
        begun = self._begin(header, array)
        if begun.way is not Way.COPY:
            self._spread_parts(begun, array, whole_part(array.size, self._world, root))
        elif self._rank != root:
            array[:] = begun.arrays[root]

    def allgather(self, header: bytes, array: Array) -> Array:
        begun = self._begin(header, array)
        rows = np.empty((self._world, array.size), array.dtype)
        rows[self._rank] = array
        if begun.way is Way.STAGED:
            self._spread_parts(begun, rows.reshape(-1), [array.size * rank for rank in range(self._world + 1)])
            return rows
        for peer in self._peers:
            if begun.way is Way.COPY:
                rows[peer] = begun.arrays[peer]
            else:
                self._fetch(begun, peer, 0, rows[peer])
        if begun.way is not Way.COPY:
            self.board.meet()
        return rows

    # --- with ranks elsewhere

    def open(
        self, header: bytes, array: Array, bounds: Sequence[int] | None, op: Reduction, *, is_spread: bool = True
    ) -> Opened:
        """Begin an operation in which ranks of this node reduce the node's arrays piece by piece, for other nodes.

        bounds: what each rank reduces; None where that is no such part, which goes only if all may read each other.
        is_spread: whether all ranks get the results.
        """
        begun = self._begin(header, array)
        if begun.way is Way.STAGED:
            assert bounds is not None
            self._reduce_staged(array, bounds, op)
        return Opened(self, begun, array, bounds, op, is_spread)

    def fetch_rows(
        self, header: bytes, rows: Array, owners: Sequence[Sequence[int]], fill: Callable[[], object]
    ) -> None:
        """Let `fill` get some rows, then fetch from each peer those that it got. All ranks may read each other.

        owners: by rank, the numbers of the rows that it has after `fill`.
        """
        flat = rows.reshape(-1)
        begun = self._begin(header, flat)
        fill()
        self.board.meet()
        for peer in self._peers:
            for row in owners[peer]:
                self._fetch(begun, peer, row * rows.shape[1], rows[row])
        self.board.meet()

    # --- beginning

    def _begin(self, header: bytes, array: Array) -> _Begun:
        """Meet all ranks, check that they call the same, choose the way."""
        size_bytes = array.nbytes
        parity = self.board.round + 1 & 1
        if size_bytes <= SMALL_BYTES:
            slots = self._slots_like(array)[parity]
            slots[self._rank][:] = array
            self._headers[parity][self._rank][:] = header
            self._meet_for(header)
            return _Begun(Way.COPY, slots, [])
        place = self.holdings.find(array)
        if size_bytes <= COPY_BYTES and not place.inode:
            self._copy_in(array)
        _NOTE.pack_into(self._notes[parity][self._rank], 0, header, *place)
        self._meet_for(header)
        places = [
            place if rank == self._rank else Place(*_NOTE.unpack_from(note)[1:])
            for rank, note in enumerate(self._notes[parity])
        ]
        is_shared = [each.inode != 0 for each in places]
        way = choose(size_bytes, COPY_BYTES, is_shared, self.can_read)
        if way is Way.IN_PLACE:
            return _Begun(way, [self._view(rank, each, array) for rank, each in enumerate(places)], [])
        if way is Way.COPY:
            if any(is_shared):  # they did not copy, since the others' arrays might have been shared too
                self._copy_in(array)
                self.board.meet()
            return _Begun(way, self._slots_like(array)[self.board.round & 1], [])
        return _Begun(way, [], [each.address for each in places])

    def _meet_for(self, header: bytes) -> None:
        """Meet, and check that all ranks call the same."""
        self.board.meet()
        headers = self._headers[self.board.round & 1]
        for peer in self._peers:
            if headers[peer] != header:
                raise mismatch(self._names[self._rank], header, self._names[peer], bytes(headers[peer]))

    def _copy_in(self, array: Array) -> None:
        """Put the own array where peers see it after the next meeting."""
        self._slots_like(array)[self.board.round + 1 & 1][self._rank][:] = array

    def _slots_like(self, array: Array) -> list[list[Array]]:
        """Return the slots of all ranks for both parities, as arrays of this kind."""
        key = array.dtype, array.size
        found = self._typed_slots.get(key)
        if found is None:
            found = [[slot[: array.nbytes].view(array.dtype) for slot in slots] for slots in self._slots]
            if len(self._typed_slots) >= _KINDS:
                self._typed_slots.clear()
            self._typed_slots[key] = found
        return found

    def _view(self, rank: int, place: Place, like: Array) -> Array:
        if rank == self._rank:
            return like
        try:
            return self.holdings.view(rank, place, like.nbytes).view(like.dtype)
        except OSError as error:
            raise PeerLost(f"the memory of rank {self._names[rank]} cannot be reached ({error})") from error

    # --- phases of a large operation

    def _reduce_everywhere(self, begun: _Begun, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        """Reduce the own part of all arrays, and write the result into all of them."""
        others = [begun.arrays[peer] for peer in self._peers]
        kernel = sum_into_all(array.dtype) if op is SUM else None
        if kernel is not None:
            for block in blocks(bounds[self._rank], bounds[self._rank + 1], max(1, _READ_BYTES // array.itemsize)):
                self.board.check()
                kernel([array[block], *(other[block] for other in others)])
            self.board.meet()
            return
        for block in blocks(bounds[self._rank], bounds[self._rank + 1], self._block(array)):
            self.board.check()
            own = array[block]
            for other in others:
                op.apply(own, other[block], out=own)
            for other in others:
                _copy(own, other[block])
        self.board.meet()

    def _reduce_parts(self, begun: _Begun, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        """Reduce the own part into the own array, which then differs from those of the others."""
        if begun.way is Way.STAGED:
            self._reduce_staged(array, bounds, op)
            return
        for block in blocks(bounds[self._rank], bounds[self._rank + 1], self._block(array)):
            self._reduce_block(begun, array, block, op)
        self.board.meet()

    def _reduce_block(self, begun: _Begun, array: Array, block: slice, op: Reduction) -> None:
        """Reduce a block of all ranks' arrays into the own one."""
        self.board.check()
        own = array[block]
        for peer in self._peers:
            if begun.way is Way.READ:
                other = self._scratch[: own.nbytes].view(own.dtype)
                self._read(begun, peer, block.start * array.itemsize, other)
            else:
                other = begun.arrays[peer][block]
            op.apply(own, other, out=own)

    def _spread_parts(self, begun: _Begun, array: Array, bounds: Sequence[int]) -> None:
        """Fetch the part of every peer from its array."""
        if begun.way is Way.STAGED:
            self._spread_staged(array, bounds)
            return
        for peer in self._peers:
            self._fetch(begun, peer, bounds[peer], array[bounds[peer] : bounds[peer + 1]])
        self.board.meet()

    def _fetch(self, begun: _Begun, peer: int, start: int, target: Array) -> None:
        """Fill `target` from a peer's array, from element `start` on."""
        for block in blocks(0, target.size, max(1, _READ_BYTES // target.itemsize)):
            self.board.check()
            if begun.way is Way.IN_PLACE:
                _copy(begun.arrays[peer][start + block.start : start + block.stop], target[block])
            else:
                self._read(begun, peer, (start + block.start) * target.itemsize, target[block])

    def _read(self, begun: _Begun, peer: int, offset: int, target: Array) -> None:
        try:
            read_process(self._pids[peer], begun.addresses[peer] + offset, target.view(np.uint8))
        except OSError as error:
            raise PeerLost(f"the memory of rank {self._names[peer]} cannot be read ({error.strerror})") from error

    def _reduce_staged(self, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        for places in turns(bounds, SLOT_BYTES // array.itemsize):
            slots = self._whole_slots(array)
            for peer in self._peers:
                here, there = places[peer]
                _copy(array[here], slots[self._rank][there])
            self.board.meet()
            here, there = places[self._rank]
            own = array[here]
            for peer in self._peers if own.size else ():
                op.apply(own, slots[peer][there], out=own)

    def _spread_staged(self, array: Array, bounds: Sequence[int]) -> None:
        for places in turns(bounds, SLOT_BYTES // array.itemsize):
            slots = self._whole_slots(array)
            here, there = places[self._rank]
            _copy(array[here], slots[self._rank][there])
            self.board.meet()
            for peer in self._peers:
                here, there = places[peer]
                _copy(slots[peer][there], array[here])

    def _whole_slots(self, array: Array) -> list[Array]:
        """Return the slots of all ranks for the next meeting, as arrays of this dtype."""
        room = SLOT_BYTES // array.itemsize * array.itemsize
        return [slot[:room].view(array.dtype) for slot in self._slots[self.board.round + 1 & 1]]

    def _block(self, array: Array) -> int:
        return max(1, min(_BLOCK_BYTES, _BLOCKS_BYTES // self._world) // array.itemsize)


class Opened:
    """An operation in which ranks of a node work for each other, one piece after the other, between two meetings."""

    def __init__(
        self,
        memory: SharedMemory,
        begun: _Begun,
        array: Array,
        bounds: Sequence[int] | None,
        op: Reduction,
        is_spread: bool,
    ) -> None:
        self._memory, self._begun, self._array, self._bounds = memory, begun, array, bounds
        self._op, self._is_spread = op, is_spread

    def gather(self, piece: slice) -> None:
        """Reduce a piece of all ranks' arrays into the own one."""
        memory = self._memory
        memory.board.advance()
        if self._begun.way is Way.STAGED:
            return  # done at the beginning, as it takes meetings
        for block in blocks(piece.start, piece.stop, memory._block(self._array)):
            memory._reduce_block(self._begun, self._array, block, self._op)

    def spread(self, piece: slice) -> None:
        """Write a piece into the arrays of all ranks, where that is allowed."""
        memory = self._memory
        memory.board.check()
        memory.board.advance()
        if self._is_spread and self._begun.way is Way.IN_PLACE:
            for peer in memory._peers:
                _copy(self._array[piece], self._begun.arrays[peer][piece])

    def close(self) -> None:
        """Meet all ranks when all is done; fetch from them what they could not write."""
        memory = self._memory
        if self._is_spread and self._bounds is not None and self._begun.way in (Way.COPY, Way.STAGED):
            memory._spread_staged(self._array, self._bounds)
            return
        memory.board.meet()
        if self._is_spread and self._bounds is not None and self._begun.way is Way.READ:
            memory._spread_parts(self._begun, self._array, self._bounds)


def _sum_up(parts: Sequence[Array], out: Array, op: Reduction) -> None:
    """Reduce in the order of ranks, for the same bits everywhere."""
    total = parts[0]
    for part in parts[1:]:
        op.apply(total, part, out=out)
        total = out


def _copy(source: Array, target: Array) -> None:
    """Copy as bytes: numpy copies dtypes of its users field by field."""
    if target.size:  # numpy refuses even to write nothing into a read-only array
        target.view(np.uint8)[:] = source.view(np.uint8)
