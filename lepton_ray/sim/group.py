"""The collectives of a made-up generation: who has joined what, who is waiting, and how it breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lepton_ray.plan.events import Command, Form

if TYPE_CHECKING:
    from lepton_ray.sim.workers import Worker
    from lepton_ray.sim.world import World

LIVENESS_S = 2.0
"""Peers take a worker that was silent for so long for dead."""


@dataclass(frozen=True, slots=True)
class State:
    """What a worker holds."""

    committed: int
    """Transactions."""
    steps: int
    """Those of them that were steps."""
    digest: int


class Group:
    """The collectives of one generation."""

    __slots__ = ("acked", "arrived", "ballots", "crew", "form", "is_broken", "members", "reduced", "states", "wishes")

    def __init__(self, world: World, form: Form) -> None:
        self.form = form
        self.members = [world.workers[number] for number in form.members]
        lenders = {*(form.sources or {}).values()}.difference(form.members)
        self.crew = [*self.members, *(world.workers[number] for number in sorted(lenders))]
        self.is_broken = False
        self.arrived = 0
        self.reduced = [0] * world.setting.size
        self.ballots = 0
        self.states: set[State] = set()
        self.wishes: set[type[Command]] = set()
        self.acked = 0

    def sever(self, culprit: Worker, delay_s: float) -> None:
        """Break all collectives: a party is gone. All others notice, one after the other."""
        if self.is_broken or all(w is culprit or not w.is_busy or w.group is not self for w in self.crew):
            return
        self.is_broken = True
        for worker in self.crew:
            suspect = culprit.number if worker is not culprit else -1
            worker.soon(delay_s + 0.03 * worker.world.random.random(), worker.severed, suspect)

    def waiting(self, workers: list[Worker], stage: int) -> list[Worker]:
        """List those of a collective that still wait in it when all have joined.

        Where some have left it, its end may have been in the buffers of the others, or not.
        """
        if self.is_broken and workers[0].world.random.random() < 0.5:
            return []
        return [worker for worker in workers if worker.group is self and worker.is_busy and worker.stage == stage]

    def find_missing(self) -> None:
        """Break what cannot be connected, because a party is not there."""
        for worker in self.crew:
            if not worker.is_reachable:
                self.sever(worker, LIVENESS_S if worker.is_alive else 0.1)

    def is_cut(self) -> bool:
        """Have parties that cannot reach each other notice it, if there are any."""
        numbers = {worker.number for worker in self.crew}
        cuts = [cut for cut in self.crew[0].world.cuts if cut <= numbers and not cut.isdisjoint(self.form.members)]
        for cut in cuts:
            self.cut(cut)
        return bool(cuts)

    def cut(self, pair: frozenset[int]) -> None:
        """Cut the link of two workers: each blames the other."""
        for worker in self.crew:
            if worker.number in pair:
                worker.has_trouble = True
                (other,) = pair - {worker.number}
                worker.soon(1.0, worker.severed, other)
