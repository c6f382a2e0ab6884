"""Where the ranks of a node meet: one counter per rank in shared memory, and nothing that is ever reset.

A counter only rises, and only its owner writes it. All rounds are full meetings: a rank that has come to round t goes
on when all have come to t. So what a rank wrote for round t may be overwritten for round t + 2, and not before.

Who waits polls a little, offers its core to others, then sleeps on the counter that it waits for. Waking up regularly
it looks for all that can end a group: a rank that ended it, a dead process, a broken connection, the time limit.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from lepton_ray.collective import memory
from lepton_ray.collective.links import late
from lepton_ray.collective.memory import Segment
from lepton_ray.errors import PeerLost

# Of each rank's board, in words of 8 bytes, each on 128 bytes of its own: processors fetch cache lines in pairs.
_ROUND, _SLEEPERS, _STATE, _PROGRESS = 0, 16, 32, 48
WORDS_BYTES = 512
_ENDED, _LEFT = 1, 2  # states

# About 5 us.
_POLLS = 50
# To wake a sleeper costs 50 us, and milliseconds on a virtual machine whose host has lent the idle core to another. So
# the core is kept, but offered to whoever wants it, before every look.
_OFFER_S = 1e-3
# How often a sleeper looks round. It also bounds the one hiccup that is left: a store of a counter and a look whether
# anybody sleeps may pass each other in the processor's store buffer.
_TICK_S = 0.02


class Board:
    """The counters of all ranks, as rank `rank` sees and moves them. One thread at a time, except for `end`."""

    def __init__(
        self,
        rank: int,
        segments: Sequence[Segment],
        pidfds: Mapping[int, int],
        *,
        timeout_s: float,
        watch: Callable[[], object],
        names: Sequence[int] | None = None,
    ) -> None:
        """segments: by rank; the counters lie at their beginning. pidfds: of the peers, by rank, owned from now on.

        timeout_s: longest wait without progress. watch: raises PeerLost when a connection broke. names: what errors
        call the ranks.
        """
        self._rank, self.timeout_s, self._watch = rank, timeout_s, watch
        self._names = names or range(len(segments))
        self._words = [memoryview(segment.map)[:WORDS_BYTES].cast("q") for segment in segments]
        self._addresses = [segment.address + 8 * _ROUND for segment in segments]
        self._own, self._own_address = self._words[rank], self._addresses[rank]
        self._peers = [(peer, words) for peer, words in enumerate(self._words) if peer != rank]
        self._pidfds = {pidfd: peer for peer, pidfd in pidfds.items()}
        self._deaths = select.poll()
        for pidfd in self._pidfds:
            self._deaths.register(pidfd, select.POLLIN)
        # With more ranks than cores, the one that is awaited may need this very core.
        self._polls = _POLLS if len(segments) <= len(os.sched_getaffinity(0)) else 0
        self._ending = threading.Lock()
        self._is_released = False
        self.round = 0
        """How often this rank has met the others."""

    def meet(self) -> None:
        """Come to the next round, and wait until all have. Raises PeerLost or WaitTimeout."""
        self.round = goal = self.round + 1
        own = self._own
        # In this order: who begins to sleep after the look either sees the new counter or is seen by the next look.
        is_awaited = own[_SLEEPERS]
        if is_awaited:
            own[_SLEEPERS] = 0
        if not memory.IS_ORDERED:
            memory.order()
        own[_ROUND] = goal
        if is_awaited or own[_SLEEPERS]:
            memory.wake(self._own_address)
        for peer, words in self._peers:
            if words[_ROUND] < goal:
                self._await(peer, words, goal)
        if not memory.IS_ORDERED:
            memory.order()

    def advance(self) -> None:
        """Tell those who wait that this rank has not stopped, though it will take a while to come."""
        self._own[_PROGRESS] += 1

    def check(self) -> None:
        """Raise PeerLost if a rank, also this one, has ended the group. Cheap."""
        for peer, words in enumerate(self._words):
            if words[_STATE] == _ENDED:
                raise PeerLost(f"rank {self._names[peer]} has ended the group")

    def leave(self) -> None:
        """Say that this rank goes on purpose: peers finish without it what it has finished."""
        self._end(_LEFT)

    def end(self) -> None:
        """End the group from any thread: whoever waits for anybody, on any rank, wakes up and raises PeerLost."""
        self._end(_ENDED)

    def release(self) -> None:
        """Let go of the memory of all ranks. Not while another thread operates."""
        with self._ending:
            self._is_released = True
            self._words, self._peers, self._own = [], [], memoryview(b"")
            for pidfd in self._pidfds:
                os.close(pidfd)
            self._pidfds = {}

    def _end(self, state: int) -> None:
        with self._ending:
            if self._is_released:
                return
            if self._own[_STATE] != _LEFT:  # who has left has no say in what becomes of the others
                self._own[_STATE] = state
            for address in self._addresses:
                memory.wake(address)

    def _await(self, peer: int, words: memoryview, goal: int) -> None:
        """Wait for one peer's counter."""
        for _ in range(self._polls):
            if words[_ROUND] >= goal:
                return
        until_s = time.perf_counter() + _OFFER_S
        while time.perf_counter() < until_s:
            memory.offer_core()
            if words[_ROUND] >= goal:
                return
        moved_s = looked_s = time.monotonic()
        last = words[_ROUND] + words[_PROGRESS]
        while True:
            words[_SLEEPERS] = 1
            now = words[_ROUND]
            if now >= goal:
                return
            if self._own[_SLEEPERS]:  # fell asleep unseen just before
                self._own[_SLEEPERS] = 0
                memory.wake(self._own_address)
            memory.sleep_while(self._addresses[peer], now & 0xFFFFFFFF, min(_TICK_S, self.timeout_s))
            if words[_ROUND] >= goal:
                return
            self.check()
            now_s = time.monotonic()
            if (reached := words[_ROUND] + words[_PROGRESS]) != last:
                last, moved_s = reached, now_s
            if now_s - looked_s >= _TICK_S / 2:
                looked_s = now_s
                self._look(peer, words, goal)
            if now_s - moved_s >= self.timeout_s:
                raise late([self._names[peer]], self.timeout_s)

    def _look(self, peer: int, words: memoryview, goal: int) -> None:
        """Raise PeerLost if the group cannot go on."""
        if words[_STATE] == _LEFT:
            if not memory.IS_ORDERED:
                memory.order()
            if words[_ROUND] < goal:  # it may have come before it left
                raise PeerLost(f"rank {self._names[peer]} has left the group")
        for pidfd, _ in self._deaths.poll(0):
            dead = self._pidfds[pidfd]
            if self._words[dead][_STATE] != _LEFT:
                raise PeerLost(f"the process of rank {self._names[dead]} has died")
            self._deaths.unregister(pidfd)
        self._watch()
