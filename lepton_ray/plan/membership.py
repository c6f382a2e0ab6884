"""The life of a run, as a function: `advance(run, event, now_s) -> (run, commands)`.

    waiting -> starting -> forming -> training -> ended
       ^          ^           ^          |
       +----------+-----------+- pausing / settling <- a replica is ready, is to go, or is lost
                  any phase -> stopping -> ended      (cancelled, driver gone, failed)

A replica is the workers that hold one copy of the model; it is placed, counted, resized and lost as a whole. Survivors
of a change keep their processes and their state. A planned change pauses all workers after the same transaction. After
a failure each survivor leaves its collectives and says where it stands; `plan.recover` settles where all go on. Then
the replicas that are whole form the next generation. Too few of them wait, holding what they have.

A failure that others report because a worker went away is an echo: it tells that the generation is over, not why. An
error of the user's code is tried once more; the same error at the same step ends the run.

Members that are at work have no deadline: who calls this watches that they live, and tells a silent one as lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from lepton_ray.plan.events import (
    BETWEEN,
    Abort,
    Broke,
    Command,
    Committed,
    End,
    Event,
    Failure,
    Form,
    Formed,
    Granted,
    Left,
    Limits,
    Lost,
    Outcome,
    Pause,
    Phase,
    Ready,
    Refused,
    Release,
    Replica,
    ResizeAsked,
    Revoked,
    Run,
    Start,
    Step,
    Stop,
    StopAsked,
    Tick,
    Train,
)
from lepton_ray.plan.recover import settle, siblings, workers_of
from lepton_ray.plan.replicas import able, crew, fill, is_there, needed, staying, trim

STOP_GRACE_S = 60.0
"""How long workers may take to reach a step's end and write the last checkpoint."""
LAST_WORDS_S = 10.0
"""How long the other workers of a run that failed may take to write down what they hold."""
GATHER_S = 2.0
"""A replica that is ready waits for others that are starting for so long, so that they join in one change."""
REFUSED_S = 60.0
"""A scheduler that refused is not asked again for so long, while others train."""
MISSTART_S = 300.0
"""Longest pause between replacements that do not start, while others train."""


def begin(*, size: int, least: int, start: int, target: int, limits: Limits, now_s: float, generation: int = 0) -> Step:
    """Return a run before its first generation, and the order to ask for its replicas. For the arguments see `Run`."""
    run = Run(size=size, least=least, start=start, target=target, limits=limits, generation=generation)
    return _idle(run, now_s)


def advance(run: Run, event: Event, now_s: float) -> Step:
    """Return the run after an event, and what is to be done. Events that no longer matter change nothing."""
    if run.phase is Phase.ENDED:
        return run, []
    match event:
        case Granted(replicas):
            return _granted(run, replicas, now_s)
        case Refused(reason):
            return _refused(run, reason, now_s)
        case Ready(worker):
            return _ready(run, worker, now_s)
        case Formed(worker, generation, committed):
            return _formed(run, worker, generation, committed, now_s)
        case Committed(generation):
            return (replace(run, failed=0) if run.failed and _is_at_work(run, generation) else run), []
        case Left():
            return _left(run, event, now_s)
        case Lost(worker, reason, failure):
            return lose(run, [worker], reason, failure, now_s)
        case ResizeAsked(target, reason):
            target = max(run.least, target)
            return (run, []) if target == run.target else _change(replace(run, target=target), reason, now_s)
        case Revoked(numbers, reason):
            revoked = {n: replace(r, is_revoked=True) for n, r in run.replicas.items() if n in numbers}
            return _change(replace(run, replicas={**run.replicas, **revoked}), reason, now_s)
        case StopAsked(reason):
            return _stop(run, reason, now_s)
        case Broke(failure):
            return _end(run, Outcome.FAILED, failure)
        case Tick():
            return _tick(run, now_s)


# --- replicas come and go ---------------------------------------------------------------------------------------------


def _granted(run: Run, numbers: frozenset[int], now_s: float) -> Step:
    """Start what is still wanted. What is not goes back at once."""
    start_by_s = now_s + run.limits.start_s
    late: list[Command] = [
        Release(number, frozenset(), "it is not wanted any more")
        for number in sorted(numbers - run.asked)
        if number not in run.replicas
    ]
    fresh = {number: Replica(start_by_s=start_by_s) for number in sorted(numbers & run.asked)}
    run = replace(run, asked=run.asked - numbers, replicas={**run.replicas, **fresh})
    starts: list[Command] = [Start(tuple(workers_of(number, run.size))) for number in fresh]
    run, more = _consider(run, now_s)
    return run, [*late, *starts, *more]


def _refused(run: Run, reason: str, now_s: float) -> Step:
    run = replace(run, asked=frozenset(), ask_at_s=now_s + REFUSED_S)
    if run.phase is Phase.WAITING:
        return _end(run, Outcome.FAILED, Failure(message=reason))
    return run, []  # it goes on with those that it has


def _ready(run: Run, worker: int, now_s: float) -> Step:
    if not is_there(run, worker):
        return run, []
    number = worker // run.size
    replica = run.replicas[number]
    replica = replace(replica, ready=replica.ready | {worker})
    if len(replica.ready) == run.size and replica.ready_s is None:
        replica = replace(replica, ready_s=now_s)
    return _consider(replace(run, replicas={**run.replicas, number: replica}), now_s)


def _change(run: Run, reason: str, now_s: float) -> Step:
    """Go towards other replicas than those that are there: release, ask, and pause or form where it is time."""
    run = replace(run, cause=run.cause or reason)
    run, released = trim(run, reason)
    run, asked = fill(run, now_s)
    run, more = _consider(run, now_s)
    return run, [*released, *asked, *more]


def _consider(run: Run, now_s: float) -> Step:
    """Begin the change for which all is there now, if any."""
    if run.phase in BETWEEN:
        return _idle(run, now_s)
    ready = able(run)
    if run.phase is not Phase.TRAINING or len(ready) < needed(run):
        return run, []
    at_work = {worker // run.size for worker in run.members}
    fresh = [number for number in ready if number not in at_work]
    leaving = at_work.difference(ready)
    is_waited_for = len(staying(run)) > len(ready)
    has_waited = any(now_s >= (run.replicas[number].ready_s or 0.0) + GATHER_S for number in fresh)
    if not leaving and not (fresh and (has_waited or not is_waited_for)):
        return run, []
    cause = f"{len(fresh)} replicas join, {len(leaving)} leave" + (f": {run.cause}" if run.cause else "")
    return replace(run, phase=Phase.PAUSING, cause=cause), [Pause(run.generation)]


def lose(run: Run, workers: Iterable[int], reason: str, failure: Failure | None, now_s: float) -> Step:
    """Take workers for gone: their replicas cannot go on, the generation that they have part in neither."""
    lost = [worker for worker in workers if is_there(run, worker)]
    if not lost:
        return run, []
    has_part = not set(lost).isdisjoint(crew(run))
    numbers = {worker // run.size for worker in lost}
    was_whole = sum(not run.replicas[number].gone for number in numbers)
    broken = {
        n: replace(run.replicas[n], gone=run.replicas[n].gone | {w for w in lost if w // run.size == n})
        for n in numbers
    }
    positions = {worker: position for worker, position in run.positions.items() if worker not in lost}
    run = replace(run, replicas={**run.replicas, **broken}, positions=positions)
    if failure is not None and (has_part or (run.phase in BETWEEN and not run.has_trained)):
        run = replace(run, failure=run.failure or failure)
    commands: list[Command] = []
    if has_part:
        run, commands = _settling(run, reason, now_s)
    else:
        run = _misstarted(run, was_whole, reason, now_s)
    run, released = trim(run, reason)
    run, asked = fill(run, now_s)
    run, more = _gather(run, now_s) if has_part else _consider(run, now_s)
    return run, [*commands, *released, *asked, *more]


def _misstarted(run: Run, replicas: int, reason: str, now_s: float) -> Run:
    """Count replicas that were lost outside of a generation. The members of one go on without them."""
    run = replace(run, misstarts=run.misstarts + replicas)
    if run.phase not in BETWEEN:
        return replace(run, ask_at_s=now_s + min(2.0**run.misstarts, MISSTART_S))
    if run.misstarts > run.limits.retries * run.target and run.failure is None:
        message = f"{run.misstarts} replicas were lost before they could train (Faults.retries); the last: {reason}"
        return replace(run, failure=Failure(message=message))
    return run


# --- generations ------------------------------------------------------------------------------------------------------


def _idle(run: Run, now_s: float) -> Step:
    """Between generations: form the next one, or wait for what it lacks."""
    if run.failure is not None:
        return _end(run, Outcome.FAILED, run.failure)
    ready, sources = able(run), _sources(run)
    if run.cancel_reason is not None and not (ready and sources):  # nothing to write down, or nobody who could
        return _end(run, Outcome.CANCELLED)
    if len(ready) >= needed(run):
        run, asked = fill(run, now_s)
        run, formed = _form(run, ready, sources, now_s)
        return run, [*formed, *asked]
    phase = Phase.STARTING if len(staying(run)) >= needed(run) else Phase.WAITING
    if phase is not run.phase or run.deadline_s is None:
        run = replace(run, phase=phase, deadline_s=now_s + run.limits.admit_s if phase is Phase.WAITING else None)
    # A replica that is to go, and holds nothing that others lack, may hold the place of its own replacement.
    keep = {*staying(run), *(worker // run.size for worker in (sources or {}).values())}
    run = replace(run, positions={w: position for w, position in run.positions.items() if w // run.size in keep})
    run, released = trim(run, "it is not needed any more")
    run, asked = fill(run, now_s)
    return run, [*released, *asked]


def _sources(run: Run) -> dict[int, int] | None:
    """Choose who gives the state that the next generation begins with; None when only a checkpoint can."""
    if run.settlement is None:
        return None
    order = {number: at for at, number in enumerate(able(run))}

    def rank(worker: int) -> tuple[int, bool, int]:
        number = worker // run.size
        return order.get(number, len(order)), bool(run.replicas[number].gone), worker

    return siblings(sorted(run.settlement.holders.intersection(run.positions), key=rank), run.size)


def _form(run: Run, numbers: Iterable[int], sources: dict[int, int] | None, now_s: float) -> Step:
    members = tuple(worker for number in numbers for worker in workers_of(number, run.size))
    command = Form(run.generation + 1, members, run.settlement if sources else None, sources, run.cause)
    run = replace(
        run,
        phase=Phase.FORMING,
        generation=run.generation + 1,
        members=members,
        lenders=frozenset((sources or {}).values()).difference(members),
        done=frozenset(),
        ended=frozenset(),
        suspects=(),
        deadline_s=now_s + (run.limits.start_s if run.cancel_reason is None else STOP_GRACE_S),
        cause="",
    )
    return run, [command]


def _formed(run: Run, worker: int, generation: int, committed: int, now_s: float) -> Step:
    if generation != run.generation or run.phase is not Phase.FORMING or worker not in crew(run):
        return run, []
    run = replace(run, done=run.done | {worker}, committed=committed)
    if not run.done.issuperset(crew(run)):
        return run, []
    run = replace(
        run,
        phase=Phase.TRAINING,
        lenders=frozenset(),
        done=frozenset(),
        positions={},
        settlement=None,
        has_trained=True,
        misstarts=0,
        deadline_s=None,
    )
    commands: list[Command] = [Train(run.generation)]
    run, released = trim(run, "it is not needed any more")  # it may have been the last to hold the state
    if run.cancel_reason is not None:
        run, more = _stopping(run, run.cancel_reason, now_s)
    else:
        run, more = _change(run, "", now_s)
    return run, [*commands, *released, *more]


def _left(run: Run, event: Left, now_s: float) -> Step:
    worker, failure = event.worker, event.failure
    was_forming = run.phase is Phase.FORMING
    if event.generation != run.generation or worker not in crew(run) or (worker in run.done and not was_forming):
        return run, []
    positions = {other: position for other, position in run.positions.items() if other != worker}
    if event.position is not None:
        positions[worker] = event.position
    run = replace(run, positions=positions, ended=run.ended | {worker} if event.is_end else run.ended)
    if event.suspect is not None:
        run = replace(run, suspects=(*run.suspects, event.suspect))
    if failure is not None and not failure.is_echo:
        run = _erred(run, failure)
    commands: list[Command] = []
    if failure is not None or was_forming:
        why = failure.message if failure else f"worker {worker} left while the generation formed"
        run, commands = _settling(run, why, now_s, left=worker)
    elif run.phase in (Phase.TRAINING, Phase.PAUSING) and not event.is_end and run.deadline_s is None:
        # All pause after the same transaction, so the others are about to.
        run = replace(run, phase=Phase.PAUSING, deadline_s=now_s + run.limits.settle_s)
    run, more = _gather(replace(run, done=run.done | {worker}), now_s)
    return run, [*commands, *more]


def _is_at_work(run: Run, generation: int) -> bool:
    return generation == run.generation and run.phase in (Phase.TRAINING, Phase.PAUSING, Phase.STOPPING)


def _erred(run: Run, failure: Failure) -> Run:
    """Note an error that is no echo. It ends the run when a second try cannot help, or did not."""
    what = failure.message, failure.step
    if failure.is_final or not failure.is_users or run.errors.get(what, run.generation) < run.generation:
        return replace(run, failure=run.failure or failure)
    return replace(run, errors={**run.errors, what: run.generation})


def _settling(run: Run, why: str, now_s: float, left: int | None = None) -> Step:
    """The generation is over: have everybody leave who is in it. left: who has done so just now."""
    if run.phase is Phase.SETTLING:
        return run, []
    done = frozenset[int]() if run.phase is Phase.FORMING else run.done  # joining is not leaving
    grace_s = run.limits.settle_s if run.failure is None else LAST_WORDS_S
    run = replace(run, phase=Phase.SETTLING, done=done, failed=run.failed + 1, cause=why, deadline_s=now_s + grace_s)
    others = tuple(worker for worker in crew(run) if worker not in done and worker != left)
    return run, [Abort(run.generation, others)] if others else []


def _gather(run: Run, now_s: float) -> Step:
    """Go on when all who have part in the generation, and are still there, have left it."""
    if not run.done.issuperset(crew(run)):
        return run, []
    if run.failure is not None:
        return _end(run, Outcome.FAILED, run.failure)
    if run.members[0] in run.ended:  # rank 0 has written the model, or the last checkpoint
        return _end(run, Outcome.FINISHED if run.cancel_reason is None else Outcome.CANCELLED)
    if run.phase is Phase.SETTLING:
        reached = max((position.committed for position in run.positions.values()), default=-1)
        if reached > run.committed:  # those that it has reached count once, also when the next ones fail to form
            run = replace(run, failed=1, committed=reached)
        if run.failed > run.limits.retries:
            message = (
                f"{run.failed} failures in a row without a step in between (Faults.retries); the last: {run.cause}"
            )
            return _end(run, Outcome.FAILED, Failure(message=message))
        run = _without_suspect(run, now_s)
    run = replace(run, members=(), lenders=frozenset(), done=frozenset(), settlement=settle(run.positions, run.size))
    return _idle(run, now_s)


def _without_suspect(run: Run, now_s: float) -> Run:
    """Give up the replica that is blamed most, where a generation failed again although all are there.

    That needs more patience where the others are too few to go on without it. Another is not asked for at once: it may
    well get the same place.
    """
    order = able(run)
    patience = 2 if len(order) > needed(run) else max(2, run.limits.retries // 2 + 1)
    is_whole = all(is_there(run, worker) for worker in (*run.members, *run.lenders))
    accused = Counter(worker for worker in run.suspects if worker // run.size in order)
    if run.failed < patience or not is_whole or not accused:
        return run
    worst = max(accused, key=lambda worker: (accused[worker], order.index(worker // run.size)))
    number = worst // run.size
    without = {**run.replicas, number: replace(run.replicas[number], is_revoked=True)}
    return replace(run, replicas=without, ask_at_s=now_s + REFUSED_S)


# --- the end ----------------------------------------------------------------------------------------------------------


def _end(run: Run, outcome: Outcome, failure: Failure | None = None) -> Step:
    run = replace(run, phase=Phase.ENDED, outcome=outcome, failure=failure, deadline_s=None)
    return run, [End(outcome, failure, run.cancel_reason)]


def _stop(run: Run, reason: str, now_s: float) -> Step:
    if run.cancel_reason is not None or run.failure is not None:  # it is ending already
        return run, []
    run = replace(run, cancel_reason=reason)
    if not run.has_trained:
        return _end(run, Outcome.CANCELLED)
    if run.phase in (Phase.TRAINING, Phase.PAUSING):
        return _stopping(run, reason, now_s)
    return _consider(run, now_s)  # it stops when the members are back at work


def _stopping(run: Run, reason: str, now_s: float) -> Step:
    """Have the members stop. Those that have already finished stay counted."""
    run, asked = fill(replace(run, phase=Phase.STOPPING, deadline_s=now_s + STOP_GRACE_S), now_s)
    return run, [Stop(run.generation, reason), *asked]


def _tick(run: Run, now_s: float) -> Step:
    late = [n for n, r in run.replicas.items() if r.ready_s is None and not r.gone and now_s >= r.start_by_s]
    if late:
        missing = [w for number in late for w in workers_of(number, run.size) if w not in run.replicas[number].ready]
        message = f"workers {missing} did not start within {run.limits.start_s:g} s (Faults.start_timeout_s)"
        if not run.has_trained and not any(replica.ready for replica in run.replicas.values()):
            return _end(run, Outcome.FAILED, Failure(message=message))  # nobody can
        return lose(run, missing, message, None, now_s)
    if run.phase is Phase.TRAINING:
        return _change(run, "", now_s)
    if run.deadline_s is None or now_s < run.deadline_s:
        return run, []
    silent = [worker for worker in crew(run) if worker not in run.done]
    match run.phase:
        case Phase.WAITING if not {worker // run.size for worker in run.positions}.issubset(staying(run)):
            # They hold what others lack, but perhaps also the place of a new replica: better a checkpoint than no end.
            stay = {
                worker: position for worker, position in run.positions.items() if worker // run.size in staying(run)
            }
            return _idle(replace(run, positions=stay, deadline_s=None), now_s)
        case Phase.WAITING:
            have = f"it has {len(staying(run))} of the {needed(run)} replicas that it needs"
            message = (
                f"the scheduler did not admit the job within {run.limits.admit_s:g} s (Faults.admit_timeout_s): {have}"
            )
            return _end(run, Outcome.FAILED, Failure(message=message))
        case Phase.STOPPING:
            return _end(run, Outcome.CANCELLED)
        case Phase.SETTLING if run.failure is not None:
            return _end(run, Outcome.FAILED, run.failure)
        case Phase.SETTLING:
            return lose(run, silent, f"workers {silent} did not answer within {run.limits.settle_s:g} s", None, now_s)
        case Phase.FORMING:  # whoever waits for a dead one is silent as well: the abort tells them apart
            limit = f"{run.limits.start_s:g} s (Faults.start_timeout_s)"
            return _settling(run, f"workers {silent} did not form their group within {limit}", now_s)
        case _:
            return _settling(run, f"workers {silent} did not pause when the others did", now_s)
