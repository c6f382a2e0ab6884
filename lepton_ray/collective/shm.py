"""Reduce and move arrays between the processes of one node, through memory that they share.

Small arrays: everybody copies its own into a slot, one meeting, everybody sums all slots in the order of ranks. Larger
ones are cut into a part for each rank (`layout`). Those that lie in the group's memory (`empty`) are reduced in place:
each rank reads its part of all arrays and writes the result into all: by numpy, block by block while it is in the
cache, or in one pass (`kernel`). So every element is read once and written once, by all cores together. Nobody writes
into the private memory of another: after an error it may be in use for something else. There each rank reduces its part
into its own array, then fetches the parts of the others, by process_vm_readv where that is allowed, otherwise through
the slots. Arrays that come as a list, one for each rank, are read where they lie, and nothing is put together.

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
from lepton_ray.collective.holdings import HEAP, Holdings, Place
from lepton_ray.collective.kernel import Addresses, addresses_of, sum_into_all
from lepton_ray.collective.layout import Way, blocks, choose, cut, even_parts, turns, whole_part
from lepton_ray.collective.memory import Segment, address_of, copy

SLOT_BYTES = 512 << 10
# Copying both ways costs less than a second meeting. In the group's memory there is nothing to copy.
COPY_BYTES, SMALL_BYTES = 128 << 10, 32 << 10
# A block of all ranks' arrays is in the cache of one core, so that what has been read is written without being fetched.
_BLOCK_BYTES, _BLOCKS_BYTES = 256 << 10, 1 << 20
_READ_BYTES = 4 << 20  # between two looks whether the group has ended
# What is kept from one operation to the next: views of the slots, by dtype and size of small arrays, and what follows
# from where larger ones lie.
_KINDS = 64

# What a rank shows at the first meeting of an operation: header, and the fields of `Place`. Those of a list of arrays
# lie in its slot.
_PLACE = struct.Struct("<qqqqq")
_NOTE = struct.Struct(f"<{HEADER.size}s{_PLACE.format[1:]}")
_NOTE_BYTES = 128  # a pair of cache lines
PROOF_AT = 2048  # left to whoever forms the group
_SLOTS_AT = 4096
SEGMENT_BYTES = _SLOTS_AT + 2 * SLOT_BYTES


class _Begun(NamedTuple):
    """An operation after its first meeting."""

    way: Way
    slots: list[Array]
    """By rank, what was copied into them (COPY)."""
    places: list[Place]
    """By rank, where the arrays lie (otherwise)."""
    addresses: Addresses | None = None
    """Where this process sees them, its own first (IN_PLACE)."""


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
        self._rank, self._world, self.can_read = rank, len(segments), can_read
        self._names = names or range(self._world)
        sum_into_all(np.dtype(np.float32))  # what has to be compiled is compiled now
        self.board = Board(rank, segments, pidfds, timeout_s=timeout_s, watch=watch, names=names)
        self.holdings = Holdings(pids, self._names)
        self._all = range(self._world)
        self._peers = [(rank + step) % self._world for step in range(1, self._world)]
        # What is written for a round lies at the parity of the round.
        self._notes = [
            [memoryview(each.map)[at : at + _NOTE.size] for each in segments]
            for at in (WORDS_BYTES, WORDS_BYTES + _NOTE_BYTES)
        ]
        self._headers = [[note[: HEADER.size] for note in notes] for notes in self._notes]
        self._places = [[note[HEADER.size :] for note in notes] for notes in self._notes]
        self._slots = [
            [each.data[at : at + SLOT_BYTES] for each in segments] for at in (_SLOTS_AT, _SLOTS_AT + SLOT_BYTES)
        ]
        self._typed_slots: dict[tuple[Any, int], list[list[Array]]] = {}
        self._known: dict[bytes, _Begun] = {}
        """By the places of all ranks. They count what a rank has freed: freed memory is not found again."""
        self._scratch = np.empty(_BLOCK_BYTES, np.uint8)

    def release(self) -> None:
        """Let go of all memory of the group, and of the arrays of the peers."""
        self.board.release()
        self.holdings.release()
        self._notes, self._headers, self._places, self._slots, self._typed_slots = [], [], [], [], {}

    def barrier(self, header: bytes) -> None:
        self._show(header, np.empty(0, np.uint8))

    def allreduce(self, header: bytes, array: Array, op: Reduction) -> None:
        if array.nbytes <= SMALL_BYTES:
            _sum_up(self._show(header, array), array, op)
            return
        begun = self._begin(header, array)
        if begun.way is Way.COPY:
            _sum_up(begun.slots, array, op)
            return
        bounds = even_parts(array.size, self._world, array.itemsize)
        if begun.way is Way.IN_PLACE:
            self._reduce_everywhere(begun, array, bounds, op)
            return
        if begun.way is Way.STAGED:
            parts = cut(array, bounds)
            self._reduce_staged(parts, parts[self._rank], op)
        else:
            start = bounds[self._rank]
            own = array[start : bounds[self._rank + 1]]
            self._reduce_part(begun, own, own, op, start)
            self.board.meet()
        self._spread_parts(begun, array, bounds)

    def reducescatter(self, header: bytes, parts: Sequence[Array], out: Array, op: Reduction) -> None:
        """Reduce part `rank` of all ranks into `out`, which may be this rank's own part."""
        own = parts[self._rank]
        begun = self._begin_parts(header, parts)
        if begun.way is Way.COPY:
            total = own
            for peer in self._peers if own.size else ():
                op.apply(total, begun.slots[peer], out=out)
                total = out
            return
        # Peers may still read what would be overwritten.
        target = out
        if any(np.may_share_memory(out, parts[peer]) for peer in self._peers):
            target = np.empty_like(out)
        if begun.way is Way.STAGED:
            self._reduce_staged(parts, target, op)
        else:
            self._reduce_part(begun, own, target, op, 0)
            self.board.meet()
        if target is not out:
            copy(target, out)

    def reduce(self, header: bytes, array: Array, root: int, op: Reduction) -> None:
        parts = cut(array, whole_part(array.size, self._world, root))
        self.reducescatter(header, parts, parts[self._rank], op)

    def broadcast(self, header: bytes, array: Array, root: int) -> None:
        begun = self._begin(header, array)
        if begun.way is not Way.COPY:
            self._spread_parts(begun, array, whole_part(array.size, self._world, root))
        elif self._rank != root:
            array[:] = begun.slots[root]

    def allgather(self, header: bytes, array: Array, rows: Sequence[Array]) -> None:
        """Copy the arrays of all ranks into `rows`, one of which may be `array` itself."""
        own = rows[self._rank]
        if array.nbytes > SMALL_BYTES and any(np.may_share_memory(array, rows[peer]) for peer in self._peers):
            array = array.copy()  # peers may still read what would be overwritten
        begun = self._begin(header, array)
        if address_of(own) != address_of(array):
            copy(array, own)
        if begun.way is Way.STAGED:
            self._spread_staged(rows)
            return
        for peer in self._peers:
            if begun.way is Way.COPY:
                copy(begun.slots[peer], rows[peer])
            else:
                self._fetch(begun, peer, 0, rows[peer])
        if begun.way is not Way.COPY:
            self.board.meet()

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
            parts = cut(array, bounds)
            self._reduce_staged(parts, parts[self._rank], op)
        return Opened(self, begun, array, bounds, op, is_spread)

    def fetch_rows(
        self, header: bytes, rows: Array, owners: Sequence[Sequence[int]], fill: Callable[[], object]
    ) -> None:
        """Let `fill` get some rows, then fetch from each peer those that it got. All ranks may read each other.

        owners: by rank, the numbers of the rows that it has after `fill`.
        """
        begun = self._begin(header, rows.reshape(-1))
        fill()
        self.board.meet()
        for peer in self._peers:
            for row in owners[peer]:
                self._fetch(begun, peer, row * rows.shape[1], rows[row])
        self.board.meet()

    # --- beginning

    def _show(self, header: bytes, array: Array) -> list[Array]:
        """Meet all ranks, check that they call the same, and return copies of the small arrays of all."""
        parity = self.board.round + 1 & 1
        slots = self._slots_like(array)[parity]
        slots[self._rank][:] = array
        self._headers[parity][self._rank][:] = header
        self._meet_for(header)
        return slots

    def _begin(self, header: bytes, array: Array) -> _Begun:
        """Meet all ranks, check that they call the same, choose the way."""
        if array.nbytes <= SMALL_BYTES:
            return _Begun(Way.COPY, self._show(header, array), [])
        parity = self.board.round + 1 & 1
        place = HEAP.find(array)
        if array.nbytes <= COPY_BYTES and not place.inode:
            self._copy_in(array)
        _NOTE.pack_into(self._notes[parity][self._rank], 0, header, *place)
        self._meet_for(header)
        shown = b"".join(self._places[parity])
        return self._known.get(shown) or self._look_up(shown, array)

    def _look_up(self, shown: bytes, array: Array) -> _Begun:
        places = [Place(*fields) for fields in _PLACE.iter_unpack(shown)]
        is_shared = [place.inode != 0 for place in places]
        way = choose(array.nbytes, COPY_BYTES, is_shared, self.can_read)
        if way is Way.COPY:
            if any(is_shared):  # they did not copy, since the others' arrays might have been shared too
                self._copy_in(array)
                self.board.meet()
            return _Begun(way, self._slots_like(array)[self.board.round & 1], places)
        if way is not Way.IN_PLACE:
            return _Begun(way, [], places)
        seen = [self.holdings.address(peer, places[peer]) for peer in self._peers]
        begun = _Begun(way, [], places, addresses_of([places[self._rank].address, *seen]))
        if len(self._known) >= _KINDS:
            self._known.clear()
        self._known[shown] = begun
        return begun

    def _begin_parts(self, header: bytes, parts: Sequence[Array]) -> _Begun:
        """Meet all ranks and choose the way likewise, for arrays of which each rank wants only one from each."""
        parity = self.board.round + 1 & 1
        slots, own = self._slots[parity], parts[self._rank]
        self._headers[parity][self._rank][:] = header
        size_bytes = sum(part.nbytes for part in parts)
        if size_bytes <= COPY_BYTES:
            start = at = 0
            for rank, part in enumerate(parts):
                if rank == self._rank:
                    at = start
                else:
                    copy(part, slots[self._rank][start : start + part.nbytes])
                start += part.nbytes
            self._meet_for(header)
            return _Begun(Way.COPY, [slot[at : at + own.nbytes].view(own.dtype) for slot in slots], [])
        for rank, part in enumerate(parts):
            _PLACE.pack_into(slots[self._rank], rank * _PLACE.size, *HEAP.find(part))
        self._meet_for(header)
        shown = [[Place(*_PLACE.unpack_from(slot, rank * _PLACE.size)) for slot in slots] for rank in self._all]
        are_shared = [place.inode != 0 for part, places in zip(parts, shown) if part.size for place in places]
        way = choose(size_bytes, COPY_BYTES, are_shared, self.can_read)
        return _Begun(way, [], shown[self._rank])

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

    # --- phases of an operation

    def _reduce_everywhere(self, begun: _Begun, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        """Reduce the own part of all arrays, and write the result into all of them."""
        start, stop = bounds[self._rank], bounds[self._rank + 1]
        kernel = sum_into_all(array.dtype) if op is SUM else None
        if kernel is not None and begun.addresses is not None:
            for block in blocks(start, stop, max(1, _READ_BYTES // array.itemsize)):
                self.board.check()
                kernel(begun.addresses, block.start, block.stop)
        else:
            for block in blocks(start, stop, self._block(array)):
                self._reduce_part(begun, array[block], array[block], op, block.start)
                self._hand_out(begun, array, block)
        self.board.meet()

    def _hand_out(self, begun: _Begun, array: Array, piece: slice) -> None:
        """Write a piece of the own array into those of all others."""
        for peer in self._peers:
            copy(array[piece], self.holdings.view(peer, begun.places[peer], piece.start, array[piece]))

    def _reduce_part(self, begun: _Begun, own: Array, out: Array, op: Reduction, start: int) -> None:
        """Reduce `own`, and what peers have of its size from element `start` on, into `out`."""
        for block in blocks(0, own.size, self._block(own)):
            self.board.check()
            total, into = own[block], out[block]
            for peer in self._peers:
                op.apply(total, self._look_at(begun, peer, start + block.start, total), out=into)
                total = into

    def _look_at(self, begun: _Begun, peer: int, start: int, like: Array) -> Array:
        """Return a block of a peer's array: where it lies, or in scratch memory."""
        if begun.way is Way.COPY:
            return begun.slots[peer][start : start + like.size]
        place = begun.places[peer]
        if place.inode:
            return self.holdings.view(peer, place, start, like)
        block = self._scratch[: like.nbytes].view(like.dtype)
        self.holdings.read(peer, place, start, block)
        return block

    def _spread_parts(self, begun: _Begun, array: Array, bounds: Sequence[int]) -> None:
        """Fetch the part of every peer from its array."""
        parts = cut(array, bounds)
        if begun.way is Way.STAGED:
            self._spread_staged(parts)
            return
        for peer in self._peers:
            self._fetch(begun, peer, bounds[peer], parts[peer])
        self.board.meet()

    def _fetch(self, begun: _Begun, peer: int, start: int, target: Array) -> None:
        """Fill `target` from a peer's array, from element `start` on."""
        for block in blocks(0, target.size, max(1, _READ_BYTES // target.itemsize)):
            self.board.check()
            self.holdings.read(peer, begun.places[peer], start + block.start, target[block])

    def _reduce_staged(self, parts: Sequence[Array], out: Array, op: Reduction) -> None:
        own = parts[self._rank]
        for places in turns([part.size for part in parts], SLOT_BYTES // own.itemsize):
            slots = self._whole_slots(own)
            for peer in self._peers:
                here, there = places[peer]
                copy(parts[peer][here], slots[self._rank][there])
            self.board.meet()
            here, there = places[self._rank]
            total, into = own[here], out[here]
            for peer in self._peers if total.size else ():
                op.apply(total, slots[peer][there], out=into)
                total = into

    def _spread_staged(self, parts: Sequence[Array]) -> None:
        own = parts[self._rank]
        for places in turns([part.size for part in parts], SLOT_BYTES // own.itemsize):
            slots = self._whole_slots(own)
            here, there = places[self._rank]
            copy(own[here], slots[self._rank][there])
            self.board.meet()
            for peer in self._peers:
                here, there = places[peer]
                copy(slots[peer][there], parts[peer][here])

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
        own = self._array[piece]
        memory._reduce_part(self._begun, own, own, self._op, piece.start)

    def spread(self, piece: slice) -> None:
        """Write a piece into the arrays of all ranks, where that is allowed."""
        memory = self._memory
        memory.board.check()
        memory.board.advance()
        if self._is_spread and self._begun.way is Way.IN_PLACE:
            memory._hand_out(self._begun, self._array, piece)

    def close(self) -> None:
        """Meet all ranks when all is done; fetch from them what they could not write."""
        memory = self._memory
        if self._is_spread and self._bounds is not None and self._begun.way in (Way.COPY, Way.STAGED):
            memory._spread_staged(cut(self._array, self._bounds))
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
