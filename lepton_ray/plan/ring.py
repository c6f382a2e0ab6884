"""Decide which chunk each rank sends and receives in a ring.

Reduce-scatter: the sum of chunk c starts at rank c + 1, gains one rank's share per move, and is complete at rank c.
All-gather: chunk c starts at rank c and is copied once round. Run one after the other they are an all-reduce, whose
every move sends what the move before it received; a transport may therefore forward a chunk piece by piece.
Source: bandwidth-optimal ring all-reduce (Patarasuk, Yuan, JPDC 2009).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One move of one rank: chunk `send` goes to rank + 1 while chunk `receive` comes from rank - 1."""

    send: int
    receive: int


def chunk_bounds(count: int, world: int) -> list[int]:
    """Cut `count` elements into `world` chunks whose sizes differ by at most one: world + 1 offsets from 0."""
    return [count * chunk // world for chunk in range(world + 1)]


def reduce_scatter(rank: int, world: int) -> list[Move]:
    """Moves after which chunk `rank` holds the sum over all ranks. What is received is added to the own chunk."""
    return [Move(send=(rank - 1 - i) % world, receive=(rank - 2 - i) % world) for i in range(world - 1)]


def all_gather(rank: int, world: int) -> list[Move]:
    """Moves that bring every rank's own chunk to all. What is received overwrites the own chunk."""
    return [Move(send=(rank - i) % world, receive=(rank - 1 - i) % world) for i in range(world - 1)]
