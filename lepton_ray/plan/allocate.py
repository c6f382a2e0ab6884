"""Decide which job gets workers now: first come, first served, warm workers before new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lepton_ray.plan.types import Node, Request, Slot

_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """An idle worker that a finished job left, or that somebody asked to keep warm."""

    worker: str
    slot: Slot
    environment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Start now: reuse these warm workers, end those to make room, and create the rest."""

    reuse: tuple[str, ...]
    evict: tuple[str, ...]
    create: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Not now, but when others end."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Never on this cluster."""

    reason: str


def fit(nodes: Sequence[Mapping[str, float]], slot: Slot, most: int) -> int:
    """Count how many slots fit on the nodes at once, up to `most`."""
    count = 0
    for node in nodes:
        shares = [
            int((node.get(name, 0.0) + _TOLERANCE) / amount) for name, amount in slot.resources.items() if amount > 0
        ]
        count += min(shares, default=most)
    return min(count, most)


def spots(nodes: Sequence[Node], slot: Slot, count: int) -> list[Node | None]:
    """Choose nodes for new slots: the first that has room is filled before the next; None where none has."""
    chosen: list[Node | None] = [node for node in nodes for _ in range(fit([node.free], slot, count))]
    return (chosen + [None] * count)[:count]


def admit(request: Request, nodes: Sequence[Node], pool: Sequence[Warm]) -> Grant | Wait | Refuse:
    """Decide on the first job of the queue: as many workers as there is room for, of those that it wants."""
    for workers in range(max(request.most, request.workers), request.workers, -request.multiple):
        decision = _admit(replace(request, workers=workers), nodes, pool)
        if isinstance(decision, Grant):
            return decision
    return _admit(request, nodes, pool)


def _admit(request: Request, nodes: Sequence[Node], pool: Sequence[Warm]) -> Grant | Wait | Refuse:
    slot, workers = request.slot, request.workers
    possible = fit([node.total for node in nodes], slot, workers)
    if possible < workers:
        return Refuse(reason=shortage(request, nodes, possible))
    fitting = [w for w in pool if w.slot == slot and w.environment == request.environment]
    reuse = fitting[:workers]
    create = workers - len(reuse)
    if _has_room([node.free for node in nodes], request, create):
        return Grant(
            reuse=tuple(w.worker for w in reuse),
            evict=(),
            create=create,
            reason=f"{len(reuse)} warm and {create} new workers of {slot}",
        )
    others = [w for w in pool if w not in reuse]
    if others and _has_room([_joined(nodes, others)], request, create):
        return Grant(
            reuse=tuple(w.worker for w in reuse),
            evict=tuple(w.worker for w in others),
            create=create,
            reason=f"{len(others)} idle warm workers end to make room",
        )
    free = fit([node.free for node in nodes], slot, create)
    beside = f" and {request.spare_cpus} CPU to read the data" if request.spare_cpus else ""
    return Wait(reason=f"{request.job} waits for {create} x ({slot}){beside}; there is room for {free} now")


def _has_room(nodes: Sequence[Mapping[str, float]], request: Request, create: int) -> bool:
    """Tell whether the new workers fit, and leave the CPUs that reading the data needs."""
    cpus = sum(node.get("CPU", 0.0) for node in nodes) - create * request.slot.resources.get("CPU", 0.0)
    return fit(nodes, request.slot, create) >= create and cpus + _TOLERANCE >= request.spare_cpus


def _joined(nodes: Sequence[Node], idle: Sequence[Warm]) -> dict[str, float]:
    """Add up what is free and what idle workers hold: an upper bound, since nobody knows on which node they are."""
    sums: dict[str, float] = {}
    for part in (*(node.free for node in nodes), *(worker.slot.resources for worker in idle)):
        for name, amount in part.items():
            sums[name] = sums.get(name, 0.0) + amount
    return sums


def shortage(request: Request, nodes: Sequence[Node], possible: int) -> str:
    """Say what was asked, what the cluster has, and what to change."""
    has = ", ".join(f"{node.name}: {Slot(resources=_plain(node.total))}" for node in nodes) or "no nodes"
    return (
        f"num_workers={request.workers} asks for {request.workers} x ({request.slot}), but the cluster can hold "
        f"{possible} ({has}). Use num_workers={possible}, smaller Resources(...), or a larger cluster."
        if possible
        else f"one worker asks for {request.slot}, and no node of the cluster has that ({has}). Change Resources(...)."
    )


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """Leave out what Ray counts but nobody asks for (memory in bytes, node names)."""
    return {name: amount for name, amount in resources.items() if ":" not in name and not name.endswith("memory")}
