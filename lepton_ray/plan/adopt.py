"""Decide how a controller that comes back takes over the workers that its earlier life left behind.

They went on training meanwhile. The journal remembers the last order to form a generation, which was written before it
was given; the scheduler knows which replicas the job holds; each worker that lives says where it is. A generation in
which all are at work goes on undisturbed. Any other is settled, as after a failure. Workers obey the newest life only,
so that no order of an earlier one comes late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from lepton_ray.plan.events import (
    Abort,
    Ask,
    Command,
    End,
    Event,
    Form,
    Granted,
    Left,
    Phase,
    Replica,
    ResizeAsked,
    Run,
    Start,
    Step,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.membership import advance, lose
from lepton_ray.plan.recover import Position, workers_of
from lepton_ray.plan.replicas import crew


class At(str, Enum):
    """Where a worker is."""

    STARTING = "starting"
    READY = "ready"
    """It has been in no generation."""
    FORMING = "forming"
    JOINED = "joined"
    """It has formed its generation, and trains unless it waits for the order to."""
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a worker says to a controller that comes back."""

    at: At
    generation: int = 0
    """The newest that it was told of."""
    position: Position | None = None
    """Of a worker that has left, if it holds a state that is of use."""
    is_end: bool = False
    """It left at the end of the training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the journal remembers of earlier lives. Orders are on record before they are given, so some never were."""

    form: Form | None = None
    """The newest."""
    trained: int = 0
    """The newest generation that was set going; 0 for none."""
    started: frozenset[int] = frozenset()
    """Replicas whose workers were to start."""
    next_replica: int = 0
    """After all numbers that were ever asked for."""
    target: int | None = None
    """As it was changed last."""
    cancel_reason: str | None = None
    end: End | None = None


def recall(past: Past, event: Event | None, commands: Iterable[Command]) -> Past:
    """Return the past with one more record. event: None for the beginning of a life."""
    match event:
        case ResizeAsked(target, _):
            past = replace(past, target=target)
        case StopAsked(reason):
            past = replace(past, cancel_reason=past.cancel_reason or reason)
    for command in commands:
        match command:
            case Ask(replicas):
                past = replace(past, next_replica=max([past.next_replica, *(number + 1 for number in replicas)]))
            case Start(workers):
                past = replace(past, started=past.started | {workers[0] // len(workers)})
            case Form():
                past = replace(past, form=command)
            case Train(generation):
                past = replace(past, trained=generation)
            case End():
                past = replace(past, end=command)
    return past


def adopt(run: Run, past: Past, *, held: Collection[int], words: Mapping[int, Word], now_s: float) -> Step:
    """Return the run as it goes on, and what is to be done.

    run: with the settings of the job. held: replicas that the scheduler has given the job. words: of those of their
    workers that answered; for one that exists, but cannot answer yet, that it is starting.
    """
    if past.end is not None:
        return replace(run, phase=Phase.ENDED, outcome=past.end.outcome, failure=past.end.failure), [past.end]
    form = past.form
    part = [] if form is None else [*form.members, *sorted({*(form.sources or {}).values()}.difference(form.members))]
    veterans = {worker // run.size for worker in part}.union(
        w // run.size for w, word in words.items() if word.generation
    )
    commands: list[Command] = []
    replicas, gone = {}, []
    for number in sorted(held):
        workers = workers_of(number, run.size)
        here = {worker for worker in workers if worker in words and words[worker].at is not At.STARTING}
        ready = frozenset(workers if number in veterans else here)
        ready_s = now_s if len(ready) == run.size else None
        replicas[number] = Replica(start_by_s=now_s + run.limits.start_s, ready=ready, ready_s=ready_s)
        absent = [worker for worker in workers if worker not in words]
        if absent and (number in veterans or number in past.started):
            gone += absent
        elif ready_s is None:
            commands.append(Start(tuple(workers)))
    run = replace(
        run,
        generation=form.generation if form else run.generation,
        target=run.target if past.target is None else max(run.least, past.target),
        replicas=replicas,
        next_replica=max([past.next_replica, *(number + 1 for number in held)]),
        has_trained=past.trained > 0,
    )
    news: list[Event] = [] if past.cancel_reason is None else [StopAsked(past.cancel_reason)]
    if form is not None:
        run, orders, missed = _resume(run, form, part, past.trained, words, now_s)
        commands += orders
        news += missed
    run, orders = lose(run, gone, "it did not answer the controller that came back", None, now_s)
    commands += orders
    for event in (*news, Granted(frozenset()), Tick()):
        run, orders = advance(run, event, now_s)
        commands += orders
    return run, commands


def _resume(
    run: Run, form: Form, part: list[int], trained: int, words: Mapping[int, Word], now_s: float
) -> tuple[Run, list[Command], list[Event]]:
    """Take up the last generation: it trains, or is to be settled. Returns what was missed of it as well."""
    inside = {w: words[w] for w in part if w in words and words[w].generation == form.generation}
    is_whole = all(w in inside and (inside[w].at is At.JOINED or inside[w].is_end) for w in form.members)
    missed: list[Event] = []
    for worker in part:
        word = words.get(worker)
        if word is not None and (worker not in inside or word.at is At.LEFT):
            position = word.position if word.generation >= trained else None
            missed.append(Left(worker, form.generation, position, is_end=word.is_end and worker in inside))
    if is_whole:
        run = replace(run, phase=Phase.TRAINING, members=form.members, has_trained=True)
        return run, [Train(form.generation)], missed
    # Those that were to go, too, may hold what all others have lost. What is older than `trained` is of no use.
    spare = {w: word.position for w, word in words.items() if word.generation >= trained and w not in part}
    run = replace(
        run,
        phase=Phase.SETTLING,
        members=form.members,
        lenders=frozenset(part).difference(form.members),
        positions={worker: position for worker, position in spare.items() if position is not None},
        cause="the controller came back",
        deadline_s=now_s + run.limits.settle_s,
    )
    if not crew(run):
        return replace(run, phase=Phase.WAITING, members=(), lenders=frozenset(), deadline_s=None), [], []
    others = tuple(worker for worker in part if worker in inside and inside[worker].at is not At.LEFT)
    return run, [Abort(form.generation, others)] if others else [], missed
