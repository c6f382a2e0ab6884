"""Messages between two ranks, over real sockets. Ranks are threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.collective.post import ANYBODY, Post
from lepton_ray.errors import ConfigError, LeptonError, PeerLost, WaitTimeout

LIMIT_S = 20
LARGE = 3 << 20  # more than a socket takes at once


class Message(NamedTuple):
    sender: int
    receiver: int
    tag: int
    size_bytes: int
    is_from_anybody: bool
    """Whether the receiver does not say from whom it takes it."""


class Ended(SimpleQueue["tuple[LeptonError | None, int]"]):
    """Is told how messages end."""

    def __call__(self, error: LeptonError | None, peer: int) -> None:
        self.put((error, peer))

    def next(self) -> int:
        """Return the other side of the next message that ends; raise how it ended."""
        error, peer = self.get(timeout=LIMIT_S)
        if error is not None:
            raise error
        return peer


@contextmanager
def posts(world: int, timeout_s: float = LIMIT_S) -> Iterator[list[Post]]:
    failures: list[str] = []
    made = [
        Post(rank, world, secret=b"s", timeout_s=LIMIT_S, host="127.0.0.1", on_failure=failures.append)
        for rank in range(world)
    ]
    addresses = [b""] * world
    meeting = threading.Barrier(world)

    def form(post: Post) -> None:
        def exchange(address: bytes) -> Sequence[bytes]:
            addresses[post.rank] = address
            meeting.wait()
            return addresses

        post.form(exchange)

    threads = [threading.Thread(target=form, args=(post,)) for post in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        for post in made:
            post.timeout_s = timeout_s
        yield made
    finally:
        for post in made:
            post.close()


def contents(index: int, size_bytes: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, size_bytes, np.uint8)


@given(
    messages=st.lists(
        st.builds(
            Message,
            st.integers(0, 2),
            st.integers(0, 2),
            st.integers(0, 1),
            st.sampled_from([0, 1, 1000]),
            st.booleans(),
        ).filter(lambda message: message.sender != message.receiver),
        max_size=25,
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_whatever_the_order_every_message_arrives(messages: list[Message], seed: int) -> None:
    # Of one pair and tag, messages pair up in order; so sizes depend on the tag here, and what is expected as well.
    # Receives from anybody have tags of their own.
    messages = [each._replace(tag=each.tag + 10 * each.is_from_anybody) for each in messages]
    messages = [each._replace(size_bytes=[0, 1, 1000][each.tag % 3]) for each in messages]
    random_ = random.Random(seed)
    with posts(3) as made:
        ended, jobs, places = Ended(), [], []
        for index, message in enumerate(messages):
            source = ANYBODY if message.is_from_anybody else message.sender
            place = np.empty(message.size_bytes, np.uint8)
            places.append(place)
            jobs.append((0, message, memoryview(contents(index, message.size_bytes))))
            jobs.append((1, message._replace(sender=source), memoryview(place)))
        random_.shuffle(jobs)
        for is_receive, message, view in jobs:
            if is_receive:
                made[message.receiver].receive(view, message.sender, message.tag, ended)
            else:
                made[message.sender].send(view, message.receiver, message.tag, ended)
        for _ in jobs:
            ended.next()
        # Whatever was sent arrived once, where it was sent to.
        for receiver in range(3):
            for tag in {message.tag for message in messages}:
                mine = [i for i, each in enumerate(messages) if (each.receiver, each.tag) == (receiver, tag)]
                sent = sorted(contents(i, messages[i].size_bytes).tobytes() for i in mine)
                assert sorted(places[i].tobytes() for i in mine) == sent
        assert all(not line.lanes for post in made for line in post._lines.values())


def test_messages_of_one_pair_and_tag_keep_their_order() -> None:
    with posts(2) as (first, second):
        ended, places = Ended(), [np.empty(4, np.uint8) for _ in range(20)]
        for index in range(10):
            first.send(memoryview(contents(index, 4)), 1, 5, ended)
        for place in places:
            second.receive(memoryview(place), 0, 5, ended)
        for index in range(10, 20):
            first.send(memoryview(contents(index, 4)), 1, 5, ended)
        for _ in range(40):
            ended.next()
        assert [place.tobytes() for place in places] == [contents(index, 4).tobytes() for index in range(20)]


def test_large_messages_cross_each_other() -> None:
    with posts(3) as made:
        ended = Ended()
        places = {(a, b): np.empty(LARGE, np.uint8) for a in range(3) for b in range(3) if a != b}
        for (a, b), place in places.items():
            made[a].send(memoryview(contents(3 * a + b, LARGE)), b, 0, ended)
            made[b].receive(memoryview(place), a, 0, ended)
        for _ in range(2 * len(places)):
            ended.next()
        for (a, b), place in places.items():
            assert (place == contents(3 * a + b, LARGE)).all()


def test_who_takes_from_anybody_hears_from_whom() -> None:
    with posts(3) as made:
        ended, sent = Ended(), Ended()
        made[0].receive(memoryview(bytearray(2)), ANYBODY, 0, ended)
        made[2].send(memoryview(b"hi"), 0, 0, sent)
        assert ended.next() == 2
        made[1].send(memoryview(b"hi"), 0, 0, sent)
        made[0].receive(memoryview(bytearray(2)), ANYBODY, 0, ended)
        assert ended.next() == 1


def collect(ended: Ended, count: int) -> None:
    for _ in range(count):
        ended.next()


def test_different_sizes_are_named() -> None:
    with posts(2) as (first, second):
        ended = Ended()
        second.receive(memoryview(bytearray(5)), 0, 3, ended)
        first.send(memoryview(b"four"), 1, 3, ended)
        with pytest.raises((ConfigError, PeerLost), match="rank 0 sends 4 bytes under tag 3 where rank 1 receives 5"):
            collect(ended, 2)


def test_what_nobody_answers_meets_the_limit() -> None:
    with posts(2, timeout_s=0.2) as (first, _):
        ended = Ended()
        first.receive(memoryview(bytearray(5)), 1, 3, ended)
        with pytest.raises(WaitTimeout, match="nothing moved to or from rank 1 for 0.2 s"):
            ended.next()
        with pytest.raises(PeerLost, match="nothing moved"):
            first.send(memoryview(b"more"), 1, 3, ended)


def test_a_rank_that_leaves_disturbs_only_who_needs_it() -> None:
    with posts(3) as (first, second, third):
        ended, sent = Ended(), Ended()
        first.send(memoryview(b"last"), 1, 0, sent)
        second.receive(memoryview(bytearray(4)), 0, 0, ended)
        assert ended.next() == 0
        sent.next()
        first.close()
        second.send(memoryview(b"more"), 2, 0, sent)
        third.receive(memoryview(bytearray(4)), 1, 0, ended)
        assert ended.next() == 1
        third.receive(memoryview(bytearray(4)), 0, 0, ended)
        with pytest.raises(PeerLost, match="rank 0 has left the group"):
            ended.next()


def test_abort_ends_what_is_under_way_everywhere() -> None:
    with posts(3) as made:
        ended = Ended()
        made[1].receive(memoryview(bytearray(4)), 2, 0, ended)
        started_s = time.monotonic()
        made[0].abort("enough")
        with pytest.raises(PeerLost, match="rank 0 closed its connection"):
            ended.next()
        assert time.monotonic() - started_s < 0.5


def test_a_message_needs_a_peer() -> None:
    with posts(2) as (first, _):
        for peer in (0, 2, -2):
            with pytest.raises(ConfigError, match="this is rank 0 of 2"):
                first.send(memoryview(b""), peer, 0, Ended())
