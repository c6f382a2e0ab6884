"""The controller of a made-up job: the planner, its journal, and what must hold after each of its decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_ray.plan.adopt import Past, Word, adopt, recall
from lepton_ray.plan.events import (
    Abort,
    Ask,
    Command,
    Committed,
    End,
    Event,
    Form,
    Granted,
    Lost,
    Pause,
    Phase,
    Release,
    Run,
    Start,
    Stop,
    Tick,
    Train,
)
from lepton_ray.plan.membership import advance, begin
from lepton_ray.plan.recover import workers_of
from lepton_ray.plan.replicas import awaited

if TYPE_CHECKING:
    from lepton_ray.sim.workers import Worker
    from lepton_ray.sim.world import World

TICK_S = 0.5
QUERY_S = 1.5
"""How long a controller that comes back waits for the workers' words."""
REPEAT_S = 1.0
"""What a controller that is down did not hear is said again after so long."""

Row = tuple[int, int, int]
"""(transaction, generation that made it, number of the step that it was; 0 for one without samples)."""


class Broken(AssertionError):
    """Something that must never happen has happened."""


@dataclass(frozen=True, slots=True)
class Began:
    """The beginning of a life: "begin" or "adopt", of which these are the arguments."""

    how: str
    arguments: dict[str, Any]


class Controller:
    """Obeys the planner, and watches it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.run: Run | None = None
        """None while it is down."""
        self.life = 0
        self.journal: list[tuple[float, Event | Began, list[Command]]] = []
        """(time, what was told, commands)."""
        self.past = Past()
        """What is on record."""
        self.lost: set[int] = set()
        """Workers that the planner knows to be gone."""
        self.rows: dict[int, Row] = {}
        """Transaction -> what is on record of it."""
        self.recorded = 0
        """All transactions up to this one are on record."""
        self.published = 0
        """The newest transaction that ever left a worker as stable."""
        self.rollbacks: list[tuple[int, int]] = []
        """(generation, transactions that it began with) of all returns to a checkpoint."""
        self.end: End | None = None
        self.is_doomed = False
        """It dies at the next change of the members, before it has given its orders, or just after."""
        self._orders = 0
        self._heard: list[Event] | None = None
        """Events for a controller that does not know its run yet; None while it is down."""
        self._words: dict[int, Word] = {}

    def begin(self) -> None:
        """Start the job."""
        at = self._world.setting
        self.life = 1
        job = {"size": at.size, "least": at.least, "start": at.start, "target": at.target, "limits": at.limits}
        self._begin(Began("begin", {**job, "now_s": self._world.now_s}))
        self._world.later(TICK_S, self._tick, self.life)

    def _begin(self, how: Began) -> None:
        run, commands = begin(**how.arguments) if how.how == "begin" else adopt(**how.arguments)
        self._obey(run, how, commands)

    def _tick(self, life: int) -> None:
        if self.run is not None and life == self.life:
            self._advance(Tick())
            self._world.later(TICK_S, self._tick, life)

    def tell(self, event: Event) -> None:
        """Take an event. Whoever tells a controller that is down tells it again."""
        if self.run is not None:
            self._advance(event)
        elif self._heard is not None:
            self._heard.append(event)
        else:
            self._world.later(REPEAT_S, self.tell, event)

    def _advance(self, event: Event) -> None:
        assert self.run is not None
        run, commands = advance(self.run, event, self._world.now_s)
        if isinstance(event, Lost):
            self.lost.add(event.worker)
        if commands or run != self.run:
            self._obey(run, event, commands)

    def _obey(self, run: Run, event: Event | Began, commands: list[Command]) -> None:
        world = self._world
        self.run = run
        self._check(run)
        last, self.past = self.past, recall(self.past, None if isinstance(event, Began) else event, commands)
        self.journal.append((world.now_s, event, commands))
        if self.is_doomed and commands:
            self.is_doomed = False
            world.later(0.0, self.crash, 2.0 * world.random.random())
            if world.random.random() < 0.5:  # what is on record was never ordered
                return
        for command in commands:
            match command:
                case Ask(replicas):
                    self._orders += 1
                    world.send(None, world.asked, self._orders, replicas)
                case Start(workers):
                    for number in workers:
                        world.started(number)
                case Form():
                    self._check_form(command, last.form)
                    for number in {*command.members, *(command.sources or {}).values()}:
                        self._order(number, command)
                case Train() | Pause() | Stop():
                    if command.generation != run.generation:
                        raise Broken(f"{command} while generation {run.generation} is on")
                    for number in run.members:
                        self._order(number, command)
                case Abort(_, workers):
                    for number in workers:
                        self._order(number, command)
                case Release(number, gone, _):
                    self._check_release(number, gone, is_late_grant=isinstance(event, Granted))
                    world.later(0.2 * world.random.random(), world.released, number)
                case End():
                    self.end = command

    def _order(self, number: int, command: Command) -> None:
        replica = self.run and self.run.replicas.get(number // self._world.setting.size)
        if number in self.lost or (replica and number in replica.gone):
            raise Broken(f"{type(command).__name__} for worker {number}, which is lost")
        worker = self._world.workers[number]
        self._world.send(worker, worker.hear, command, self.life)

    # --- what must hold ----------------------------------------------------------------------------------------------

    def _check(self, run: Run) -> None:
        """Check what holds after every event: a run trains, has ended, or waits with a reason, and for a time."""
        if run.phase in (Phase.TRAINING, Phase.ENDED):
            return
        if not awaited(run):
            raise Broken(f"the run is {run.phase.value}, and waits for nothing")
        if run.deadline_s is None and run.phase not in (Phase.PAUSING, Phase.STARTING):
            raise Broken(f"the run is {run.phase.value}, and may wait for ever")
        if not self._world.held.keys() >= run.replicas.keys():
            raise Broken(f"the run counts on replicas {[*run.replicas]}, and holds {[*self._world.held]}")

    def _check_form(self, form: Form, last: Form | None) -> None:
        size, workers = self._world.setting.size, self._world.workers
        if last is not None and form.generation <= last.generation:
            raise Broken(f"generation {form.generation} is formed after {last.generation}")
        for at, number in enumerate(form.members):
            if number % size != at % size or number // size != form.members[at - at % size] // size:
                raise Broken(f"the members {form.members} are no whole replicas")
        if len({*form.members}) < len(form.members) or not form.members:
            raise Broken(f"the members {form.members} are not different workers")
        assert self.run is not None
        known = [n for n in workers if n // size in self.run.replicas]
        if last is not None and self.past.trained == last.generation:  # who only lent its state does not keep it
            known = [n for n in known if n in last.members]
        sound = [workers[n] for n in known if workers[n].is_sound and workers[n].generation]
        if form.settlement is None:
            if {worker.number % size for worker in sound if worker.state is not None} == {*range(size)}:
                raise Broken("all load a checkpoint, although every coordinate is held by a sound worker")
            return
        newest = max((worker.state.committed for worker in sound if worker.state is not None), default=0)
        if form.settlement.committed < max(newest, self.published):
            raise Broken(
                f"generation {form.generation} goes on from {form.settlement.committed} transactions; "
                f"{newest} were committed, {self.published} are stable"
            )

    def _check_release(self, number: int, gone: frozenset[int], is_late_grant: bool) -> None:
        if number not in self._world.held:
            if is_late_grant:
                return
            raise Broken(f"replica {number} is released, but was not held")
        assert self.run is not None
        if number in self.run.replicas:
            raise Broken(f"replica {number} is released, and kept")
        for worker in workers_of(number, self._world.setting.size):
            found = self._world.workers.get(worker)
            self.lost.add(worker)
            if found is None or not found.is_sound:
                continue
            if worker in gone:
                raise Broken(f"worker {worker} is sound, but was given up")
            if found.is_busy and worker in self.run.members:
                raise Broken(f"replica {number} is released, although worker {worker} is at work")

    def record(self, worker: Worker, generation: int, rows: list[Row]) -> None:
        """Put what a worker publishes on record, and let it know how far the record goes."""
        for row in rows:
            number, made_in, _ = row
            if any(made_in < back_in and number > committed for back_in, committed in self.rollbacks):
                continue
            if self.rows.setdefault(number, row) != row:
                raise Broken(f"transaction {number} is on record as {self.rows[number]}, and published as {row}")
        if self.run is None:
            return
        while self.recorded + 1 in self.rows:
            self.recorded += 1
        worker.acked = self.recorded
        if self.run.failed and any(made_in == generation for _, made_in, _ in rows):
            self.tell(Committed(generation))

    def rolled_back(self, generation: int, committed: int) -> None:
        """A generation began with a checkpoint: what was done after that is no part of the model any more."""
        if (generation, committed) not in self.rollbacks:
            self.rollbacks.append((generation, committed))
            self.rows = {number: row for number, row in self.rows.items() if number <= committed}
            self.published = self.recorded = min(self.recorded, committed)

    # --- it dies and comes back --------------------------------------------------------------------------------------

    def crash(self, down_s: float) -> None:
        """End the controller's process. What it has sent still arrives."""
        if self.run is not None:
            self.run = None
            self._world.later(down_s, self._come_back)

    def _come_back(self) -> None:
        self.life += 1
        self._words, self._heard = {}, []
        for worker in list(self._world.workers.values()):
            if worker.is_alive:
                self._world.send(worker, self._query, worker, self.life)
        self._world.later(QUERY_S, self._adopt)

    def _query(self, worker: Worker, life: int) -> None:
        if worker.is_reachable:
            worker.life = max(worker.life, life)
            self._words[worker.number] = worker.word()

    def _adopt(self) -> None:
        world, at = self._world, self._world.setting
        self.lost -= {*self._words}
        job = Run(size=at.size, least=at.least, start=at.start, target=at.target, limits=at.limits)
        found = {"held": [*world.held], "words": self._words, "now_s": world.now_s}
        self._begin(Began("adopt", {"run": job, "past": self.past, **found}))
        heard, self._heard = self._heard or [], None
        for event in heard:
            if self.end is None:
                self._advance(event)
        world.later(TICK_S, self._tick, self.life)
