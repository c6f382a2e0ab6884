"""Decide where the survivors of a generation go on, and whose state those get that have none.

A worker's training is a sequence of transactions (steps, evaluations, ends of epochs ...), each closed by a ballot,
which is one all-reduce over all workers of all replicas. A worker joins ballot n after all its other sums of
transaction n have returned, and commits n when the ballot has. So once every survivor has left its collectives, they
differ by one transaction at most, and those that are behind hold every sum of it: they commit it as well, with the
ballot's result as the others got it. Where nobody has committed, all discard what they did of it, and do it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a worker stands. Its collectives have returned: the old generation cannot commit any more."""

    committed: int
    """Transactions committed since the run began."""
    is_reduced: bool = False
    """It has joined the ballot of the next one."""
    ballot: tuple[float, ...] = ()
    """Result of the last ballot that it has seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """Where all go on."""

    committed: int
    """Transactions that the training state is to hold; what was done of the next one is discarded."""
    holders: frozenset[int]
    """Workers that hold that state: they are there, or commit one more transaction now."""
    forward: frozenset[int] = field(default=frozenset())
    """Those that commit one more, with `ballot`."""
    ballot: tuple[float, ...] = ()
    reason: str = ""


def settle(positions: Mapping[int, Position], size: int) -> Settlement | None:
    """Settle on the newest committed state that the survivors hold whole; None when they hold none.

    positions: of the survivors, by worker. size: workers of a replica; a state is whole when all coordinates are held.
    """
    for committed in sorted({position.committed for position in positions.values()}, reverse=True):
        there = [worker for worker, position in positions.items() if position.committed == committed]
        forward = frozenset(
            worker
            for worker, position in positions.items()
            if position.is_reduced and position.committed == committed - 1
        )
        holders = forward.union(there)
        if siblings(holders, size) is None:
            continue
        reason = f"{len(there)} of {len(positions)} survivors have committed {committed} transactions"
        if forward:
            reason += f", {len(forward)} commit the last of them now"
        ballot = positions[min(there)].ballot
        return Settlement(committed=committed, holders=holders, forward=forward, ballot=ballot, reason=reason)
    return None


def siblings(holders: Iterable[int], size: int) -> dict[int, int] | None:
    """Choose whose state others copy: coordinate in the replica -> worker that holds it.

    holders: those to be preferred first. size: workers of a replica.
    Returns None when some coordinate is held by nobody: only a mirror or a checkpoint is left.
    """
    found: dict[int, int] = {}
    for worker in holders:
        found.setdefault(worker % size, worker)
    return found if len(found) == size else None


def mirror_node(own: str, nodes: Collection[str], current: str | None, *, is_asked: bool) -> str | None:
    """Choose the node whose memory is to hold the state of a worker on node `own`; None for none.

    nodes: those that live. current: the one that was chosen last, which is kept where it will do. is_asked: the user
    wants a mirror, so that one in another process of the same node is better than none.
    """
    others = {*nodes}.difference([own]) or ({*nodes} if is_asked else set())
    return current if current in others else min(others, default=None)


def workers_of(replica: int, size: int) -> range:
    """Return the numbers of a replica's workers, by coordinate: worker = replica * size + coordinate."""
    return range(replica * size, (replica + 1) * size)
