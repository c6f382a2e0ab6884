"""Decide how ranks on several nodes reduce an array, and what goes over the wire: a model of latency and bandwidth.

Ranks that reach each other's memory are a node. A route has a part within each node, messages between the nodes, and
again a part within each node; its time is what the messages wait for each other, what the busiest node sends or
receives, and what the ranks of a node read and write. Star and recursive doubling are no candidates: all ranks are
connected, so an exchange or a scatter has at most as many messages in a row and as many bytes; a test holds that.
Source: alpha-beta model of collective communication (Thakur, Rabenseifner, Gropp, IJHPCA 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

EXCHANGE_BYTES = 64 << 10
"""Largest array that everybody sends to everybody."""
# A route, and a wire format, that stands farther down its list must be predicted to take at most this share of the
# time: predictions are not that good, and less exact sums must be worth it.
_ROUTE_PAYS, _WIRE_PAYS = 0.95, 0.8
# What is encoded is decoded by its sender too.
_CODEC_PASSES = 1.5


class Route(Enum):
    """How an array is reduced between nodes."""

    EXCHANGE = "exchange"
    """Each node sends its sum to all others."""
    RING = "ring"
    """Each rank of a node sends a share of the node's sum round a ring of the nodes."""
    SCATTER = "scatter"
    """The same shares, but each goes straight to the node that sums it, and from there to all: two messages."""
    FLAT = "flat ring"
    """A ring of all ranks, which makes no use of shared memory."""


class Wire(Enum):
    """What a float32 becomes on its way between nodes."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


SHARE = {Wire.FP32: 1.0, Wire.BF16: 0.5, Wire.INT8: (256 + 4) / (256 * 4)}
"""Bytes on the wire for each byte of float32. int8: 256 numbers have a scale of four bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What was measured when a group formed, of its slowest rank."""

    latency_s: float
    """Seconds of an exchange of next to nothing."""
    start_s: float
    """Seconds that a ring takes for next to nothing, beyond those that its messages wait for each other."""
    bandwidth: float
    """Bytes per second that a node sends while it receives as many."""
    memory: float
    """Bytes per second of arrays that a rank adds up."""
    bf16: float
    """Bytes of float32 per second that a rank encodes and decodes."""
    int8: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, and the seconds predicted for each candidate."""

    route: Route
    """Of an array that is sent as it is."""
    wire: Wire
    """What "auto" stands for when float32 is summed."""
    route_s: dict[Route, float]
    wire_s: dict[Wire, float]
    reason: str


def join(reaches: Sequence[Sequence[bool]]) -> list[list[int]]:
    """Group ranks into nodes: each joins the first node all of whose ranks it reaches, and which reach it.

    reaches: by rank, whether it reaches the memory of each rank.
    """
    nodes: list[list[int]] = []
    for rank, reached in enumerate(reaches):
        for node in nodes:
            if all(reached[other] and reaches[other][rank] for other in node):
                node.append(rank)
                break
        else:
            nodes.append([rank])
    return nodes


def ring_messages(count: int) -> int:
    """Return how many messages wait for each other in a ring of so many nodes. Two just tell each other all."""
    return 1 if count == 2 else 2 * (count - 1)


def lossy_route(nodes: Sequence[int]) -> Route:
    """Return the route of what is encoded: on it a number is rounded before it is summed, and the sum once more."""
    return Route.RING if len(nodes) == 2 else Route.SCATTER


def predict(size_bytes: int, nodes: Sequence[int], speeds: Speeds, wire: Wire = Wire.FP32) -> dict[Route, float]:
    """Return the seconds of each possible route. nodes: ranks of each; two nodes at least."""
    count, ranks, fewest, most = len(nodes), sum(nodes), min(nodes), max(nodes)
    delay_s, start_s, sent_s = speeds.latency_s, speeds.start_s, SHARE[wire] * size_bytes / speeds.bandwidth
    memory_s = size_bytes / speeds.memory
    round_s = 2 * (count - 1) / count * sent_s
    # Of its share each rank reads the arrays of the others, and writes them. The smallest node says how many share.
    local_s = 2 * (most - 1) / fewest * memory_s
    if wire is not Wire.FP32:
        # Added up, though codec and network may overlap: a core that encodes may be one that computes.
        local_s += _CODEC_PASSES * size_bytes / fewest / (speeds.bf16 if wire is Wire.BF16 else speeds.int8)
    found = {
        Route.RING: start_s + ring_messages(count) * delay_s + round_s + local_s,
        Route.SCATTER: start_s + 2 * delay_s + round_s + local_s,
    }
    if wire is not Wire.FP32:
        return {lossy_route(nodes): found[lossy_route(nodes)]}
    if size_bytes <= EXCHANGE_BYTES:
        busiest = max(max(ranks - own, own * (count - 1)) for own in nodes)
        found[Route.EXCHANGE] = delay_s + busiest * sent_s + (most - 1) * memory_s
    if most > 1:
        round_s = 2 * (ranks - 1) / ranks * sent_s
        found[Route.FLAT] = start_s + 2 * (ranks - 1) / ranks * count * delay_s + round_s
    return found


@lru_cache(maxsize=256)  # asked before every operation, of which a program has few kinds
def choose(size_bytes: int, nodes: tuple[int, ...], speeds: Speeds) -> Choice:
    """Choose for arrays of a size. All ranks know the same, so all choose alike."""
    route_s = predict(size_bytes, nodes, speeds)
    least_s = min(route_s.values())
    route = next(each for each in Route if each in route_s and route_s[each] * _ROUTE_PAYS <= least_s)
    wire_s = {Wire.FP32: route_s[route]}
    best = Wire.FP32
    for wire in (Wire.BF16, Wire.INT8):
        (wire_s[wire],) = predict(size_bytes, nodes, speeds, wire).values()
        if wire_s[wire] <= _WIRE_PAYS * wire_s[best]:
            best = wire
    reason = (
        f"{size_bytes} bytes between nodes of {', '.join(map(str, nodes))} ranks, {_time(speeds.latency_s)} and "
        f"{_speed(speeds.bandwidth)} apart: {route.value}"
    )
    if best is Wire.FP32:
        reason += ", as they are"
    else:
        speed = speeds.bf16 if best is Wire.BF16 else speeds.int8
        reason += f"; {best.value} would pay for sums of float32 (encoded at {_speed(speed)})"
    return Choice(route=route, wire=best, route_s=route_s, wire_s=wire_s, reason=reason)


def goes_straight(size_bytes: int, nodes: tuple[int, ...], speeds: Speeds) -> bool:
    """Decide how an array gets from one rank to all, or is reduced into one: True for an exchange of all nodes.

    Otherwise it goes along a chain of all ranks, node by node, piece by piece. That sends nothing twice, but a message
    waits for that of the node before; an exchange is one message, of an array that the network hardly notices.
    """
    if size_bytes > EXCHANGE_BYTES:
        return False
    chain_s = speeds.start_s + (len(nodes) - 1) * speeds.latency_s + size_bytes / speeds.bandwidth
    return predict(size_bytes, nodes, speeds)[Route.EXCHANGE] <= _ROUTE_PAYS * chain_s


def explain(choice: Choice) -> str:
    """Say a choice and its figures in three lines."""
    routes, wires = (
        ", ".join(f"{each.value} {_time(seconds)}" for each, seconds in found.items())
        for found in (choice.route_s, choice.wire_s)
    )
    return f"{choice.reason}\n  routes: {routes}\n  wire formats of a sum of float32: {wires}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g} MB/s"
