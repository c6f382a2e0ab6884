"""Connect all processes of a group with each other, admitting only those that prove the group's secret."""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from lepton_ray.collective.links import SILENT, Link, Watch
from lepton_ray.collective.tls import Tls
from lepton_ray.errors import LeptonError, PeerLost, WaitTimeout, blame

Exchange = Callable[[bytes], Sequence[bytes]]
"""Gives the own address to all ranks of a group; returns the addresses of all, by rank."""

_MAGIC = b"lepton1\n"
_NONCE_BYTES = 16
_HELLO = struct.Struct(f"<{len(_MAGIC)}sI{_NONCE_BYTES}s")
_PROOF_BYTES = 32
_CONNECT_S = 5.0  # the peer listens already, and its kernel answers at once
_GUESTS = 64  # connections that may be in the middle of their proof at once


class _Guest:
    """A connection that has not proved yet whose it is."""

    __slots__ = ("nonces", "peer", "said", "socket")

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket, self.said, self.peer = connection, b"", -1
        self.nonces: bytes | None = None


class Mesh:
    """One connection to each peer of rank `rank`: `links`, once `form` has returned.

    The challenge goes both ways: HMAC-SHA256 over the ranks of both ends and a nonce of each.
    """

    def __init__(
        self, rank: int, world: int, secret: bytes, host: str, timeout_s: float, identity: bytes | None = None
    ) -> None:
        """host: the address of this machine that the other ranks can reach. timeout_s: of the whole formation.

        identity: of the group, from `tls.make_identity`, to encrypt what follows the challenge.
        """
        self._tls = None if identity is None else Tls(identity)
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._secret, self._host = secret, host
        self.links: dict[int, Link] = {}
        self.watch = Watch(())
        # Guards the two below. Never held while waiting, so that `end` returns at once.
        self._ending = threading.Lock()
        self.failure: str | None = None
        """Why the mesh has ended; None while it has not."""
        self._sockets: set[socket.socket] = set()
        self._ends: list[Callable[[], object]] = []
        self._releases: list[Callable[[], object]] = []

    def form(self, exchange: Exchange) -> None:
        """Connect to all peers.

        Each rank connects to all lower ones and then accepts all higher ones; rank 0 only accepts, so somebody always
        listens. Raises PeerLost or WaitTimeout; the group is then closed.
        """
        try:
            if self.world > 1:
                self._connect(exchange)
        except BaseException as error:
            reason = self.failure
            self.end(f"the group could not be formed: {error}")
            self.release()
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
            begun_s = time.monotonic()
            try:
                self.links[peer] = self._link(peer, self._introduce(peer, host, int(port), deadline_s), deadline_s)
            except OSError as error:
                if not isinstance(error, TimeoutError) and error.errno not in SILENT:
                    raise
                waited_s = time.monotonic() - begun_s
                what = f"rank {self.rank} waited {waited_s:.1f} s for rank {peer} at {host}:{port} to answer"
                raise blame(WaitTimeout(what), peer) from error
        listener.setblocking(False)
        self._welcome(listener, deadline_s)
        self._disown(listener)
        self.watch = Watch(self.links.values())

    def _introduce(self, peer: int, host: str, port: int, deadline_s: float) -> socket.socket:
        """Connect to a lower rank; both prove the secret. Raises PeerLost or OSError."""
        connection = self._own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM))
        connection.settimeout(max(0.001, min(_CONNECT_S, deadline_s - time.monotonic())))
        nonce = os.urandom(_NONCE_BYTES)
        answer = b""
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
        return connection

    def _link(self, peer: int, connection: socket.socket, deadline_s: float) -> Link:
        """Make a link of a connection that has been proved, both ways."""
        if self._tls is None:
            return Link(peer, connection)
        return self._tls.seal(peer, connection, is_server=peer > self.rank, deadline_s=deadline_s)

    def _welcome(self, listener: socket.socket, deadline_s: float) -> None:
        """Accept all higher ranks. Whoever cannot prove the secret is dropped and holds up nobody."""
        guests: list[_Guest] = []
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while missing := [peer for peer in range(self.rank + 1, self.world) if peer not in self.links]:
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
                        leaving = [key.data] if self._hear(key.data, deadline_s) else []
                    for guest in leaving:
                        if guest in guests:
                            guests.remove(guest)
                            selector.unregister(guest.socket)
                            link = self.links.get(guest.peer)
                            if link is None or link.socket is not guest.socket:
                                self._disown(guest.socket)
        for guest in guests:
            self._disown(guest.socket)

    def _hear(self, guest: _Guest, deadline_s: float) -> bool:
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
        if is_proven and guest.peer not in self.links:
            self.links[guest.peer] = self._link(guest.peer, guest.socket, deadline_s)
        return True

    def _proof(self, side: bytes, connecting: int, accepting: int, nonces: bytes) -> bytes:
        return hmac.digest(self._secret, side + struct.pack("<II", connecting, accepting) + nonces, "sha256")

    def attach(self, end: Callable[[], object], release: Callable[[], object]) -> None:
        """Let something else end and be released together with the mesh. Raises PeerLost when it has ended already."""
        with self._ending:
            if self.failure is not None:
                release()
                raise PeerLost(self.failure)
            self._ends.append(end)
            self._releases.append(release)

    def look(self) -> None:
        """Raise PeerLost if a connection broke. Waits for nothing."""
        self.watch.wait(0)

    def end(self, reason: str) -> None:
        """Shut all sockets down, from any thread, which wakes whoever waits for one of them."""
        with self._ending:
            if self.failure is None:
                self.failure = reason
            for each in self._sockets:
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # not connected any more
            for end in self._ends:
                end()

    def release(self) -> None:
        """Close all sockets. Not while another thread uses them."""
        with self._ending:
            for each in self._sockets:
                each.close()
            self._sockets.clear()
            self.links.clear()
            for release in self._releases:
                release()
            self._ends, self._releases = [], []

    def _own(self, each: socket.socket) -> socket.socket:
        """Let `end` reach a socket from now on."""
        with self._ending:
            if self.failure is not None:
                each.close()
                raise PeerLost(self.failure)
            self._sockets.add(each)
        return each

    def _disown(self, each: socket.socket) -> None:
        with self._ending:
            self._sockets.discard(each)
            each.close()
