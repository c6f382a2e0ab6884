"""Move arrays between the processes of one group over TCP, and reduce them. Knows neither ray nor torch.

A group is a full mesh: one connection per pair of ranks, opened once by `Ring.form`. Worlds are small, a mesh makes
point-to-point free, and every rank sees the death of any other on a socket of its own. A pair has ONE stream, so its
messages keep program order: all ranks make the same calls in the same order, sends and receives included.

Small reductions go directly from everybody to everybody, one hop, and are summed in rank order. Larger ones go round
the ring of `plan.ring`, cut into pieces that are forwarded as soon as they are reduced. Either way every rank ends
with the same bits.

A group is never repaired. The first error, or `abort`, shuts all sockets of this rank down, which ends the operation
of every other rank likewise: no rank is left to its timeout because the dead one was not its neighbour.
"""

from __future__ import annotations

import hmac
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ray.errors import ConfigError, LeptonError, PeerLost, WaitTimeout
from lepton_ray.plan.ring import Move, all_gather, chunk_bounds, reduce_scatter

Array = NDArray[Any]  # any dtype that numpy can hold without objects
Exchange = Callable[[bytes], Sequence[bytes]]
"""Gives the own address to all ranks of a group; returns the addresses of all, by rank."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """How two arrays become one."""

    name: str
    code: int
    apply: Callable[..., object]
    """Called as apply(first, second, out=out) with arrays of one size; out may be one of the others."""


SUM = Reduction("sum", 1, np.add)
PRODUCT = Reduction("product", 2, np.multiply)
MIN = Reduction("min", 3, np.minimum)
MAX = Reduction("max", 4, np.maximum)
_REDUCTION_NAMES = ("", SUM.name, PRODUCT.name, MIN.name, MAX.name)

_ALLREDUCE, _BROADCAST, _ALLGATHER, _REDUCE_SCATTER, _REDUCE, _MESSAGE, _BARRIER = range(7)
_CALLS = ("allreduce", "broadcast", "allgather", "reducescatter", "reduce", "send/recv", "barrier")

# Sent before the first bytes of an operation on each link: call, reduction, dtype kind, item size, root, sequence
# number, elements. Both ends must send the same, so a comparison of bytes is the whole check.
_HEADER = struct.Struct("<4BIIQ")

# What a rank says last when it leaves on purpose. Without it, the end of its stream is a death.
_GOODBYE = _HEADER.pack(0xFF, 0, 0, 0, 0, 0, 0)

# An all-to-all of at most so many outgoing bytes per rank is faster than a ring (and fits into any socket buffer, so
# that all ranks may send before they receive).
_DIRECT_BYTES = 32 << 10
# A piece is received, reduced and forwarded while it is in the cache.
_PIECE_BYTES = 1 << 20
# Socket buffers that keep a link busy while the other end reduces a piece. Set only where the kernel grants them: asking
# for more than it grants leaves a small buffer and turns its own tuning off.
_BUFFER_BYTES = 4 << 20
# Waking a sleeping process on another core costs 50-140 us on a virtual machine, so a short wait is polled. Between two
# polls the core is offered to others: with more ranks than cores the awaited one may need it.
_SPIN_S = 100e-6
BULK = 0.0
# Payloads in scratch memory begin on a cache line; the header lies just before.
_LINE = 64

_MAGIC = b"lepton1\n"
_NONCE_BYTES = 16
_HELLO = struct.Struct(f"<{len(_MAGIC)}sI{_NONCE_BYTES}s")
_PROOF_BYTES = 32
_GUESTS = 64  # connections that may be in the middle of their proof at once


class _Link:
    """The connection to one peer. Says in its errors which peer it was."""

    __slots__ = ("descriptor", "peer", "socket")

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.socket, self.descriptor = peer, connection, connection.fileno()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
            if _kernel_limit(limit) >= _BUFFER_BYTES:
                connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        # Keepalive finds a peer whose machine went silent while nothing is in flight. TCP_USER_TIMEOUT is left alone:
        # it also ends connections to healthy peers that do not read for a while because they compute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def receive(self, view: memoryview) -> int:
        """Receive what is there; return the number of bytes, 0 if nothing is there yet."""
        try:
            count = self.socket.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error
        if not count:
            raise PeerLost(f"rank {self.peer} closed its connection")
        return count

    def send(self, *views: bytes | memoryview) -> int:
        """Send what the kernel takes; return the number of bytes."""
        try:
            return self.socket.sendmsg(views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error

    def lost(self, error: OSError) -> PeerLost:
        return PeerLost(f"the connection to rank {self.peer} broke ({error.strerror or error})")


class _Watch:
    """Waits for some links and keeps an eye on all others, so that any death in the group ends any wait."""

    def __init__(self, links: Iterable[_Link]) -> None:
        self._links = {link.descriptor: link for link in links}
        self._wanted = dict.fromkeys(self._links, -1)
        self._ignored: set[int] = set()
        self._poll = select.poll()
        for link in self._links.values():
            self.want(link, 0)

    def want(self, link: _Link, events: int) -> None:
        """Wait for these poll events of a link from now on."""
        if self._wanted[link.descriptor] != events:
            self._wanted[link.descriptor] = events
            self._register(link.descriptor)

    def wait(self, timeout_s: float, spin_s: float = 0) -> list[_Link]:
        """Return the links that are ready, none when the time is up. Raises PeerLost.

        spin_s: how long to poll before sleeping.
        """
        end_s = time.perf_counter() + spin_s
        while True:
            events = self._poll.poll(0)
            if not events and time.perf_counter() < end_s:
                os.sched_yield()
                continue
            if not events:
                events = self._poll.poll(timeout_s * 1000)
                if not events:
                    return []
            ready = []
            for descriptor, happened in events:
                wanted = self._wanted[descriptor]
                if wanted and happened & (wanted | select.POLLHUP | select.POLLERR):
                    ready.append(self._links[descriptor])
                else:
                    self._inspect(self._links[descriptor])
            if ready:
                return ready

    def _register(self, descriptor: int) -> None:
        mask = self._wanted[descriptor] | (0 if descriptor in self._ignored else select.POLLRDHUP)
        if mask:
            self._poll.register(descriptor, mask)
        else:
            self._poll.unregister(descriptor)

    def _inspect(self, link: _Link) -> None:
        """Decide what it means that a peer nobody waits for has hung up."""
        try:
            ahead = link.socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise link.lost(error) from error
        if not ahead:
            raise PeerLost(f"rank {link.peer} closed its connection")
        # Its last words are unread: a goodbye, or data for a later call. That call will see what became of it.
        self._ignored.add(link.descriptor)
        self._register(link.descriptor)


class _Flow:
    """Sends a queue of views to one link while views are received from another, without a thread."""

    __slots__ = ("_inlet", "_outlet", "_queue", "_ring")

    def __init__(self, ring: Ring, *, outlet: _Link | None = None, inlet: _Link | None = None) -> None:
        self._ring, self._outlet, self._inlet = ring, outlet, inlet
        self._queue: deque[bytes | memoryview] = deque()

    def send(self, *views: bytes | memoryview) -> None:
        """Queue views; nothing is sent before the next `receive` or `flush`."""
        self._queue.extend(view for view in views if len(view))

    def receive(self, view: memoryview) -> None:
        """Fill `view`, sending meanwhile."""
        assert self._inlet is not None
        while view:
            sent = self._push()
            count = self._inlet.receive(view)
            if count:
                view = view[count:]
            elif not sent:
                self._ring._wait(self._inlet, self._outlet if self._queue else None)

    def flush(self) -> None:
        """Send all that is queued."""
        while self._queue:
            if not self._push():
                self._ring._wait(None, self._outlet)

    def _push(self) -> int:
        if not self._queue or self._outlet is None:
            return 0
        view = self._queue[0]
        count = self._outlet.send(view)
        if count == len(view):
            self._queue.popleft()
        else:
            self._queue[0] = view[count:]
        return count


class _Guest:
    """A connection that has not proved yet whose it is."""

    __slots__ = ("nonces", "peer", "said", "socket")

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket, self.said, self.peer = connection, b"", -1
        self.nonces: bytes | None = None


class Ring:
    """A group of `world` processes, this one being `rank`. Call `form` before anything else.

    Operations take 1-D C-contiguous numpy arrays of native byte order and work in place; one runs at a time, whatever
    the thread. They raise PeerLost, WaitTimeout after `timeout_s` without progress, or ConfigError when ranks make
    different calls; each of these ends the group. `close` may be called at any time and more than once.

    secret: the same for all ranks of this group and for nobody else; peers prove that they hold it before a byte of
    theirs is used. The data that follow are neither encrypted nor signed.
    host: the address of this machine that the other ranks can reach.
    """

    def __init__(self, rank: int, world: int, *, secret: bytes, timeout_s: float = 60, host: str = "127.0.0.1") -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"Ring(rank={rank}, world={world}): expected 0 <= rank < world.")
        if timeout_s <= 0:
            raise ConfigError(f"Ring(timeout_s={timeout_s}): expected seconds > 0.")
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._secret, self._host = secret, host
        self._links: dict[int, _Link] = {}
        self._watch = _Watch(())
        self._scratch = np.empty(0, np.uint8)
        self._calls = 0
        self._sent, self._received = [0] * world, [0] * world
        self._operating = threading.Lock()
        # Guards the two below. Never held while waiting, so that abort returns at once.
        self._ending = threading.Lock()
        self._failure: str | None = None
        self._sockets: set[socket.socket] = set()

    # --- formation

    def form(self, exchange: Exchange) -> None:
        """Connect to all peers. Apart from the constructor, so that another thread can abort a formation.

        Each rank connects to all lower ones and then accepts all higher ones; rank 0 only accepts, so somebody always
        listens. Raises PeerLost or WaitTimeout; the group is then closed.
        """
        with self._operating:
            try:
                if self.world > 1:
                    self._connect(exchange)
            except BaseException as error:
                reason = self._failure
                self._end(f"the group could not be formed: {error}")
                self._release()
                if reason is not None:
                    raise PeerLost(f"rank {self.rank} of {self.world} stopped forming its group: {reason}") from error
                if isinstance(error, OSError) and not isinstance(error, LeptonError):
                    raise PeerLost(f"rank {self.rank} of {self.world} could not form its group: {error}") from error
                raise

    def _connect(self, exchange: Exchange) -> None:
        deadline_s = time.monotonic() + self.timeout_s
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = self._own(socket.socket(family, socket.SOCK_STREAM))
        listener.bind((self._host, 0))
        listener.listen(max(_GUESTS, self.world))
        addresses = exchange(f"{self._host}|{listener.getsockname()[1]}".encode())
        for peer in range(self.rank):
            host, port = addresses[peer].decode().rsplit("|", 1)
            self._links[peer] = _Link(peer, self._introduce(peer, host, int(port), deadline_s))
        listener.setblocking(False)
        self._welcome(listener, deadline_s)
        self._disown(listener)
        self._watch = _Watch(self._links.values())

    def _introduce(self, peer: int, host: str, port: int, deadline_s: float) -> socket.socket:
        """Connect to a lower rank; both prove the secret."""
        connection = self._own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM))
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        nonce = os.urandom(_NONCE_BYTES)
        answer = b""
        try:
            connection.connect((host, port))
            connection.sendall(_HELLO.pack(_MAGIC, self.rank, nonce))
            while len(answer) < _NONCE_BYTES + _PROOF_BYTES:
                connection.settimeout(max(0.001, deadline_s - time.monotonic()))
                more = connection.recv(_NONCE_BYTES + _PROOF_BYTES - len(answer))
                if not more:
                    raise PeerLost(f"rank {peer} at {host}:{port} turned rank {self.rank} down")
                answer += more
            nonces = nonce + answer[:_NONCE_BYTES]
            if not hmac.compare_digest(answer[_NONCE_BYTES:], self._proof(b"accept", self.rank, peer, nonces)):
                raise PeerLost(f"who answers at {host}:{port} is not rank {peer} of this group")
            connection.sendall(self._proof(b"connect", self.rank, peer, nonces))
        except TimeoutError as error:
            raise WaitTimeout(
                f"rank {self.rank} waited {self.timeout_s:g} s for rank {peer} at {host}:{port} to answer"
            ) from error
        return connection

    def _welcome(self, listener: socket.socket, deadline_s: float) -> None:
        """Accept all higher ranks. Whoever cannot prove the secret is dropped and holds up nobody."""
        guests: list[_Guest] = []
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while missing := [peer for peer in range(self.rank + 1, self.world) if peer not in self._links]:
                ready = selector.select(max(0.0, deadline_s - time.monotonic()))
                if not ready and time.monotonic() >= deadline_s:
                    raise WaitTimeout(f"rank {self.rank} waited {self.timeout_s:g} s for rank(s) {missing} to connect")
                for key, _ in ready:
                    if key.fileobj is listener:
                        guest = _Guest(self._own(listener.accept()[0]))
                        guests.append(guest)
                        selector.register(guest.socket, selectors.EVENT_READ, guest)
                        # The newest stay: real ranks come at once, while others may fill the house for ever.
                        leaving = guests[: -max(_GUESTS, self.world)]
                    else:
                        leaving = [key.data] if self._hear(key.data) else []
                    for guest in leaving:
                        if guest in guests:
                            guests.remove(guest)
                            selector.unregister(guest.socket)
                            link = self._links.get(guest.peer)
                            if link is None or link.socket is not guest.socket:
                                self._disown(guest.socket)
        for guest in guests:
            self._disown(guest.socket)

    def _hear(self, guest: _Guest) -> bool:
        """Read what a guest says, answer its hello, make a link once it proved itself. Return whether we are done."""
        wanted = _HELLO.size if guest.nonces is None else _PROOF_BYTES
        try:
            more = guest.socket.recv(wanted - len(guest.said))
            guest.said += more
            if len(guest.said) < wanted:
                return not more
            if guest.nonces is None:
                magic, peer, nonce = _HELLO.unpack(guest.said)
                if magic != _MAGIC or not self.rank < peer < self.world:
                    return True
                own_nonce = os.urandom(_NONCE_BYTES)
                guest.peer, guest.nonces, guest.said = peer, nonce + own_nonce, b""
                guest.socket.sendall(own_nonce + self._proof(b"accept", peer, self.rank, guest.nonces))
                return False
        except OSError:
            return True
        is_proven = hmac.compare_digest(guest.said, self._proof(b"connect", guest.peer, self.rank, guest.nonces))
        if is_proven and guest.peer not in self._links:
            self._links[guest.peer] = _Link(guest.peer, guest.socket)
        return True

    def _proof(self, side: bytes, connecting: int, accepting: int, nonces: bytes) -> bytes:
        return hmac.digest(self._secret, side + struct.pack("<II", connecting, accepting) + nonces, "sha256")

    # --- the end

    def abort(self, reason: str = "aborted") -> None:
        """End the group from any thread. What blocks in it, here or on another rank, raises PeerLost at once."""
        self._end(reason)

    def close(self) -> None:
        """Leave the group and release its sockets; an operation in flight in another thread is ended first.

        Peers may finish, without this rank, what it has finished; whatever needs it raises PeerLost.
        """
        if self._operating.acquire(blocking=False):
            try:
                if self._failure is None:
                    for link in self._links.values():
                        try:
                            link.send(_GOODBYE)
                        except PeerLost:
                            pass  # left before us
            finally:
                self._operating.release()
        self._end("closed")
        with self._operating:
            self._release()

    def _end(self, reason: str) -> None:
        with self._ending:
            if self._failure is None:
                self._failure = reason
            for each in self._sockets:
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # not connected any more

    def _release(self) -> None:
        with self._ending:
            for each in self._sockets:
                each.close()
            self._sockets.clear()
            self._links.clear()
            self._scratch = np.empty(0, np.uint8)

    def _own(self, each: socket.socket) -> socket.socket:
        """Let `_end` reach a socket from now on."""
        with self._ending:
            if self._failure is not None:
                each.close()
                raise PeerLost(self._failure)
            self._sockets.add(each)
        return each

    def _disown(self, each: socket.socket) -> None:
        with self._ending:
            self._sockets.discard(each)
            each.close()

    # --- operations

    def allreduce(self, array: Array, op: Reduction = SUM) -> None:
        """Reduce `array` over all ranks into every rank's `array`."""
        with self._operation(_ALLREDUCE, array, op=op) as header:
            if self.world == 1:
                return
            if array.nbytes * (self.world - 1) > _DIRECT_BYTES:
                moves = reduce_scatter(self.rank, self.world) + all_gather(self.rank, self.world)
                self._circulate(header, array, moves, self.world - 1, op)
                return
            parts = self._swap(header, array)
            total = parts[0]
            for rank in range(1, self.world):  # in rank order, for the same bits everywhere
                out = array if rank == self.world - 1 else total
                op.apply(total, parts[rank], out=out)

    def allgather(self, array: Array) -> Array:
        """Return the arrays of all ranks, which are of one size, as the rows of a new one."""
        with self._operation(_ALLGATHER, array) as header:
            rows = np.empty((self.world, array.size), array.dtype)
            rows[self.rank] = array
            if self.world == 1:
                return rows
            if array.nbytes * (self.world - 1) > _DIRECT_BYTES:
                self._circulate(header, rows.reshape(-1), all_gather(self.rank, self.world), 0, SUM)
            else:
                for rank, part in enumerate(self._swap(header, array)):
                    rows[rank] = part
            return rows

    def reducescatter(self, array: Array, op: Reduction = SUM) -> Array:
        """Cut `array` by `chunk_bounds`, reduce over all ranks, and return the part of it that is chunk `rank`.

        The rest of `array` is left half reduced.
        """
        with self._operation(_REDUCE_SCATTER, array, op=op) as header:
            if self.world > 1:
                self._circulate(header, array, reduce_scatter(self.rank, self.world), self.world - 1, op)
            bounds = chunk_bounds(array.size, self.world)
            return array[bounds[self.rank] : bounds[self.rank + 1]]

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Copy the array of `root` into every rank's `array`, along a chain that starts at `root`."""
        with self._operation(_BROADCAST, array, root=root) as header:
            if self.world == 1:
                return
            before, after = self._neighbours()
            flow = _Flow(self, outlet=None if after.peer == root else after, inlet=before)
            if self.rank != root:
                self._expect(flow, before, header)
            if after.peer != root:
                flow.send(header)
            for piece in _pieces(array, 0, array.size):
                if self.rank != root:
                    flow.receive(_bytes_of(piece))
                if after.peer != root:
                    flow.send(_bytes_of(piece))
            flow.flush()

    def reduce(self, array: Array, root: int = 0, op: Reduction = SUM) -> None:
        """Reduce `array` over all ranks into the `array` of `root`, along a chain that ends there."""
        with self._operation(_REDUCE, array, root=root, op=op) as header:
            if self.world == 1:
                return
            before, after = self._neighbours()
            flow = _Flow(self, outlet=None if self.rank == root else after, inlet=before)
            if before.peer != root:
                self._expect(flow, before, header)
            if self.rank != root:
                flow.send(header)
            for piece in _pieces(array, 0, array.size):
                if before.peer != root:
                    scratch = self._room(piece.nbytes)[: piece.nbytes]
                    flow.receive(memoryview(scratch))
                    received = scratch.view(array.dtype)
                    out = piece if self.rank == root else received
                    op.apply(received, piece, out=out)
                    piece = out
                if self.rank != root:
                    flow.send(_bytes_of(piece))
                    flow.flush()  # before the scratch memory is used again
            flow.flush()

    def send(self, array: Array, to: int) -> None:
        """Send `array` to one rank. Returns when the kernel has taken all of it."""
        with self._operation(_MESSAGE, array, root=to, counter=self._sent, peer=to) as header:
            flow = _Flow(self, outlet=self._links[to])
            flow.send(header, _bytes_of(array))
            flow.flush()

    def recv(self, array: Array, source: int) -> None:
        """Receive into `array` what rank `source` sends."""
        with self._operation(_MESSAGE, array, root=self.rank, counter=self._received, peer=source) as header:
            flow = _Flow(self, inlet=self._links[source])
            self._expect(flow, self._links[source], header)
            flow.receive(_bytes_of(array))

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        nothing = np.empty(0, np.uint8)
        with self._operation(_BARRIER, nothing) as header:
            self._swap(header, nothing)

    @contextmanager
    def limited(self, timeout_s: float) -> Iterator[None]:
        """Give the operations of this context another limit than the group's."""
        usual_s, self.timeout_s = self.timeout_s, timeout_s
        try:
            yield
        finally:
            self.timeout_s = usual_s

    # --- inside an operation

    @contextmanager
    def _operation(
        self,
        call: int,
        array: Array,
        *,
        op: Reduction | None = None,
        root: int = 0,
        counter: list[int] | None = None,
        peer: int | None = None,
    ) -> Iterator[bytes]:
        """Check the input, hold the group for one operation, give its header; end the group on any error.

        counter, peer: for point-to-point messages, which are counted per pair and direction.
        """
        dtype = array.dtype
        if array.ndim != 1 or not array.flags.c_contiguous or not dtype.isnative or dtype.hasobject:
            raise ConfigError(
                f"{_CALLS[call]} got an array of shape {array.shape} and dtype {dtype}: expected one dimension, "
                "C-contiguous, numbers in native byte order. Use np.ascontiguousarray(x).reshape(-1)."
            )
        for other in (root, 0 if peer is None else peer):
            if not 0 <= other < self.world or peer == self.rank:
                raise ConfigError(f"{_CALLS[call]} with rank {other}: this is rank {self.rank} of {self.world}.")
        with self._operating:
            if counter is None or peer is None:
                self._calls = number = (self._calls + 1) & 0xFFFFFFFF
            else:
                counter[peer] = number = (counter[peer] + 1) & 0xFFFFFFFF
            try:
                if self._failure is not None:
                    raise PeerLost("it has ended")
                if self.world > 1 and not self._links:
                    raise ConfigError("Ring.form was not called.")
                yield _HEADER.pack(
                    call, op.code if op else 0, ord(dtype.kind), dtype.itemsize & 0xFF, root, number, array.size
                )
            except BaseException as error:  # also KeyboardInterrupt: a stream may be left in the middle of a message
                reason = self._failure
                message = f"{_CALLS[call]} #{number} on rank {self.rank} of {self.world}: "
                message += f"{error}" if reason is None else f"the group was ended before or meanwhile ({reason})"
                self._end(message)
                self._release()
                if reason is not None:
                    raise PeerLost(message) from error
                if isinstance(error, (PeerLost, WaitTimeout)):
                    raise type(error)(message) from error.__cause__
                raise

    def _neighbours(self) -> tuple[_Link, _Link]:
        return self._links[(self.rank - 1) % self.world], self._links[(self.rank + 1) % self.world]

    def _room(self, size_bytes: int) -> NDArray[np.uint8]:
        if self._scratch.size < size_bytes:
            self._scratch = np.empty(max(size_bytes, _PIECE_BYTES), np.uint8)
        return self._scratch

    def _wait(self, inlet: _Link | None, outlet: _Link | None) -> None:
        """Wait until bytes can be received from one link or sent to another."""
        if inlet is not None:
            both = select.POLLOUT if inlet is outlet else 0
            self._watch.want(inlet, select.POLLIN | both)
        if outlet is not None and outlet is not inlet:
            self._watch.want(outlet, select.POLLOUT)
        if not self._watch.wait(self.timeout_s, BULK):
            raise self._late([link.peer for link in (inlet, outlet) if link is not None][:1])
        for link in (inlet, outlet):
            if link is not None:
                self._watch.want(link, 0)

    def _late(self, peers: Sequence[int]) -> WaitTimeout:
        return WaitTimeout(f"nothing moved to or from rank {', '.join(map(str, peers))} for {self.timeout_s:g} s")

    def _swap(self, header: bytes, array: Array) -> list[Array]:
        """Exchange a small array with every peer; return the arrays of all ranks, valid until the next operation."""
        view, size_bytes = _bytes_of(array), array.nbytes
        stride = (size_bytes + 2 * _LINE - 1) // _LINE * _LINE
        scratch = self._room(stride * self.world)
        parts = []
        missing = {}
        for rank in range(self.world):
            start = rank * stride + _LINE
            if rank == self.rank:
                parts.append(array)
                continue
            parts.append(scratch[start : start + size_bytes].view(array.dtype))
            missing[rank] = memoryview(scratch[start - _HEADER.size : start + size_bytes]), 0
            link = self._links[rank]
            sent = link.send(header, view)
            if sent < _HEADER.size + size_bytes:  # rare: the kernel's buffer holds messages that are still unread
                flow = _Flow(self, outlet=link)
                flow.send(memoryview(header + view)[sent:])
                flow.flush()
            self._watch.want(link, select.POLLIN)
        while missing:
            ready = self._watch.wait(self.timeout_s, _SPIN_S)
            if not ready:
                raise self._late(list(missing))
            for link in ready:
                area, filled = missing[link.peer]
                filled += link.receive(area[filled:])
                if filled >= _HEADER.size:
                    self._check(link.peer, header, area[: _HEADER.size])
                missing[link.peer] = area, filled
                if filled == len(area):
                    del missing[link.peer]
                    self._watch.want(link, 0)
        return parts

    def _circulate(self, header: bytes, array: Array, moves: Sequence[Move], reducing: int, op: Reduction) -> None:
        """Make the moves of a ring. The first `reducing` of them reduce what is received, the others store it."""
        before, after = self._neighbours()
        flow = _Flow(self, outlet=after, inlet=before)
        bounds = chunk_bounds(array.size, self.world)
        flow.send(header)
        flow.send(*map(_bytes_of, _pieces(array, bounds[moves[0].send], bounds[moves[0].send + 1])))
        self._expect(flow, before, header)
        for index, move in enumerate(moves):
            for piece in _pieces(array, bounds[move.receive], bounds[move.receive + 1]):
                if index < reducing:
                    scratch = self._room(piece.nbytes)[: piece.nbytes]
                    flow.receive(memoryview(scratch))
                    op.apply(scratch.view(array.dtype), piece, out=piece)
                else:
                    flow.receive(_bytes_of(piece))
                if index + 1 < len(moves):
                    # What is queued is not written again before the next rank has it: only its share or its copy,
                    # made after it had this piece, can come round and overwrite the piece.
                    flow.send(_bytes_of(piece))
        flow.flush()

    def _expect(self, flow: _Flow, link: _Link, header: bytes) -> None:
        arrived = memoryview(bytearray(_HEADER.size))
        flow.receive(arrived)
        self._check(link.peer, header, arrived)

    def _check(self, peer: int, own: bytes, arrived: memoryview) -> None:
        """Raise unless a peer began the very operation that we are in."""
        if arrived == own:
            return
        if arrived == _GOODBYE:
            raise PeerLost(f"rank {peer} has left the group")
        raise ConfigError(
            f"rank {self.rank} calls {_describe(own)} but rank {peer} calls {_describe(arrived)}. All ranks of a group "
            "must make the same calls in the same order, with arrays of equal size and dtype."
        )


@cache
def _kernel_limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        return 0


def _bytes_of(array: Array) -> memoryview:
    return memoryview(array.view(np.uint8))


def _pieces(array: Array, start: int, stop: int) -> Iterator[Array]:
    step = max(1, _PIECE_BYTES // array.itemsize)
    for lower in range(start, stop, step):
        yield array[lower : min(lower + step, stop)]


def _describe(header: bytes | memoryview) -> str:
    call, reduction, kind, itemsize, root, number, count = _HEADER.unpack(header)
    if call >= len(_CALLS) or reduction >= len(_REDUCTION_NAMES):
        return "something unknown"
    detail = [_REDUCTION_NAMES[reduction]] if reduction else []
    detail += [f"rank {root}"] if call in (_BROADCAST, _REDUCE, _MESSAGE) else []
    return f"{_CALLS[call]}({', '.join(detail)}) #{number} of {count} x {chr(kind)}{itemsize}"
