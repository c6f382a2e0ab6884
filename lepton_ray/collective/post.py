"""Carry messages between two ranks, by tag, in any order, beside whatever else their group does.

In a `Ring` a pair has one stream, and its messages keep program order: a receive that waits would hold up the sums
behind it. Programs that post sends and receives, and wait for them later and in another order on every rank, need more.
So a `Post` has connections and a thread of its own.

A message travels once both sides want it: the receiver asks, the sender offers, and who comes second starts it. So what
arrives has a place, nothing piles up, and no message holds up one with another tag. Where the receiver was first, the
sender sends at once. Messages of one pair and tag keep their order.

As in the group, the first error ends it all, and whoever has a message under way notices everybody's death.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from lepton_ray.collective.links import Link, late
from lepton_ray.collective.mesh import Exchange, Mesh
from lepton_ray.errors import ConfigError, LeptonError, PeerLost

ANYBODY = -1

Done = Callable[[LeptonError | None, int], object]
"""Is told how a message ended: None or the error, and the rank on the other side. Must not wait for anything."""

# Kind, tag, size of the message in bytes.
_FRAME = struct.Struct("<Bqq")
_ASK, _OFFER, _SEND, _SEND_OFFERED, _GOODBYE = range(5)
_READS = 16  # of one connection, before another one has its turn
_VIEWS = 8  # sent in one call


class _Letter:
    """One side of a message."""

    __slots__ = ("deadline_s", "done", "limit_s", "peer", "tag", "view")

    def __init__(self, view: memoryview, peer: int, tag: int, limit_s: float, done: Done) -> None:
        self.view, self.peer, self.tag, self.limit_s, self.done = view, peer, tag, limit_s, done
        self.touch()

    def touch(self) -> None:
        """Start the time limit afresh."""
        self.deadline_s = time.monotonic() + self.limit_s


class _Lane:
    """What is under way between this rank and one other under one tag."""

    __slots__ = ("asked", "offers", "receives", "sends")

    def __init__(self) -> None:
        self.sends: deque[_Letter] = deque()
        """Offered, and not asked for yet."""
        self.asked: deque[int] = deque()
        """Sizes that the other has asked for, with nothing to send yet."""
        self.receives: deque[_Letter] = deque()
        """Asked for. The other answers in this order."""
        self.offers = 0
        """Of the other, that have not arrived. They come before any message without an offer, so the receives take them
        first; only what is left over may go to whoever takes a message from anybody."""


class _Line:
    """The connection to one peer: what goes out, and where the incoming bytes belong."""

    __slots__ = ("arriving", "header", "is_gone", "is_waiting", "lanes", "link", "out", "place")

    def __init__(self, link: Link) -> None:
        self.link, self.is_gone = link, False
        self.is_waiting = False
        """For the kernel to take more."""
        self.lanes: dict[int, _Lane] = {}
        self.out: deque[tuple[bytes | memoryview, _Letter | None]] = deque()
        """What to send, with the letter that is done when it has gone."""
        self.header = memoryview(bytearray(_FRAME.size))
        self.place = self.header
        """What is still to be filled of a header or a letter."""
        self.arriving: _Letter | None = None

    def lane(self, tag: int) -> _Lane:
        return self.lanes.setdefault(tag, _Lane())

    def tidy(self, tag: int) -> None:
        """Forget a lane in which nothing is under way: programs count their messages in tags."""
        lane = self.lane(tag)
        if not (lane.sends or lane.asked or lane.receives or lane.offers):
            del self.lanes[tag]

    def put(self, kind: int, tag: int = 0, size_bytes: int = 0, letter: _Letter | None = None) -> None:
        """Queue a frame, and the letter that follows it."""
        self.out.append((_FRAME.pack(kind, tag, size_bytes), None if size_bytes else letter))
        if letter is not None and size_bytes:
            self.out.append((letter.view, letter))


class Post:
    """The messages of one rank of a group. All methods but `form` may be called from any thread.

    secret, host, identity: as in `Ring`; the secret must be another one than that of the group's own connections.
    on_failure: is told why it ends when it ends by itself.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        secret: bytes,
        timeout_s: float,
        host: str,
        on_failure: Callable[[str], object],
        identity: bytes | None = None,
    ) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._on_failure = on_failure
        self._mesh = Mesh(rank, world, secret, host, timeout_s, identity)
        self._lines: dict[int, _Line] = {}
        self._anybody: list[_Letter] = []
        """Receives from anybody, that nobody has a message for yet."""
        self._letters: dict[_Letter, None] = {}
        """All that are under way, in the order in which they were posted."""
        self._ended: deque[tuple[_Letter, LeptonError | None]] = deque()
        """Letters whose owners do not know it yet: they are told without the lock."""
        self._lock = threading.Lock()  # guards all of the above, and the connections. Nobody waits while holding it
        self._failure: str | None = None
        self._epoll = select.epoll()  # takes changes while a thread sleeps on it
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._sleeps_until_s = float("inf")
        self._thread: threading.Thread | None = None

    def form(self, exchange: Exchange) -> None:
        """Connect to all peers; see `Ring.form`."""
        try:
            self._mesh.form(exchange)
        except BaseException:
            self.close()
            raise
        self._lines = {link.descriptor: _Line(link) for link in self._mesh.links.values()}
        for descriptor in self._lines:
            self._epoll.register(descriptor, select.EPOLLIN)

    def send(self, view: memoryview, to: int, tag: int, done: Done, timeout_s: float | None = None) -> None:
        """Send bytes to one rank. They must not change before `done` is called."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        self._post(_Letter(view, to, tag, limit_s, done), self._offer)

    def receive(self, view: memoryview, source: int, tag: int, done: Done, timeout_s: float | None = None) -> None:
        """Receive into `view` what rank `source`, or ANYBODY, sends under `tag`."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        self._post(_Letter(view, source, tag, limit_s, done), self._ask)

    def abort(self, reason: str = "aborted") -> None:
        """End what is under way, on all ranks. May be called more than once."""
        with self._lock:
            self._end(PeerLost(reason))
        self._tell()

    def close(self) -> None:
        """Leave, and release the connections and the thread. May be called more than once."""
        with self._lock:
            if self._failure is None:
                for line in self._lines.values():
                    if not line.is_gone:
                        line.put(_GOODBYE)
                        try:
                            self._push(line)
                        except PeerLost:
                            pass  # left before us
            self._end(PeerLost("closed"))
            thread, self._thread = self._thread, None
        self._tell()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            self._mesh.release()
            if not self._epoll.closed:
                self._epoll.close()
                os.close(self._bell)

    # --- posting

    def _post(self, letter: _Letter, start: Callable[[_Letter], object]) -> None:
        with self._lock:
            if self._failure is not None:
                raise PeerLost(f"rank {self.rank} of {self.world} sends and receives no more: {self._failure}")
            if letter.peer != ANYBODY and letter.peer not in self._mesh.links:
                raise ConfigError(f"a message to or from rank {letter.peer}: this is rank {self.rank} of {self.world}.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="lepton-post")
                self._thread.start()
            self._letters[letter] = None
            failure = None
            try:
                start(letter)
            except LeptonError as error:
                failure = self._end(error)
            if letter.deadline_s < self._sleeps_until_s:
                os.eventfd_write(self._bell, 1)
        self._tell(failure)

    def _offer(self, letter: _Letter) -> None:
        line = self._line(letter.peer)
        lane = line.lane(letter.tag)
        if lane.asked:
            self._answer(line, letter, lane.asked.popleft(), _SEND)
            line.tidy(letter.tag)
        else:
            lane.sends.append(letter)
            line.put(_OFFER, letter.tag)
            self._push(line)

    def _ask(self, letter: _Letter) -> None:
        if letter.peer == ANYBODY:
            self._anybody.append(letter)
            for line in self._lines.values():
                self._share_out(line, letter.tag)
            return
        line = self._line(letter.peer)
        line.lane(letter.tag).receives.append(letter)
        line.put(_ASK, letter.tag, len(letter.view))
        self._push(line)

    def _share_out(self, line: _Line, tag: int) -> None:
        """Ask for what was offered and not asked for, on behalf of those who take a message from anybody."""
        lane = line.lanes.get(tag)
        while lane is not None and lane.offers > len(lane.receives):
            letter = next((each for each in self._anybody if each.tag == tag), None)
            if letter is None:
                return
            self._anybody.remove(letter)
            letter.peer = line.link.peer
            self._ask(letter)

    def _answer(self, line: _Line, letter: _Letter, asked_bytes: int, kind: int) -> None:
        """Send a letter that was asked for."""
        size_bytes = len(letter.view)
        line.put(kind, letter.tag, size_bytes, letter)
        self._push(line)
        if asked_bytes != size_bytes:
            raise _misfit(self.rank, line.link.peer, letter.tag, size_bytes, asked_bytes)

    def _line(self, peer: int) -> _Line:
        line = self._lines[self._mesh.links[peer].descriptor]
        if line.is_gone:
            raise PeerLost(f"rank {peer} has left the group")
        return line

    # --- moving bytes

    def _push(self, line: _Line) -> None:
        """Send what the kernel takes; the thread sends the rest."""
        while line.out:
            count = line.link.send(*(view for view, _ in islice(line.out, _VIEWS)))
            if not count:
                break
            while count:
                view, letter = line.out[0]
                if letter is not None:
                    letter.touch()
                if count < len(view):
                    line.out[0] = memoryview(view)[count:], letter
                    break
                count -= len(view)
                line.out.popleft()
                if letter is not None:
                    self._finish(letter)
        if line.is_waiting != bool(line.out):
            line.is_waiting = bool(line.out)
            events = select.EPOLLIN | (select.EPOLLOUT if line.is_waiting else 0)
            self._epoll.modify(line.link.descriptor, events)

    def _take(self, line: _Line) -> None:
        """Receive what is there."""
        turn = 0
        while turn < _READS or line.link.has_unread:
            turn += 1
            count = line.link.receive(line.place)
            if not count:
                return
            line.place = line.place[count:]
            if line.arriving is not None:
                line.arriving.touch()
            if line.place:
                continue
            letter, line.arriving, line.place = line.arriving, None, line.header
            if letter is not None:
                self._finish(letter)
            elif not self._heed(line):
                return

    def _heed(self, line: _Line) -> bool:
        """Do what a frame says; return whether more may follow."""
        kind, tag, size_bytes = _FRAME.unpack(line.header)
        peer = line.link.peer
        if kind == _GOODBYE:
            self._part_from(line)
            return False
        lane = line.lane(tag)
        if kind == _ASK:
            if lane.sends:
                self._answer(line, lane.sends.popleft(), size_bytes, _SEND_OFFERED)
            else:
                lane.asked.append(size_bytes)
        elif kind == _OFFER:
            lane.offers += 1
            self._share_out(line, tag)
        elif kind in (_SEND, _SEND_OFFERED) and lane.receives:
            letter = lane.receives.popleft()
            lane.offers -= kind == _SEND_OFFERED
            if size_bytes != len(letter.view):
                raise _misfit(peer, self.rank, tag, size_bytes, len(letter.view))
            if size_bytes:
                line.arriving, line.place = letter, letter.view
            else:
                self._finish(letter)
        else:
            raise PeerLost(f"rank {peer} sent what nobody asked for")
        line.tidy(tag)
        return True

    def _part_from(self, line: _Line) -> None:
        """Let a peer go that has left on purpose. Raise PeerLost if somebody waits for it."""
        line.is_gone = True
        self._epoll.unregister(line.link.descriptor)
        is_last = all(each.is_gone for each in self._lines.values())
        if line.out or any(lane.receives or lane.sends for lane in line.lanes.values()) or (self._anybody and is_last):
            raise PeerLost(f"rank {line.link.peer} has left the group")
        line.lanes.clear()

    # --- the thread

    def _serve(self) -> None:
        while True:
            with self._lock:
                if self._failure is not None:
                    return
                self._sleeps_until_s = min((each.deadline_s for each in self._letters), default=float("inf"))
                limit_s = self._sleeps_until_s - time.monotonic()
            events = self._epoll.poll(None if limit_s == float("inf") else max(0.0, limit_s))
            failure = None
            with self._lock:
                try:
                    for descriptor, happened in events:
                        self._turn_to(descriptor, happened)
                    self._check_time()
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody may be left waiting
                    if self._failure is None:
                        failure = self._end(error if isinstance(error, LeptonError) else PeerLost(repr(error)))
            self._tell(failure)

    def _turn_to(self, descriptor: int, happened: int) -> None:
        if descriptor == self._bell:
            os.eventfd_read(self._bell)
            return
        line = self._lines[descriptor]
        if line.is_gone:
            return
        if happened & select.EPOLLOUT:
            self._push(line)
        if happened & ~select.EPOLLOUT:
            self._take(line)

    def _check_time(self) -> None:
        now_s = time.monotonic()
        for letter in self._letters:
            if letter.deadline_s <= now_s:
                raise late(sorted(self._mesh.links) if letter.peer == ANYBODY else [letter.peer], letter.limit_s)

    # --- ending

    def _finish(self, letter: _Letter) -> None:
        del self._letters[letter]
        self._ended.append((letter, None))

    def _end(self, error: LeptonError) -> str | None:
        """End all that is under way; return the reason if it is the first one."""
        if self._failure is not None:
            return None
        self._failure = reason = f"{error}"
        self._ended.extend((letter, error) for letter in self._letters)
        self._letters.clear()
        self._anybody.clear()
        self._mesh.end(reason)
        os.eventfd_write(self._bell, 1)
        return reason

    def _tell(self, failure: str | None = None) -> None:
        """Tell the owners of letters how they ended, and the owner of this what failed. Without the lock."""
        while self._ended:
            try:
                letter, error = self._ended.popleft()
            except IndexError:
                break  # another thread tells it
            letter.done(error, letter.peer)
        if failure is not None:
            self._on_failure(failure)


def _misfit(sender: int, receiver: int, tag: int, sent_bytes: int, wanted_bytes: int) -> ConfigError:
    return ConfigError(
        f"rank {sender} sends {sent_bytes} bytes under tag {tag} where rank {receiver} receives {wanted_bytes}. "
        "Both must name tensors of equal size."
    )
