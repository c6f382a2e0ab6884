"""Move bytes over the connections of a group: send, receive, and wait without missing anybody's death."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from lepton_ray.errors import PeerLost, WaitTimeout, blame

# Socket buffers that keep a link busy while the other end reduces a piece. Set only where the kernel grants them:
# asking for more than it grants leaves a small buffer and turns its own tuning off.
_BUFFER_BYTES = 4 << 20
_LOOK_S = 1.0
"""Who waits longer looks, so often, whether the other machines still answer."""
_SILENT_MS = 3000
"""A machine that has not acknowledged what it was sent again and again is taken for gone after so long."""
_RETRIES = 3
_INFO = struct.Struct("=2xB5x16xI28xI")  # of Linux' tcp_info: retransmits, unacked, last_ack_recv
SILENT = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""Errors of a connection whose other end says nothing any more."""


class Link:
    """The connection to one peer. Says in its errors which peer it was."""

    __slots__ = ("descriptor", "peer", "socket")

    @property
    def has_unread(self) -> bool:
        """Say whether bytes have been taken from the kernel that nobody has received yet, so that it announces none."""
        return False

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.socket, self.descriptor = peer, connection, connection.fileno()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
            if _kernel_limit(limit) >= _BUFFER_BYTES:
                connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        # Keepalive finds a peer whose machine went silent while nothing is in flight, `look` while something is.
        # TCP_USER_TIMEOUT is left alone: it also ends connections to healthy peers that do not read for a while because
        # they compute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
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
        """Say which connection broke."""
        found = PeerLost(f"the connection to rank {self.peer} broke ({error.strerror or error})")
        return blame(found, self.peer if error.errno in SILENT else None)

    def look(self) -> None:
        """Raise PeerLost if the other machine acknowledges nothing of what it is sent, for seconds."""
        if sys.platform != "linux":
            return
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        except OSError:
            return  # whoever uses it will see
        retries, unacknowledged, silent_ms = _INFO.unpack(info)
        # A peer that does not read has a closed window, and nothing on its way that it would have to acknowledge.
        if unacknowledged and retries >= _RETRIES and silent_ms >= _SILENT_MS:
            what = f"the machine of rank {self.peer} has not answered for {silent_ms / 1000:.1f} s"
            raise blame(PeerLost(what), self.peer)


class Watch:
    """Waits for some links and keeps an eye on all others, so that any death in the group ends any wait."""

    def __init__(self, links: Iterable[Link]) -> None:
        self._links = {link.descriptor: link for link in links}
        self._wanted = dict.fromkeys(self._links, -1)
        self._holds_back = any(type(link) is not Link for link in self._links.values())
        self._ignored: set[int] = set()
        self._poll = select.poll()
        for link in self._links.values():
            self.want(link, 0)

    def want(self, link: Link, events: int) -> None:
        """Wait for these poll events of a link from now on."""
        if self._wanted[link.descriptor] != events:
            self._wanted[link.descriptor] = events
            self._register(link.descriptor)

    def wait(self, timeout_s: float, spin_s: float = 0) -> list[Link]:
        """Return the links that are ready, none when the time is up. Raises PeerLost.

        spin_s: how long to poll before sleeping.
        """
        if self._holds_back:
            unread = [link for link in self._links.values() if self._wants(link) and link.has_unread]
            if unread:
                return unread
        end_s = time.perf_counter() + spin_s
        while True:
            events = self._poll.poll(0)
            if not events and time.perf_counter() < end_s:
                os.sched_yield()
                continue
            if not events:
                events = self._long_poll(timeout_s)
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

    def _long_poll(self, timeout_s: float) -> list[tuple[int, int]]:
        """Poll, and look at times after those that cannot say that they are gone. Raises PeerLost."""
        end_s = time.monotonic() + timeout_s
        while True:
            left_s = end_s - time.monotonic()
            events = self._poll.poll(min(max(left_s, 0.0), _LOOK_S) * 1000)
            if events or left_s <= _LOOK_S:
                return events
            for link in self._links.values():
                link.look()

    def _wants(self, link: Link) -> bool:
        return self._wanted[link.descriptor] & select.POLLIN != 0

    def _register(self, descriptor: int) -> None:
        mask = self._wanted[descriptor] | (0 if descriptor in self._ignored else select.POLLRDHUP)
        if mask:
            self._poll.register(descriptor, mask)
        else:
            self._poll.unregister(descriptor)

    def _inspect(self, link: Link) -> None:
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

    def wait_for(self, inlet: Link | None, outlets: Iterable[Link], timeout_s: float) -> None:
        """Wait until bytes can be received from one link or sent to others. Raises PeerLost or WaitTimeout."""
        wanted: dict[Link, int] = {}
        if inlet is not None:
            wanted[inlet] = select.POLLIN
        for outlet in outlets:
            wanted[outlet] = wanted.get(outlet, 0) | select.POLLOUT
        for link, events in wanted.items():
            self.want(link, events)
        if not self.wait(timeout_s):
            raise late([link.peer for link in wanted][:1], timeout_s)
        for link in wanted:
            self.want(link, 0)


Parcel = bytes | memoryview | Callable[[], memoryview]
"""What is to be sent, or what makes it when its turn has come."""


class Flow:
    """Sends queues of parcels to some links while views are received from others, without a thread."""

    __slots__ = ("_inlet", "_outlet", "_queues", "_timeout_s", "_watch")

    def __init__(
        self, watch: Watch, timeout_s: float, *, outlet: Link | None = None, inlet: Link | None = None
    ) -> None:
        """timeout_s: longest wait without progress. outlet, inlet: used where a call names none."""
        self._watch, self._timeout_s, self._outlet, self._inlet = watch, timeout_s, outlet, inlet
        self._queues: dict[Link, deque[Parcel]] = {}

    def send(self, *parcels: Parcel, to: Link | None = None) -> None:
        """Queue parcels; nothing is sent before the next `receive` or `flush`."""
        link = to or self._outlet
        assert link is not None
        self._queues.setdefault(link, deque()).extend(each for each in parcels if callable(each) or len(each))

    def receive(self, view: memoryview, source: Link | None = None) -> None:
        """Fill `view`, sending meanwhile."""
        inlet = source or self._inlet
        assert inlet is not None
        while view:
            sent = self._push()
            count = inlet.receive(view)
            if count:
                view = view[count:]
            elif not sent:
                self._watch.wait_for(inlet, self._waiting(), self._timeout_s)

    def flush(self, keep: int = 0) -> None:
        """Send all that is queued but the last `keep` parcels."""
        while sum(map(len, self._queues.values())) > keep:
            if not self._push():
                self._watch.wait_for(None, self._waiting(), self._timeout_s)

    def push(self) -> list[Link]:
        """Send what the kernel takes now; return the links that want more."""
        self._push()
        return self._waiting()

    def _waiting(self) -> list[Link]:
        return [link for link, queue in self._queues.items() if queue]

    def _push(self) -> int:
        """Send a parcel, or what goes of it, to each link; return the bytes."""
        total = 0
        for link, queue in self._queues.items():
            if not queue:
                continue
            parcel = queue[0]
            view = parcel() if callable(parcel) else parcel
            count = link.send(view)
            if count == len(view):
                queue.popleft()
            else:
                queue[0] = view[count:]
            total += count
        return total


def late(peers: Sequence[int], timeout_s: float) -> WaitTimeout:
    """Say whom a wait was for that has met its limit."""
    return WaitTimeout(f"nothing moved to or from rank {', '.join(map(str, peers))} for {timeout_s:g} s")


@cache
def _kernel_limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        return 0
