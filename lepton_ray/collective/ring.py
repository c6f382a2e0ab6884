"""Reduce and move arrays between the processes of one group over TCP. Knows neither ray nor torch.

A group is a full mesh: one connection per pair of ranks, opened once by `Ring.form`. Worlds are small, a mesh makes
point-to-point free, and every rank sees the death of any other on a socket of its own. A pair has ONE stream, so its
messages keep program order: all ranks make the same calls in the same order, sends and receives included.

Small reductions go directly from everybody to everybody, one hop, and are summed in rank order; so do those of two
ranks, whatever their size. Larger ones go along a `Row` of all ranks. Either way every rank ends with the same bits.

A group is never repaired. The first error, or `abort`, shuts all sockets of this rank down. Whoever waits for anybody
watches everybody, so this ends the operation of every other rank likewise: none is left to its timeout because the
dead rank was not its neighbour. A rank that leaves on purpose says goodbye first and disturbs nobody who can do
without it.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lepton_ray.collective.calls import (
    ALLGATHER,
    ALLREDUCE,
    BARRIER,
    BROADCAST,
    CALLS,
    HEADER,
    MESSAGE,
    REDUCE,
    REDUCE_SCATTER,
    SUM,
    Array,
    Reduction,
    check_array,
    check_rows,
    header_of,
    mismatch,
)
from lepton_ray.collective.links import Flow, Link, late
from lepton_ray.collective.memory import copy
from lepton_ray.collective.mesh import Exchange, Mesh
from lepton_ray.collective.row import Row, bytes_of, pieces
from lepton_ray.errors import ConfigError, PeerLost, WaitTimeout, blame
from lepton_ray.plan.ring import all_gather, chunk_bounds, reduce_scatter

# What a rank says last when it leaves on purpose. Without it, the end of its stream is a death.
_GOODBYE = HEADER.pack(0xFF, 0, 0, 0, 0, 0, 0)

# An all-to-all of at most so many outgoing bytes per rank is faster than a ring (and fits into any socket buffer, so
# that all ranks may send before they receive).
_DIRECT_BYTES = 32 << 10
# Waking a sleeping process on another core costs 50-140 us on a virtual machine, so a short wait is polled. Between two
# polls the core is offered to others: with more ranks than cores the awaited one may need it.
_SPIN_S = 100e-6
# Payloads in scratch memory begin on a cache line; the header lies just before.
_LINE = 64


class Ring:
    """A group of `world` processes, this one being `rank`. Call `form` before anything else.

    Operations take 1-D C-contiguous numpy arrays of native byte order and work in place; one runs at a time, whatever
    the thread. They raise PeerLost, WaitTimeout after `timeout_s` without progress, or ConfigError when ranks make
    different calls; each of these ends the group. `close` may be called at any time and more than once.

    secret: the same for all ranks of this group and for nobody else; peers prove that they hold it before a byte of
    theirs is used. identity: the same for all, of `tls.make_identity`; without it, the data that follow are neither
    encrypted nor signed.
    host: the address of this machine that the other ranks can reach.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        secret: bytes,
        timeout_s: float = 60,
        host: str = "127.0.0.1",
        identity: bytes | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"Ring(rank={rank}, world={world}): expected 0 <= rank < world.")
        if timeout_s <= 0:
            raise ConfigError(f"Ring(timeout_s={timeout_s}): expected seconds > 0.")
        self.rank, self.world = rank, world
        self._mesh = Mesh(rank, world, secret, host, timeout_s, identity)
        self._row = Row(self._mesh, range(world), self._expect)
        self._scratch = np.empty(0, np.uint8)
        self._calls = 0
        self._sent, self._received = [0] * world, [0] * world
        self._operating = threading.Lock()

    @property
    def timeout_s(self) -> float:
        """Longest wait without progress."""
        return self._mesh.timeout_s

    def limit(self, timeout_s: float) -> None:
        """Change the longest wait without progress. Not while an operation runs."""
        self._mesh.timeout_s = timeout_s

    def form(self, exchange: Exchange) -> None:
        """Connect to all peers. Apart from the constructor, so that another thread can abort a formation.

        Raises PeerLost or WaitTimeout; the group is then closed.
        """
        with self._operating:
            self._mesh.form(exchange)

    def look(self) -> None:
        """Raise PeerLost if the group has ended, or ends as a connection broke. For who waits for other things."""
        if self._mesh.failure is None and self._operating.acquire(blocking=False):
            try:  # or else whoever operates sees it
                self._mesh.look()
            except PeerLost as error:
                self._mesh.end(str(error))
            finally:
                self._operating.release()
        if self._mesh.failure is not None:
            raise PeerLost(self._mesh.failure)

    def abort(self, reason: str = "aborted") -> None:
        """End the group from any thread. What blocks in it, here or on another rank, raises PeerLost at once."""
        self._mesh.end(reason)

    def close(self) -> None:
        """Leave the group and release its sockets; an operation in flight in another thread is ended first.

        Peers may finish, without this rank, what it has finished; whatever needs it raises PeerLost.
        """
        if self._operating.acquire(blocking=False):
            try:
                if self._mesh.failure is None:
                    self._say_goodbye()
            finally:
                self._operating.release()
        self._mesh.end("closed")
        with self._operating:
            self._mesh.release()

    def _say_goodbye(self) -> None:
        for link in self._mesh.links.values():
            try:
                link.send(_GOODBYE)
            except PeerLost:
                pass  # left before us

    # --- operations

    def allreduce(self, array: Array, op: Reduction = SUM) -> None:
        """Reduce `array` over all ranks into every rank's `array`."""
        with self._operation(ALLREDUCE, array, op=op) as header:
            if self.world == 1:
                return
            if array.nbytes * (self.world - 1) > _DIRECT_BYTES:
                self._row.allreduce(header, array, slice(0, array.size), op)
                return
            self._exchange(header, array, op)

    def allgather(self, array: Array) -> Array:
        """Return the arrays of all ranks, which are of one size, as the rows of a new one."""
        with self._operation(ALLGATHER, array) as header:
            rows = np.empty((self.world, array.size), array.dtype)
            rows[self.rank] = array
            if self.world == 1:
                return rows
            if array.nbytes * (self.world - 1) > _DIRECT_BYTES:
                chunks = [slice(array.size * rank, array.size * (rank + 1)) for rank in self._row.ranks]
                moves = all_gather(self._row.position, self.world)
                self._row.circulate(header, rows.reshape(-1), chunks, moves, 0, SUM)
            else:
                for rank, part in enumerate(self._swap(header, array)):
                    rows[rank] = part
            return rows

    def allgather_into(self, rows: Sequence[Array], array: Array) -> None:
        """Copy the arrays of all ranks into `rows`, one for each rank, of which the own one may be `array` itself."""
        check_rows(ALLGATHER, self.world, rows, array)
        for row, received in zip(rows, self.allgather(array)):
            copy(received, row)

    def reducescatter(self, array: Array, op: Reduction = SUM) -> Array:
        """Cut `array` by `chunk_bounds`, reduce over all ranks, and return the part of it that is chunk `rank`.

        The rest of `array` is left half reduced.
        """
        with self._operation(REDUCE_SCATTER, array, op=op) as header:
            bounds = chunk_bounds(array.size, self.world)
            if self.world > 1:
                chunks = [slice(bounds[rank], bounds[rank + 1]) for rank in self._row.ranks]
                moves = reduce_scatter(self._row.position, self.world)
                self._row.circulate(header, array, chunks, moves, self.world - 1, op)
            return array[bounds[self.rank] : bounds[self.rank + 1]]

    def reducescatter_into(self, out: Array, parts: Sequence[Array], op: Reduction = SUM) -> None:
        """Reduce part `rank` of all ranks' parts, of which there is one for each rank, into `out`."""
        check_rows(REDUCE_SCATTER, self.world, parts, out)
        copy(self.reducescatter(np.concatenate(parts), op), out)

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Copy the array of `root` into every rank's `array`, along a chain that starts at `root`."""
        with self._operation(BROADCAST, array, root=root) as header:
            if self.world == 1:
                return
            before, after = self._row.link(-1), self._row.link(1)
            flow = Flow(self._mesh.watch, self.timeout_s, outlet=None if after.peer == root else after, inlet=before)
            if self.rank != root:
                self._expect(flow, before, header)
            if after.peer != root:
                flow.send(header)
            for piece in pieces(array, slice(0, array.size)):
                if self.rank != root:
                    flow.receive(bytes_of(array[piece]))
                if after.peer != root:
                    flow.send(bytes_of(array[piece]))
            flow.flush()

    def reduce(self, array: Array, root: int = 0, op: Reduction = SUM) -> None:
        """Reduce `array` over all ranks into the `array` of `root`, along a chain that ends there."""
        with self._operation(REDUCE, array, root=root, op=op) as header:
            if self.world == 1:
                return
            before, after = self._row.link(-1), self._row.link(1)
            flow = Flow(self._mesh.watch, self.timeout_s, outlet=None if self.rank == root else after, inlet=before)
            if before.peer != root:
                self._expect(flow, before, header)
            if self.rank != root:
                flow.send(header)
            for piece in pieces(array, slice(0, array.size)):
                own = array[piece]
                if before.peer != root:
                    scratch = self._room(own.nbytes)[: own.nbytes]
                    flow.receive(memoryview(scratch))
                    received = scratch.view(array.dtype)
                    out = own if self.rank == root else received
                    op.apply(received, own, out=out)
                    own = out
                if self.rank != root:
                    flow.send(bytes_of(own))
                    flow.flush()  # before the scratch memory is used again
            flow.flush()

    def send(self, array: Array, to: int) -> None:
        """Send `array` to one rank. Returns when the kernel has taken all of it."""
        with self._operation(MESSAGE, array, root=to, counter=self._sent, peer=to) as header:
            flow = Flow(self._mesh.watch, self.timeout_s, outlet=self._mesh.links[to])
            flow.send(header, bytes_of(array))
            flow.flush()

    def recv(self, array: Array, source: int) -> None:
        """Receive into `array` what rank `source` sends."""
        with self._operation(MESSAGE, array, root=self.rank, counter=self._received, peer=source) as header:
            flow = Flow(self._mesh.watch, self.timeout_s, inlet=self._mesh.links[source])
            self._expect(flow, self._mesh.links[source], header)
            flow.receive(bytes_of(array))

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        nothing = np.empty(0, np.uint8)
        with self._operation(BARRIER, nothing) as header:
            self._swap(header, nothing)

    # --- inside an operation

    def _operation(
        self,
        call: int,
        array: Array,
        op: Reduction | None = None,
        root: int = 0,
        counter: list[int] | None = None,
        peer: int | None = None,
        wire: int = 0,
        count: int | None = None,
    ) -> _Operation:
        """Check the input of an operation; to be entered for it.

        counter, peer: for point-to-point messages, which are counted per pair and direction. wire: as `header_of`.
        count: of elements, where `array` is but one of several.
        """
        check_array(call, array)
        if not 0 <= root < self.world or (peer is not None and not 0 <= peer < self.world) or peer == self.rank:
            other = root if peer is None else peer
            raise ConfigError(f"{CALLS[call]} with rank {other}: this is rank {self.rank} of {self.world}.")
        return _Operation(
            self, call, array.dtype, array.size if count is None else count, op, root, counter, peer, wire
        )

    def _room(self, size_bytes: int) -> NDArray[np.uint8]:
        if self._scratch.size < size_bytes:
            self._scratch = np.empty(size_bytes, np.uint8)
        return self._scratch

    def _exchange(
        self,
        header: bytes,
        array: Array,
        op: Reduction,
        targets: Sequence[int] | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        """Reduce a small array over some ranks; as `_swap`."""
        parts = self._swap(header, array, targets, sources)
        total = parts[0]
        for part in parts[1:]:  # in their order, for the same bits everywhere
            out = array if part is parts[-1] else total
            op.apply(total, part, out=out)
            total = out

    def _swap(
        self, header: bytes, array: Array, targets: Sequence[int] | None = None, sources: Sequence[int] | None = None
    ) -> list[Array]:
        """Send a small array to some peers; return the arrays of some ranks, valid until the next operation.

        targets: all peers by default. sources: all ranks by default; the own array is taken as it is.
        """
        view, size_bytes = bytes_of(array), array.nbytes
        flow = Flow(self._mesh.watch, self.timeout_s)
        wanted: dict[Link, int] = {}
        for peer in self._mesh.links if targets is None else targets:
            link = self._mesh.links[peer]
            sent = link.send(header, view)
            if sent < HEADER.size + size_bytes:  # rare: the kernel's buffer holds messages that are still unread
                flow.send(memoryview(header + view)[sent:], to=link)
                wanted[link] = select.POLLOUT
        sources = range(self.world) if sources is None else sources
        stride = (size_bytes + 2 * _LINE - 1) // _LINE * _LINE
        scratch = self._room(stride * len(sources))
        parts = []
        missing = {}
        for index, rank in enumerate(sources):
            start = index * stride + _LINE
            if rank == self.rank:
                parts.append(array)
                continue
            parts.append(scratch[start : start + size_bytes].view(array.dtype))
            missing[rank] = memoryview(scratch[start - HEADER.size : start + size_bytes]), 0
            wanted[self._mesh.links[rank]] = wanted.get(self._mesh.links[rank], 0) | select.POLLIN
        for link, events in wanted.items():
            self._mesh.watch.want(link, events)
        while wanted:
            ready = self._mesh.watch.wait(self.timeout_s, _SPIN_S)
            if not ready:
                raise late([link.peer for link in wanted], self.timeout_s)
            unsent = flow.push()
            for link in ready:
                events = select.POLLOUT if link in unsent else 0
                if link.peer in missing:
                    area, filled = missing.pop(link.peer)
                    filled += link.receive(area[filled:])
                    if filled >= HEADER.size:
                        self._check(link.peer, header, area[: HEADER.size])
                    if filled < len(area):
                        missing[link.peer] = area, filled
                        events |= select.POLLIN
                if events != wanted[link]:
                    self._mesh.watch.want(link, events)
                    if events:
                        wanted[link] = events
                    else:
                        del wanted[link]
        return parts

    def _expect(self, flow: Flow, link: Link, header: bytes) -> None:
        arrived = memoryview(bytearray(HEADER.size))
        flow.receive(arrived, link)
        self._check(link.peer, header, arrived)

    def _check(self, peer: int, own: bytes, arrived: memoryview) -> None:
        """Raise unless a peer began the very operation that we are in."""
        if arrived == own:
            return
        if arrived == _GOODBYE:
            raise PeerLost(f"rank {peer} has left the group")
        raise mismatch(self.rank, own, peer, bytes(arrived))


class _Operation:
    """Holds a group for one operation, gives its header, and ends the group on any error.

    A class, since the generator of `contextlib.contextmanager` takes as long as a meeting in shared memory.
    """

    __slots__ = ("_call", "_count", "_counter", "_dtype", "_number", "_op", "_peer", "_ring", "_root", "_wire")

    def __init__(
        self,
        ring: Ring,
        call: int,
        dtype: np.dtype,
        count: int,
        op: Reduction | None,
        root: int,
        counter: list[int] | None,
        peer: int | None,
        wire: int,
    ) -> None:
        self._ring, self._call, self._dtype, self._count, self._op, self._root = ring, call, dtype, count, op, root
        self._counter, self._peer, self._wire = counter, peer, wire

    def __enter__(self) -> bytes:
        ring = self._ring
        ring._operating.acquire()
        if self._counter is None or self._peer is None:
            ring._calls = self._number = (ring._calls + 1) & 0xFFFFFFFF
        else:
            self._counter[self._peer] = self._number = (self._counter[self._peer] + 1) & 0xFFFFFFFF
        try:
            if ring._mesh.failure is not None:
                raise PeerLost("it has ended")
            if ring.world > 1 and not ring._mesh.links:
                raise ConfigError("Ring.form was not called.")
            return header_of(self._call, self._dtype, self._count, self._op, self._root, self._number, self._wire)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        ring = self._ring
        try:
            if error is None:
                return
            # Also after KeyboardInterrupt: a stream may be left in the middle of a message.
            reason = ring._mesh.failure
            message = f"{CALLS[self._call]} #{self._number} on rank {ring.rank} of {ring.world}: "
            message += f"{error}" if reason is None else f"the group was ended before or meanwhile ({reason})"
            ring._mesh.end(message)
            ring._mesh.release()
            if reason is not None:
                raise PeerLost(message) from error
            if isinstance(error, (PeerLost, WaitTimeout)):
                raise blame(type(error)(message), error.peer) from error.__cause__
        finally:
            ring._operating.release()
