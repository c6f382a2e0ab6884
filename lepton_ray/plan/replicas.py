"""Which replicas a run keeps, gives back and asks for."""

from __future__ import annotations

from dataclasses import replace

from lepton_ray.plan.events import BETWEEN, Ask, Command, Phase, Release, Run, Step


def is_there(run: Run, worker: int) -> bool:
    """Tell whether a worker is one of the run, and not known to be gone."""
    replica = run.replicas.get(worker // run.size)
    return replica is not None and worker not in replica.gone


def crew(run: Run) -> list[int]:
    """List those who have part in the generation, and are still there."""
    return [worker for worker in (*run.members, *sorted(run.lenders)) if is_there(run, worker)]


def staying(run: Run) -> list[int]:
    """List the replicas that the run is to keep, as many as it wants: members first, and in the order of numbers."""

    def rank(number: int) -> tuple[bool, bool, int]:
        return number * run.size not in run.members, run.replicas[number].ready_s is None, number

    whole = [number for number, replica in run.replicas.items() if not replica.gone and not replica.is_revoked]
    return sorted(whole, key=rank)[: run.target]


def able(run: Run) -> list[int]:
    """List the replicas that can join the next generation, in the order of their ranks."""
    return [number for number in staying(run) if run.replicas[number].ready_s is not None]


def needed(run: Run) -> int:
    """Count the replicas without which no generation is formed."""
    if run.cancel_reason is not None:  # one is enough to write the last checkpoint
        return 1
    return run.least if run.has_trained else min(run.start, run.target)


def awaited(run: Run) -> str:
    """Say what a run waits for before it trains on; "" when it is at work or over."""
    if run.phase in (Phase.TRAINING, Phase.ENDED):
        return ""
    if run.phase not in BETWEEN:
        silent = [worker for worker in crew(run) if worker not in run.done]
        return f"workers {silent} have not answered" if silent else ""
    starting = [number for number in staying(run) if run.replicas[number].ready_s is None]
    parts = [f"the scheduler has not given replicas {sorted(run.asked)}"] if run.asked else []
    return " and ".join(parts + ([f"replicas {starting} are starting"] if starting else []))


def trim(run: Run, reason: str) -> Step:
    """Release the replicas that are not to stay. Those that train, or hold state, are kept for now."""
    in_use = {worker // run.size for worker in (*crew(run), *run.positions)}
    surplus = [number for number in sorted(run.replicas) if number not in in_use.union(staying(run))]
    commands: list[Command] = [Release(number, run.replicas[number].gone, reason) for number in surplus]
    kept = {number: replica for number, replica in run.replicas.items() if number not in surplus}
    return (replace(run, replicas=kept) if surplus else run), commands


def fill(run: Run, now_s: float) -> Step:
    """Ask for the replicas that are missing."""
    missing = 0
    if run.cancel_reason is None and run.failure is None:
        missing = run.target - len(staying(run))
        if missing > len(run.asked) and now_s < run.ask_at_s and run.phase not in BETWEEN:
            return run, []
    fresh = range(run.next_replica, run.next_replica + missing - len(run.asked))
    asked = frozenset([*sorted(run.asked), *fresh][:missing])
    if asked == run.asked:
        return run, []
    return replace(run, asked=asked, next_replica=run.next_replica + len(fresh)), [Ask(asked)]
