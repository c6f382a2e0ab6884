"""Every order in which a small job can fail and recover: an exhaustive search, with the state machine as it is.

Workers reduce within their coordinate, vote together, and commit. Any of them may die at any moment, or be taken for
dead while it lives. Whoever sees its group broken leaves it, now or later. The controller hears of deaths and words in
any order: of a death before the others notice, or when a new generation has formed with the dead. A worker hears the
order to form before or after the abort of what it is to form.

Two things shorten the search, and leave out nothing. A word is heard when it is said: one that is on its way for long
is the same as one that is said later, by a worker that did nothing meanwhile. And a generation that trains undisturbed,
with one state for all, is where the search began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from typing import Any, NamedTuple

import pytest

from lepton_ray.plan import membership
from lepton_ray.plan.events import (
    BETWEEN,
    Abort,
    Command,
    Event,
    Failure,
    Form,
    Formed,
    Granted,
    Left,
    Limits,
    Lost,
    Phase,
    Ready,
    Release,
    Run,
    Train,
)
from lepton_ray.plan.recover import Position, Settlement, settle, workers_of

ECHO = Failure(message="it broke", is_echo=True)
LIMITS = Limits(admit_s=0, start_s=0, settle_s=0, retries=99)


class At(IntEnum):
    READY = 0
    TOLD = 1
    """To form the generation."""
    JOINED = 2
    TRAINS = 3
    LEFT = 4
    DEAD = 5


AT_WORK = (At.TOLD, At.JOINED, At.TRAINS)


class W(NamedTuple):
    """A worker."""

    at: At
    generation: int = 0
    log: tuple[int, ...] = ()
    """For each transaction that it has committed, the generation that made it; none for one that holds no state."""
    has_voted: bool = False
    made_in: int = 0
    """Generation of that vote."""
    is_evicted: bool = False
    """It is taken for dead, and lives."""


class S(NamedTuple):
    """A world."""

    run: int
    workers: tuple[W, ...]
    faults: int
    form: int = 0
    """The newest."""
    inbox: frozenset[Event] = frozenset()
    """What the controller has not heard yet."""
    sums: frozenset[tuple[int, int]] = frozenset()
    """(transactions before, coordinate, or -1 for the ballot) of what all who have part in it have joined."""
    stable: tuple[int, ...] = (0,)
    """The longest log that anybody has let out."""
    is_aborted: bool = False


class Model:
    """Finds all worlds that can come about, and checks each step on the way."""

    def __init__(self, replicas: int, size: int, faults: int) -> None:
        self.size = size
        self.counts: Counter[str] = Counter()
        self.runs: list[Run] = []
        self.forms: list[Form] = []
        self.crews: list[frozenset[int]] = []
        self._ids: dict[str, int] = {}
        self._advanced: dict[tuple[int, Event], tuple[int, list[Command]]] = {}
        workers = range(replicas * size)
        run, _ = membership.begin(size=size, least=1, start=replicas, target=replicas, limits=LIMITS, now_s=0.0)
        for event in (Granted(run.asked), *map(Ready, workers), *(Formed(worker, 1, 1) for worker in workers)):
            run, commands = membership.advance(run, event, 0.0)
            for command in commands:
                if isinstance(command, Form):
                    self.number(command)
        assert run.phase is Phase.TRAINING
        sums = frozenset((1, coordinate) for coordinate in range(size))
        start = S(self.number(run), (W(At.TRAINS, 1, (0,)),) * len(workers), faults, sums=sums)
        seen, todo = {start}, [start]
        while todo:
            at, is_stuck = todo.pop(), True
            for world in self.next(at):
                is_stuck = False
                if world not in seen:
                    seen.add(world)
                    todo.append(world)
            assert not is_stuck or self.runs[at.run].phase is Phase.TRAINING, "nothing happens any more"
        self.counts["worlds"] = len(seen)

    def number(self, value: Run | Form) -> int:
        """Return the number of a value; equal ones have the same."""
        values: list[Any] = self.runs if isinstance(value, Run) else self.forms
        found = self._ids.setdefault(repr(value), len(values))
        if found == len(values):
            values.append(value)
            if isinstance(value, Form):
                self.crews.append(frozenset([*value.members, *(value.sources or {}).values()]))
        return found

    # --- what can happen ---------------------------------------------------------------------------------------------

    def next(self, world: S) -> Iterator[S]:
        run = self.runs[world.run]
        crew = [world.workers[n] for n in self.crews[world.form]]
        if run.generation > 1 and not world.inbox and not any(w.is_evicted or w.at is At.DEAD for w in crew):
            if run.phase is Phase.TRAINING and all(w.at is At.TRAINS for w in crew):
                return  # this is where it began
            is_sound = all(w.at in AT_WORK or w.generation < run.generation for w in crew)
            if run.phase is Phase.FORMING and is_sound and not world.faults:  # whoever is first, it ends in the same
                yield next(new for n, w in enumerate(world.workers) for new in self.work(world, n, w))
                return
        for n, w in enumerate(world.workers):
            if w.at is At.DEAD:
                continue
            yield from self.work(world, n, w)
            if world.faults and w.generation:
                poorer = world._replace(faults=world.faults - 1)
                dead = put(poorer, n, w._replace(at=At.DEAD))
                yield dead._replace(inbox=dead.inbox | {Lost(n, "it died")})
                if not w.is_evicted:
                    yield self.tell(put(poorer, n, w._replace(is_evicted=True)), Lost(n, "it was silent"))
        for event in world.inbox:
            yield self.tell(world._replace(inbox=world.inbox - {event}), event)
        if run.asked and run.phase in BETWEEN:
            yield self.grant(world, min(run.asked))

    def grant(self, world: S, replica: int) -> S:
        workers = workers_of(replica, self.size)
        newcomers = (W(At.READY),) * (workers.stop - len(world.workers))
        world = world._replace(workers=world.workers + newcomers)
        for event in (Granted(frozenset([replica])), *map(Ready, workers)):
            world = self.tell(world, event)
        return world

    def may_leave(self, world: S, w: W) -> bool:
        if w.at not in AT_WORK:
            return False
        crew = (world.workers[n] for n in self.crews[world.form])
        return world.is_aborted or any(
            x.at is At.DEAD or (x.at is At.LEFT and x.generation == w.generation) for x in crew
        )

    def work(self, world: S, n: int, w: W) -> Iterator[S]:
        """Yield the worlds after what a worker can do by itself."""
        if self.may_leave(world, w):
            yield self.leave(world, n, w)
        generation = self.forms[world.form].generation
        if w.generation < generation and n in self.crews[world.form] and not w.is_evicted:
            if world.is_aborted:
                yield self.leave(world, n, w._replace(generation=generation))
            yield put(world, n, self.obey(self.forms[world.form], n, w))
        elif w.at is At.TOLD:
            yield from self.join(world, n, w)
        elif w.at is At.TRAINS:
            yield from self.train(world, n, w)

    def leave(self, world: S, n: int, w: W) -> S:
        return self.tell(put(world, n, w._replace(at=At.LEFT)), last_word(n, w))

    def obey(self, form: Form, n: int, w: W) -> W:
        at, log = form.settlement, w.log
        if at is None or n not in at.holders:
            return W(At.TOLD, form.generation)
        if n in at.forward:
            assert w.has_voted, "it is to commit what it has not reduced"
            assert at.ballot == (at.committed,), "it is to commit with another ballot"
            log = (*log, w.made_in)
        assert len(log) == at.committed, "it is to hold what it does not hold"
        return W(At.TOLD, form.generation, log)

    def join(self, world: S, n: int, w: W) -> Iterator[S]:
        form = self.forms[world.form]
        if any(world.workers[other].generation < w.generation for other in self.crews[world.form]):
            return
        log = w.log or (0,)  # of the checkpoint
        if not w.log and form.sources is not None:
            source = world.workers[form.sources[n % self.size]]
            if source.at not in AT_WORK:
                return
            log = source.log
            self.counts["copied"] += 1
        assert form.settlement is None or len(log) == form.settlement.committed
        yield self.tell(put(world, n, w._replace(at=At.JOINED, log=log)), Formed(n, w.generation, len(log)))

    def train(self, world: S, n: int, w: W) -> Iterator[S]:
        form, count = self.forms[world.form], len(w.log)
        if not w.has_voted:
            if (count, n % self.size) in world.sums:
                world = put(world, n, w._replace(has_voted=True, made_in=w.generation))
                members = [world.workers[member] for member in form.members]
                is_whole = all((len(x.log), x.has_voted) >= (count, True) for x in members)
                yield world._replace(sums=world.sums | {(count, -1)}) if is_whole else world
        elif (count, -1) in world.sums and count <= (form.settlement.committed if form.settlement else 1):
            # One commit shows all that can be: nobody is ahead by more.
            world = let_out(world, w)
            yield self.reduce(put(world, n, w._replace(log=(*w.log, w.generation), has_voted=False, made_in=0)), n)

    def reduce(self, world: S, n: int) -> S:
        """Have a worker join the reduction of its next transaction."""
        count, coordinate = len(world.workers[n].log), n % self.size
        peers = [world.workers[m] for m in self.forms[world.form].members if m % self.size == coordinate]
        is_whole = all(len(x.log) >= count and x.at >= At.TRAINS for x in peers)
        return world._replace(sums=world.sums | {(count, coordinate)}) if is_whole else world

    # --- the controller ----------------------------------------------------------------------------------------------

    def tell(self, world: S, event: Event) -> S:
        key = world.run, event
        if key not in self._advanced:
            run, commands = membership.advance(self.runs[world.run], event, 0.0)
            # What makes no difference here is made equal.
            positions, replicas = dict(sorted(run.positions.items())), dict(sorted(run.replicas.items()))
            run = replace(run, cause="", failed=0, positions=positions, replicas=replicas)
            self._advanced[key] = self.number(run), commands
        number, commands = self._advanced[key]
        world = world._replace(run=number)
        for command in commands:
            match command:
                case Form():
                    world = self.form(world, command)
                case Abort():
                    world = world._replace(is_aborted=True)
                case Train():
                    world = self.set_going(world, command)
                case Release(replica, _, _):
                    for worker in workers_of(replica, self.size):
                        world = put(world, worker, world.workers[worker]._replace(at=At.DEAD))
        return world

    def form(self, world: S, form: Form) -> S:
        at, held = form.settlement, self.runs[world.run].replicas
        sound = {
            n: w.log
            for n, w in enumerate(world.workers)
            if w.at is not At.DEAD and not w.is_evicted and w.log and n // self.size in held
        }
        for w in world.workers:  # it may commit once more, and let out what it has
            if w.is_evicted and w.at is At.TRAINS and w.has_voted and (len(w.log), -1) in world.sums:
                world = let_out(world, w)
        if at is None:
            self.counts["lost"] += 1
            assert {n % self.size for n in sound} != {*range(self.size)}, "the state of survivors is thrown away"
        else:
            self.counts["settled"] += 1
            self.counts["rolled forward"] += bool(at.forward)
            self.counts["lent"] += not {*(form.sources or {}).values()}.issubset(form.members)
            assert at.committed >= len(world.stable), "something stable is lost"
            assert at.committed >= max(map(len, sound.values()), default=0), "a committed state is thrown away"
        number = self.number(form)
        workers = [
            W(At.DEAD) if (w.at is At.DEAD or w.is_evicted) and n not in self.crews[number] else w
            for n, w in enumerate(world.workers)
        ]
        stable = world.stable if at else (0,)
        return world._replace(form=number, workers=(*workers,), sums=frozenset(), stable=stable, is_aborted=False)

    def set_going(self, world: S, order: Train) -> S:
        self.counts["trained"] += 1
        members = self.forms[world.form].members
        logs = {world.workers[n].log for n in members}
        assert len(logs) == 1, f"they go on from different states: {logs}"
        (log,) = logs
        assert log[: len(world.stable)] == world.stable, "something stable is lost"
        for n in members:
            if world.workers[n].at is At.JOINED:
                world = self.reduce(put(world, n, world.workers[n]._replace(at=At.TRAINS)), n)
        assert order.generation == self.forms[world.form].generation
        return world


def put(world: S, n: int, w: W) -> S:
    return world._replace(workers=(*world.workers[:n], w, *world.workers[n + 1 :]))


def last_word(n: int, w: W) -> Left:
    count = len(w.log)
    position = Position(committed=count, is_reduced=w.has_voted, ballot=(float(count),)) if count else None
    return Left(n, w.generation, position, ECHO)


def let_out(world: S, w: W) -> S:
    """Have a worker let out what a ballot has confirmed."""
    shorter, longer = sorted((world.stable, w.log), key=len)
    assert longer[: len(shorter)] == shorter, "two workers let out different things"
    return world._replace(stable=longer)


@pytest.mark.parametrize(("replicas", "size", "faults"), [(2, 1, 2), (1, 2, 2), (3, 1, 3), (2, 2, 2)])
def test_every_order_of_faults_and_words_goes_on_from_one_state(replicas: int, size: int, faults: int):
    counts = Model(replicas, size, faults).counts
    assert counts["trained"] > 0
    if replicas * size > 2:
        assert min(counts["settled"], counts["rolled forward"]) > 100
    if replicas * size > 3:
        assert min(counts["lost"], counts["lent"], counts["copied"]) > 100
        assert counts["worlds"] > 50_000


def oldest(positions: dict[int, Position], size: int) -> Settlement | None:
    committed = min((position.committed for position in positions.values()), default=0)
    return settle({n: position for n, position in positions.items() if position.committed == committed}, size)


def without_roll_forward(positions: dict[int, Position], size: int) -> Settlement | None:
    found = settle(positions, size)
    return found and replace(found, forward=frozenset())


def only_those_there(positions: dict[int, Position], size: int) -> Settlement | None:
    found = settle(positions, size)
    return found and replace(found, holders=found.holders - found.forward, forward=frozenset())


def reduced_is_committed(positions: dict[int, Position], size: int) -> Settlement | None:
    found = settle(positions, size)
    if found is None or not all(position.is_reduced for position in positions.values()):
        return found
    return replace(found, committed=found.committed + 1, forward=found.holders)


@pytest.mark.parametrize("rule", [oldest, without_roll_forward, only_those_there, reduced_is_committed])
def test_wrong_rules_are_found_out(rule: Callable[..., Settlement | None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(membership, "settle", rule)
    with pytest.raises(AssertionError):
        Model(2, 2, 2)
