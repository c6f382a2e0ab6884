"""Pass an array along a row of ranks: all of a group, or one of each node.

The row is a ring, and everybody in it is connected to everybody. An array is cut into pieces, which are received,
reduced and sent on while they are in the cache; before a piece leaves for the first time it is `gather`ed from the
other ranks of its node, and once it is final it is `spread` among them. So the memory of a node works while the network
does. All ranks of a row end with the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_ray.collective.calls import Array, Reduction
from lepton_ray.collective.links import Flow, Link
from lepton_ray.collective.mesh import Mesh
from lepton_ray.collective.wire import Codec, Floats
from lepton_ray.plan.ring import Move, all_gather, chunk_bounds, reduce_scatter

# A piece is received, reduced and forwarded while it is in the cache.
_PIECE_BYTES = 512 << 10

Expect = Callable[[Flow, Link, bytes], None]
"""Receives from a link what a peer says when it begins an operation, and compares it with what we say."""


class Local(Protocol):
    """What the other ranks of a node have to do with an array."""

    def gather(self, piece: slice) -> None:
        """Reduce theirs into ours. Called once for each number that this rank sends or receives."""
        ...

    def spread(self, piece: slice) -> None:
        """Give them the result."""
        ...


class Alone:
    """A rank that shares no memory with another."""

    def gather(self, piece: slice) -> None:
        """Nobody else has any."""

    def spread(self, piece: slice) -> None:
        """Nobody else wants it."""


ALONE = Alone()


class Lossy:
    """How arrays are encoded on their way."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.lost: Floats | None = None
        """What earlier calls lost of the array of this one, and where to put what it loses; None: it is forgotten."""
        self._values = np.empty(0, np.float32)

    def size(self, count: int) -> int:
        return self._codec.size(count)

    def encode(self, array: Array, piece: slice) -> NDArray[np.uint8]:
        """Encode a piece, with what former calls lost of it."""
        own = array[piece]
        data = np.empty(self._codec.size(own.size), np.uint8)  # it lives until it is sent
        if self.lost is None:
            self._codec.encode(own, data)
            return data
        own += self.lost[piece]
        self._codec.encode(own, data)
        with np.errstate(invalid="ignore"):
            np.subtract(own, self.decode(data, own.size), out=self.lost[piece])
        # What was inf or nan is lost for good, and must not come back.
        np.nan_to_num(self.lost[piece], copy=False, nan=0, posinf=0, neginf=0)
        return data

    def decode(self, data: NDArray[np.uint8], count: int, out: Floats | None = None) -> Floats:
        """Decode into `out`, or into memory that is valid until the next call."""
        if out is None:
            if self._values.size < count:
                self._values = np.empty(count, np.float32)
            out = self._values[:count]
        self._codec.decode(data, out)
        return out


class Row:
    """Ranks in the order in which they pass an array on, this one at `position`."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int], expect: Expect) -> None:
        self.ranks, self.position = list(ranks), list(ranks).index(mesh.rank)
        self._mesh, self._expect = mesh, expect
        self._scratch = np.empty(0, np.uint8)

    def link(self, step: int) -> Link:
        """Return the connection to the rank that is so many positions on."""
        return self._mesh.links[self.ranks[(self.position + step) % len(self.ranks)]]

    def allreduce(
        self,
        header: bytes,
        array: Array,
        part: slice,
        op: Reduction,
        *,
        is_scattered: bool = False,
        local: Local = ALONE,
        lossy: Lossy | None = None,
    ) -> None:
        """Reduce a part of an array over all ranks of the row. lossy: not round a ring of more than two."""
        world = len(self.ranks)
        if world == 2:
            self._trade(header, array, part, op, local, lossy)
        elif is_scattered:
            self._scatter(header, array, part, op, local, lossy)
        else:
            moves = reduce_scatter(self.position, world) + all_gather(self.position, world)
            self.circulate(header, array, chunks_of(part, world), moves, world - 1, op, local)

    def circulate(
        self,
        header: bytes,
        array: Array,
        chunks: Sequence[slice],
        moves: Sequence[Move],
        reducing: int,
        op: Reduction,
        local: Local = ALONE,
    ) -> None:
        """Make the moves of a ring. The first `reducing` of them reduce what is received, the others store it.

        chunks: where in the array the chunk of each position is.
        """
        before, after = self.link(-1), self.link(1)
        flow = Flow(self._mesh.watch, self._mesh.timeout_s, outlet=after, inlet=before)

        def gathered(piece: slice) -> memoryview:
            local.gather(piece)
            return bytes_of(array[piece])

        flow.send(header, *(partial(gathered, piece) for piece in pieces(array, chunks[moves[0].send])))
        self._expect(flow, before, header)
        for index, move in enumerate(moves):
            for piece in pieces(array, chunks[move.receive]):
                own = array[piece]
                if index < reducing:
                    local.gather(piece)
                    scratch = self._room(own.nbytes)
                    flow.receive(memoryview(scratch))
                    op.apply(scratch.view(array.dtype), own, out=own)
                else:
                    flow.receive(bytes_of(own))
                if index + 1 >= reducing:
                    local.spread(piece)
                if index + 1 < len(moves):
                    # What is queued is not written again before the next rank has it: only its share or its copy,
                    # made after it had this piece, can come round and overwrite the piece.
                    flow.send(bytes_of(own))
        flow.flush()

    def _trade(
        self, header: bytes, array: Array, part: slice, op: Reduction, local: Local, lossy: Lossy | None
    ) -> None:
        """All-reduce between two ranks: each sends all it has. As many bytes as a ring of two, in one phase of it."""
        link = self.link(1)
        flow = Flow(self._mesh.watch, self._mesh.timeout_s, outlet=link, inlet=link)
        sent: deque[NDArray[np.uint8]] = deque()

        def share(piece: slice) -> memoryview:
            local.gather(piece)
            if lossy is None:
                return bytes_of(array[piece])
            sent.append(lossy.encode(array, piece))
            return memoryview(sent[-1])

        cut = list(pieces(array, part))
        flow.send(header, *(partial(share, piece) for piece in cut))
        self._expect(flow, link, header)
        for index, piece in enumerate(cut):
            own = array[piece]
            scratch = self._room(own.nbytes if lossy is None else lossy.size(own.size))
            flow.receive(memoryview(scratch))
            flow.flush(keep=len(cut) - index - 1)  # what has not left yet must not be overwritten
            if lossy is None:
                received = scratch.view(array.dtype)
            else:
                lossy.decode(sent.popleft(), own.size, own)  # as the other one sees it
                received = lossy.decode(scratch, own.size)
            first, second = (own, received) if self.position == 0 else (received, own)
            op.apply(first, second, out=own)
            local.spread(piece)

    def _scatter(
        self, header: bytes, array: Array, part: slice, op: Reduction, local: Local, lossy: Lossy | None
    ) -> None:
        """All-reduce in two messages: each rank sums a chunk that all others send it, and sends all others the sum."""
        flow = Flow(self._mesh.watch, self._mesh.timeout_s)
        world = len(self.ranks)
        cut = [list(pieces(array, chunk)) for chunk in chunks_of(part, world)]
        others = [(step, cut[(self.position + step) % world]) for step in range(1, world)]

        def share(piece: slice) -> memoryview:
            local.gather(piece)
            return memoryview(array[piece].view(np.uint8) if lossy is None else lossy.encode(array, piece))

        for step, theirs in others:
            flow.send(header, *(partial(share, piece) for piece in theirs), to=self.link(step))
        for step, _ in others:
            self._expect(flow, self.link(step), header)
        for piece in cut[self.position]:
            local.gather(piece)
            own = array[piece]
            scratch = self._room(own.nbytes if lossy is None else lossy.size(own.size))
            for step, _ in others:
                flow.receive(memoryview(scratch), self.link(step))
                op.apply(own, scratch.view(array.dtype) if lossy is None else lossy.decode(scratch, own.size), out=own)
            result = own.view(np.uint8)
            if lossy is not None:
                result = lossy.encode(array, piece)
                lossy.decode(result, own.size, own)  # as all others see it
            local.spread(piece)
            for step, _ in others:
                flow.send(memoryview(result), to=self.link(step))
        for turn in range(max(len(theirs) for _, theirs in others)):
            for step, theirs in others:
                for piece in theirs[turn : turn + 1]:
                    # Its owner has our share of it, so that has left, and its place is free.
                    own = array[piece]
                    if lossy is None:
                        flow.receive(bytes_of(own), self.link(step))
                    else:
                        scratch = self._room(lossy.size(own.size))
                        flow.receive(memoryview(scratch), self.link(step))
                        lossy.decode(scratch, own.size, own)
                    local.spread(piece)
        flow.flush()

    def _room(self, size_bytes: int) -> NDArray[np.uint8]:
        if self._scratch.size < size_bytes:
            self._scratch = np.empty(max(size_bytes, _PIECE_BYTES), np.uint8)
        return self._scratch[:size_bytes]


def bytes_of(array: Array) -> memoryview:
    """Return the memory of an array."""
    return memoryview(array.view(np.uint8))


def chunks_of(part: slice, world: int) -> list[slice]:
    """Cut a part of an array into a chunk for each position."""
    bounds = [part.start + offset for offset in chunk_bounds(part.stop - part.start, world)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]


def pieces(array: Array, part: slice) -> Iterator[slice]:
    """Cut a part of an array into pieces that fit the cache."""
    step = max(1, _PIECE_BYTES // array.itemsize)
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))
