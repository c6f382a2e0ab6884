"""A made-up cluster in virtual time: nodes, a network, storage, and a scheduler that grants and refuses.

Everything that happens is a call on a heap of (time, number, call, arguments), so a seed determines a life. Messages
are delivered at least once: a lost one is sent again, so it comes late, perhaps twice, and out of order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any

from lepton_ray.plan.events import Granted, Limits, Refused, Revoked
from lepton_ray.plan.recover import workers_of
from lepton_ray.sim.controller import Broken, Controller
from lepton_ray.sim.group import Group, State
from lepton_ray.sim.workers import Worker

RESEND_S = 1.0
"""After so long a message that was lost is sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a life begins with."""

    size: int
    """Workers of a replica."""
    least: int
    start: int
    target: int
    steps: int
    step_s: float
    nodes: int
    slots: int
    """Of each node."""
    save_every: int
    """Transactions between checkpoints."""
    is_prompt: bool
    """A worker says where it stands while the user's code still computes, and forms the next generation after that."""
    limits: Limits


class Node:
    """A machine with slots."""

    __slots__ = ("free", "is_draining", "is_up", "number")

    def __init__(self, number: int, slots: int) -> None:
        self.number, self.is_up, self.is_draining = number, True, False
        self.free = list(range(slots))


class World:
    """One life of a job: `live` once."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.random = setting, Random(seed)
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self.nodes = [Node(number, setting.slots) for number in range(setting.nodes)]
        self._pending: frozenset[int] = frozenset()
        self._order = 0
        self.held: dict[int, list[tuple[Node, int]]] = {}
        """Replica -> its slots."""
        self.struck = 0
        """Faults that have found somebody to strike."""
        self.is_refusing = self.has_refused = False
        self.is_flawed = False
        """The user's code has an error that no second try mends."""
        self.workers: dict[int, Worker] = {}
        self.groups: dict[int, Group] = {}
        self.cuts: set[frozenset[int]] = set()
        """Pairs of workers that cannot reach each other."""
        self.flaws: dict[int, list[int]] = {}
        """Step -> [tries that fail, ranks that fail]: errors of the user's code."""
        self.traps = 0
        """So many ballots to come kill one of their voters."""
        self.loss = 0.0
        """Share of the messages that are lost now."""
        self.checkpoint: State | None = None
        self.has_model = False
        self.controller = Controller(self)

    def later(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call after a delay."""
        self._number += 1
        heappush(self._heap, (self.now_s + delay_s, self._number, call, arguments))

    def send(self, worker: Worker | None, call: Callable[..., None], *arguments: Any) -> None:
        """Have the network deliver a message. worker: the one that it comes from or goes to."""
        draw = self.random.random
        delay_s = 0.001 + 0.01 * draw()
        if self.loss and draw() < self.loss:
            if draw() < 0.5:
                self.later(delay_s + 8 * draw(), call, *arguments)  # one more, late
            delay_s += RESEND_S
            while draw() < self.loss:
                delay_s += RESEND_S
            if worker is not None:
                worker.has_trouble = True
        self.later(delay_s, call, *arguments)

    def live(self, until_s: float) -> None:
        """Let time pass until the job has ended."""
        self.controller.begin()
        heap, controller = self._heap, self.controller
        while controller.end is None:
            self.now_s, _, call, arguments = heappop(heap)
            if self.now_s > until_s:
                raise Broken(
                    f"the job has not ended in {until_s:.0f} s, and is {controller.run and controller.run.phase}"
                )
            call(*arguments)

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def asked(self, order: int, replicas: frozenset[int]) -> None:
        """Take an order of the job; an older one than the last may come late."""
        if order > self._order:
            self._order = order
            self._pending = replicas.difference(self.held)
            self._place()

    def _place(self) -> None:
        """Give what is pending and has room."""
        if self._pending and self.is_refusing:
            self._pending = frozenset()
            self.send(None, self.controller.tell, Refused("the quota is used up"))
        for number in sorted(self._pending):
            slots: list[tuple[Node, int]] = []
            for _ in range(self.setting.size):
                free = [node for node in self.nodes if node.free and node.is_up and not node.is_draining]
                if free:
                    node = max(free, key=lambda node: (len(node.free), -node.number))
                    slots.append((node, node.free.pop()))
            if len(slots) < self.setting.size:
                for node, slot in slots:
                    node.free.append(slot)
                return
            self._pending -= {number}
            self.held[number] = slots
            self.send(None, self.controller.tell, Granted(frozenset([number])))

    def released(self, number: int) -> None:
        """End what is left of a replica's workers, and take its slots back."""
        for worker in workers_of(number, self.setting.size):
            if worker in self.workers:
                self.workers[worker].is_alive = False
        for node, slot in self.held.pop(number, ()):
            if slot in node.free:
                raise Broken(f"slot {slot} of node {node.number} is free twice")
            node.free.append(slot)
        self._place()

    def started(self, number: int) -> None:
        """Start a worker in its slot, unless it was."""
        if number in self.workers or number // self.setting.size not in self.held:
            return
        node, slot = self.held[number // self.setting.size][number % self.setting.size]
        if any(other.is_alive and other.node is node and other.slot == slot for other in self.workers.values()):
            raise Broken(f"slot {slot} of node {node.number} is used twice")
        self.workers[number] = Worker(self, number, node, slot)

    def lose_node(self, node: Node, back_s: float) -> None:
        """Cut the power of a node: nobody is told."""
        node.is_up = False
        for worker in list(self.workers.values()):
            if worker.node is node:
                worker.vanish()
        self.later(back_s, self._node_back, node)

    def _node_back(self, node: Node) -> None:
        node.is_up, node.is_draining = True, False
        self._place()

    def drain(self, node: Node, notice_s: float, back_s: float) -> None:
        """Tell that a node is going, and take it away after the notice."""
        node.is_draining = True
        replicas = frozenset(number for number, slots in self.held.items() if any(at is node for at, _ in slots))
        self.send(None, self.controller.tell, Revoked(replicas, f"node {node.number} is reclaimed"))
        self.later(notice_s, self.lose_node, node, back_s)

    def cut(self, pair: frozenset[int], time_s: float) -> None:
        """Cut the link of two workers for a time."""
        self.cuts.add(pair)
        self.later(time_s, self.cuts.discard, pair)
        for group in list(self.groups.values())[-1:]:
            if pair <= {worker.number for worker in group.crew if worker.is_busy and worker.group is group}:
                group.cut(pair)
