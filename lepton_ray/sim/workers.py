"""The workers of a made-up job: they compute, reduce, vote and commit, are broken, and obey their controller.

A worker's state is a digest over the transactions that it has committed, each with the generation that made it. Equal
digests are equal models; a transaction that is left out, done twice or taken from elsewhere changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lepton_ray.plan.adopt import At, Word
from lepton_ray.plan.events import Abort, Command, Failure, Form, Formed, Left, Lost, Pause, Ready, Stop, Train
from lepton_ray.plan.recover import Position
from lepton_ray.sim.controller import Broken, Row
from lepton_ray.sim.group import LIVENESS_S, Group, State

if TYPE_CHECKING:
    from lepton_ray.sim.world import Node, World

COLLECTIVE_S = 5.0
"""Longest time that a collective waits for a worker that lives."""
WATCH_S = 4.0
"""The controller takes a worker that was silent for so long for dead."""
STUCK_S = 8.0
"""The controller takes a worker that was in one piece of the user's code for so long for lost."""


class Worker:
    """One process."""

    __slots__ = (
        "acked", "at", "ballot", "busy_until_s", "closing", "echo", "frozen_until_s", "generation", "group",
        "has_trouble", "is_alive", "is_end", "life", "node", "number", "rank", "reduced_in", "slot", "slow", "stage",
        "state", "tail", "token", "wishes", "world",
    )  # fmt: skip

    def __init__(self, world: World, number: int, node: Node, slot: int) -> None:
        self.world, self.number, self.node, self.slot = world, number, node, slot
        self.is_alive, self.has_trouble = True, False
        self.frozen_until_s, self.busy_until_s, self.slow = 0.0, 0.0, 1.0
        self.life = self.generation = self.token = self.acked = 0
        self.at, self.is_end = At.STARTING, False
        self.group: Group | None = None
        self.rank = -1
        self.state: State | None = None
        self.stage = 0
        """Of the transaction: 0 computing, 1 reducing, 2 voting."""
        self.reduced_in = 0
        self.ballot: tuple[int, ...] = ()
        self.closing = False
        self.echo: int | None = None
        """It must leave when it has computed; the one that it blames, or -1. A prompt one leaves at once."""
        self.wishes: set[type[Command]] = set()
        self.tail: list[Row] = []
        """Committed transactions that are not known to be on record."""
        if not node.is_up:
            self.vanish()
        self.soon(1.0 + 2.0 * world.random.random(), self._ready)

    @property
    def is_reachable(self) -> bool:
        return self.is_alive and self.world.now_s >= self.frozen_until_s

    @property
    def is_sound(self) -> bool:
        """Nothing was ever wrong with it."""
        return self.is_alive and not self.has_trouble

    @property
    def is_busy(self) -> bool:
        return self.at is At.JOINED or self.at is At.FORMING

    def soon(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Do something later, unless the worker has gone over to something else meanwhile."""
        self.world.later(delay_s, self._do, self.token, call, arguments)

    def _do(self, token: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if token != self.token or not self.is_alive:
            return
        if self.world.now_s < self.frozen_until_s:
            self.world.later(self.frozen_until_s - self.world.now_s, self._do, token, call, arguments)
            return
        call(*arguments)

    def _tell(self, event: Ready | Formed | Left) -> None:
        self.world.send(self, self.world.controller.tell, event)

    def _ready(self) -> None:
        self.at = At.READY
        self._tell(Ready(self.number))

    def word(self) -> Word:
        """Say where it is."""
        position = self._position() if self.at is At.LEFT else None
        return Word(at=self.at, generation=self.generation, position=position, is_end=self.is_end)

    def _position(self) -> Position | None:
        if self.state is None:
            return None
        ballot = tuple(float(number) for number in self.ballot)
        return Position(committed=self.state.committed, is_reduced=self.stage == 2, ballot=ballot)

    # --- what happens to it ------------------------------------------------------------------------------------------

    def die(self) -> None:
        """End as a process whose host lives: everybody is told soon."""
        if self.is_alive:
            self.is_alive, self.has_trouble = False, True
            draw = self.world.random.random
            self._sever(0.001 + 0.02 * draw())
            self.world.later(0.02 + 0.5 * draw(), self.world.controller.tell, Lost(self.number, "the process died"))

    def vanish(self) -> None:
        """End with the host: nobody is told."""
        if self.is_alive:
            self.is_alive, self.has_trouble = False, True
            self._sever(LIVENESS_S)
            lost = Lost(self.number, f"silent for {WATCH_S:g} s")
            self.world.later(WATCH_S + self.world.random.random(), self.world.controller.tell, lost)

    def freeze(self, time_s: float) -> None:
        """Stop for a time, as with SIGSTOP."""
        if self.is_reachable:
            self.frozen_until_s, self.has_trouble = self.world.now_s + time_s, True
            self.world.later(LIVENESS_S, self._miss, self.frozen_until_s, self.group)
            self.world.later(WATCH_S, self._watch, self.frozen_until_s)

    def _miss(self, until_s: float, group: Group | None) -> None:
        if self.frozen_until_s == until_s > self.world.now_s and group is self.group:
            self._sever(0.0)

    def _watch(self, until_s: float) -> None:
        if self.frozen_until_s == until_s > self.world.now_s and self.is_alive:
            self.world.controller.tell(Lost(self.number, f"silent for {WATCH_S:g} s"))

    def wedge(self) -> None:
        """Never end what it computes; its control thread lives."""
        self.slow, self.has_trouble = float("inf"), True

    def _sever(self, delay_s: float) -> None:
        if self.group is not None and self.group.form.generation == self.generation and self.is_busy:
            self.group.sever(self, delay_s)

    def severed(self, culprit: int) -> None:
        """Notice that the group is broken."""
        if self.at is At.JOINED and self.stage == 0 and self.rank >= 0 and not self.world.setting.is_prompt:
            self.echo = culprit if self.echo is None else self.echo
        elif self.is_busy:
            self._leave(Failure(message=f"worker {culprit} went away", is_echo=True), suspect=culprit)

    # --- what it is told ---------------------------------------------------------------------------------------------

    def hear(self, command: Command, life: int) -> None:
        """Obey, unless the order is late."""
        if not self.is_alive or life < self.life:
            return
        if self.world.now_s < self.frozen_until_s:
            self.world.later(self.frozen_until_s - self.world.now_s, self.hear, command, life)
            return
        self.life = life
        match command:
            case Form(generation):
                if generation > self.generation:
                    self._form(command)
            case Train(generation):
                if generation == self.generation and self.at is At.JOINED and self.rank < 0:
                    assert self.group is not None
                    self.rank = self.group.form.members.index(self.number)
                    self._compute()
            case Pause(generation) | Stop(generation):
                if generation == self.generation:
                    self.wishes.add(type(command))
            case Abort(generation):
                self._abort(generation)

    def _abort(self, generation: int) -> None:
        if generation < self.generation:
            return
        if generation == self.generation and self.is_busy:
            self.severed(-1)
            return
        self.generation, self.at = generation, At.LEFT  # an order to form it may come later, too late
        self.token += 1
        self._tell(
            Left(self.number, generation, self._position(), Failure(message="aborted", is_echo=True), self.is_end)
        )

    def _form(self, form: Form) -> None:
        self.generation, self.at, self.rank, self.echo, self.closing = form.generation, At.FORMING, -1, None, False
        self.token += 1
        self.wishes = set()
        self.is_end = False
        at = form.settlement
        if at is None or self.number not in at.holders:
            self.state = None
        else:
            if self.number in at.forward:
                committed, made_in, is_step = map(int, at.ballot)
                if (
                    self.state is None
                    or self.stage != 2
                    or (self.state.committed + 1, self.reduced_in) != (committed, made_in)
                ):
                    raise Broken(f"worker {self.number} cannot commit {at.ballot}: it has {self.state}")
                self._commit(made_in, bool(is_step))
            if self.state is None or self.state.committed != at.committed:
                raise Broken(f"worker {self.number} is to hold {at.committed} transactions, and has {self.state}")
        self.stage = 0
        world = self.world
        if form.generation not in world.groups:
            world.groups[form.generation] = Group(world, form)
            world.groups[form.generation].find_missing()
        self.group = world.groups[form.generation]
        if self.busy_until_s < float("inf"):
            self.soon(max(0.0, self.busy_until_s - world.now_s), self._arrive)

    def _arrive(self) -> None:
        """Connect to the others, when the user's code has come back."""
        group, world = self.group, self.world
        assert group is not None
        group.arrived += 1
        if group.is_broken:
            self.soon(0.01, self.severed, -1)
        elif group.arrived == len(group.crew) and not group.is_cut():
            for worker in group.crew:
                worker.soon(0.05 + 0.1 * world.random.random(), worker._joined)

    def _joined(self) -> None:
        group = self.group
        assert group is not None
        form = group.form
        if self.state is None and form.sources is not None and form.settlement is not None:
            source = self.world.workers[form.sources[self.number % self.world.setting.size]]
            if not source.is_alive or source.generation != form.generation:
                return  # the group is about to break
            self.state, self.ballot, self.tail = source.state, source.ballot, list(source.tail)
            if self.state is None or self.state.committed != form.settlement.committed:
                raise Broken(f"worker {self.number} copies {self.state} from worker {source.number}")
        elif self.state is None:
            self.state, self.tail = self.world.checkpoint or State(0, 0, 0), []
            self.acked = self.state.committed
            self.world.controller.rolled_back(form.generation, self.state.committed)
        self.at = At.JOINED
        self._tell(Formed(self.number, form.generation, self.state.committed))

    # --- transactions ------------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        world = self.world
        time_s = world.setting.step_s * (0.7 + 0.6 * world.random.random()) * self.slow
        self.busy_until_s = world.now_s + time_s
        if time_s > COLLECTIVE_S:
            assert self.group is not None
            world.later(COLLECTIVE_S, self._overdue, self.token, self.group)
        if time_s > STUCK_S:
            world.later(STUCK_S, self._stuck, self.busy_until_s)
        if time_s < float("inf"):
            self.soon(time_s, self._computed)

    def _stuck(self, until_s: float) -> None:
        if self.is_alive and self.busy_until_s == until_s > self.world.now_s:
            self.world.controller.tell(Lost(self.number, f"stuck for {STUCK_S:g} s"))
            self.world.later(STUCK_S, self._stuck, until_s)

    def _overdue(self, token: int, group: Group) -> None:
        if token == self.token and self.is_alive and self.stage == 0:
            group.sever(self, 0.0)

    def _computed(self) -> None:
        group, state = self.group, self.state
        assert group is not None
        assert state is not None
        if self.echo is not None:
            failure = Failure(message=f"worker {self.echo} went away", is_echo=True)
            self._leave(failure, suspect=self.echo if self.echo >= 0 else None)
            return
        flaw = self.world.flaws.get(state.steps)
        if flaw is not None and self._errs(flaw):
            self._leave(Failure(message="ValueError: bad sample", rank=self.rank, step=state.steps))
            return
        self.stage = 1
        coordinate, size = self.number % self.world.setting.size, self.world.setting.size
        group.reduced[coordinate] += 1
        if group.reduced[coordinate] * size == len(group.members):
            group.reduced[coordinate] = 0
            for worker in group.waiting(group.members[coordinate::size], 1):
                worker.soon(0.002 * self.world.random.random(), worker._reduced)

    def _errs(self, flaw: list[int]) -> bool:
        """Tell whether the user's code fails now. flaw: [generations that it fails in, ranks, the last generation]."""
        if flaw[2] != self.generation and flaw[0] > 0:
            flaw[0] -= 1
            flaw[2] = self.generation
        return flaw[2] == self.generation and self.rank < flaw[1]

    def _reduced(self) -> None:
        group, world = self.group, self.world
        assert group is not None
        assert self.state is not None
        self.stage, self.reduced_in = 2, self.generation
        group.ballots += 1
        group.states.add(self.state)
        if self.wishes:
            group.wishes |= self.wishes
        if self.rank == 0:
            group.acked = self.acked
        if group.ballots < len(group.members):
            return
        if len(group.states) > 1:
            raise Broken(f"generation {self.generation} goes on from different states: {group.states}")
        wish = Stop if Stop in group.wishes else Pause if group.wishes else None
        group.ballots = 0
        group.states.clear()
        spread_s = 0.002
        if world.traps:
            world.traps -= 1
            spread_s = 0.03
            world.later(spread_s * world.random.random(), world.random.choice(group.members).die)
        for worker in group.waiting(group.members, 2):
            worker.soon(spread_s * world.random.random(), worker._voted, wish, group.acked)

    def _voted(self, wish: type[Command] | None, acked: int) -> None:
        world, before = self.world, self.state
        assert before is not None
        is_last = self.closing or before.steps == world.setting.steps
        self._commit(self.generation, not is_last)
        self.acked = max(self.acked, acked)
        while self.tail and self.tail[0][0] <= acked:
            del self.tail[0]
        if self.rank == 0:
            self._publish()
            if before.committed % world.setting.save_every == 0:
                self.soon(0.2 * world.random.random(), self._save, before)
        if is_last:
            if self.rank == 0:
                self.soon(0.3 * world.random.random(), self._finish)
            else:
                self._leave(None, is_end=True)
            return
        self.closing = wish is Stop
        if wish is Pause:
            self._leave(None)
        else:
            self._compute()

    def _commit(self, made_in: int, is_step: bool) -> None:
        state = self.state
        assert state is not None
        committed, steps = state.committed + 1, state.steps + is_step
        self.state = State(committed, steps, hash((state.digest, committed, made_in, is_step)))
        self.ballot = (committed, made_in, is_step)
        self.stage = 0
        self.tail.append((committed, made_in, steps if is_step else 0))

    def _publish(self) -> None:
        """Let out what the last ballot has made stable."""
        if len(self.tail) > 1:
            rows, controller = self.tail[:-1], self.world.controller
            controller.published = max(controller.published, rows[-1][0])
            self.world.send(self, controller.record, self, self.generation, rows)

    def _save(self, state: State) -> None:
        if self.acked < state.committed:  # the record of what made it comes first
            self.soon(0.1, self._save, state)
            return
        newest = self.world.checkpoint
        if newest is None or newest.committed <= state.committed:
            self.world.checkpoint = state

    def _finish(self) -> None:
        """End as rank 0, when all is on record and written."""
        assert self.state is not None
        while self.tail and self.tail[0][0] <= self.acked:
            del self.tail[0]
        if len(self.tail) > 1:
            self._publish()
            self.soon(0.2, self._finish)
            return
        self.world.checkpoint = self.state
        self.world.has_model = self.state.steps == self.world.setting.steps
        self._leave(None, is_end=True)

    def _leave(self, failure: Failure | None, is_end: bool = False, suspect: int | None = None) -> None:
        if failure is not None:
            self._sever(0.001)
        self.at, self.is_end = At.LEFT, is_end
        self.token += 1
        suspect = None if suspect == -1 else suspect
        self._tell(Left(self.number, self.generation, self._position(), failure, is_end, suspect))
