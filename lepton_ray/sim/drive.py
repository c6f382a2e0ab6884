"""Drive made-up jobs through seeded faults, and check what must hold.

python -m lepton_ray.sim.drive --seeds 10000     many lives
python -m lepton_ray.sim.drive --seed 17         one, with everything that was told and ordered
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass

from lepton_ray.plan.batch import own
from lepton_ray.plan.events import Outcome, StopAsked
from lepton_ray.plan.receipt import receipt
from lepton_ray.sim import faults
from lepton_ray.sim.controller import Broken
from lepton_ray.sim.world import World

UNTIL_S = 1000.0
MICROBATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How a made-up job went."""

    outcome: Outcome
    reason: str
    faults: int
    """That found somebody to strike."""
    generations: int
    rollbacks: int
    """Returns to a checkpoint."""
    time_s: float


def drive(seed: int) -> Life:
    """Live a seed to its end. Raises Broken when something does not hold."""
    world = World(faults.setting(seed), seed)
    faults.plan(world, seed)
    try:
        world.live(UNTIL_S)
        return _judge(world)
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def _judge(world: World) -> Life:
    controller = world.controller
    end, run = controller.end, controller.run
    assert end is not None
    assert run is not None
    if end.outcome is Outcome.FINISHED:
        if not world.has_model:
            raise Broken("the job has finished, and there is no model")
        _account(world)
    elif end.outcome is Outcome.CANCELLED:
        if not any(isinstance(event, StopAsked) for _, event, _ in controller.journal):
            raise Broken("the job is cancelled, and nobody asked for that")
    else:
        message = end.failure.message if end.failure else ""
        is_explained = (world.has_refused and "quota" in message) or (world.is_flawed and "ValueError" in message)
        if not is_explained:
            raise Broken(f"the job failed without need: {message!r}")
    return Life(
        outcome=end.outcome,
        reason=end.failure.message if end.failure else end.reason or "",
        faults=world.struck,
        generations=run.generation,
        rollbacks=max(0, len(controller.rollbacks) - 1),
        time_s=world.now_s,
    )


def _account(world: World) -> None:
    """Write the journal that the workers of this life would have left, and count every sample of it."""
    rows = sorted(world.controller.rows.values())
    steps = [step for _, _, step in rows if step]
    if steps != [*range(1, world.setting.steps + 1)]:
        raise Broken(f"the steps on record are {steps}")
    batch = {"samples": MICROBATCHES, "microbatches": MICROBATCHES}
    config = {"batch": batch, "train_data": {"samples": MICROBATCHES * world.setting.steps}}
    records: list[dict[str, object]] = [{"event": "header", "config": config}]
    for _, made_in, step in rows:
        members = world.groups[made_in].members
        work = [[0, 0] for _ in range(MICROBATCHES)]
        for share in own(MICROBATCHES, [1.0] * (len(members) // world.setting.size)):
            for m in share:
                work[m][0] += 1
        if step:
            records.append({"event": "step", "step": step - 1, "epoch": 0, "generation": made_in, "work": work})
    found = receipt(records)
    if (found.samples, found.samples_lost, found.samples_repeated) != (MICROBATCHES * world.setting.steps, 0, 0):
        raise Broken(f"the samples do not add up: {found}")


def main(arguments: list[str] | None = None) -> int:
    """Live one seed aloud, or many; return 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m lepton_ray.sim.drive", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="live this one, and show what was told and ordered")
    parser.add_argument(
        "--seeds", type=int, default=1000, help="how many to live, from --first on (default: %(default)s)"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    options = parser.parse_args(arguments)
    return show(options.seed) if options.seed is not None else many(options.first, options.seeds)


def many(first: int, count: int) -> int:
    """Live many seeds; say how they went, and how to see those again that broke a rule."""
    start_s, broken = time.process_time(), 0
    lives: list[Life] = []
    for seed in range(first, first + count):
        try:
            lives.append(drive(seed))
        except Broken as error:
            broken += 1
            _say(f"{error}\n    replay it: python -m lepton_ray.sim.drive --seed {seed}")
    took_s = time.process_time() - start_s
    outcomes = Counter(life.outcome.value for life in lives)
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    _say(
        f"{count} lives in {took_s:.1f} s of a core: {told}, {broken} broken; "
        f"{sum(life.faults for life in lives)} faults, at least {min((life.faults for life in lives), default=0)} in "
        f"each; {sum(life.generations for life in lives)} generations, "
        f"{sum(life.rollbacks for life in lives)} returns to a checkpoint"
    )
    return 1 if broken else 0


def show(seed: int) -> int:
    """Live one seed, and show everything that was told and ordered."""
    world = World(faults.setting(seed), seed)
    _say(f"{world.setting}")
    for line in faults.plan(world, seed):
        _say(line)
    problem = ""
    try:
        world.live(UNTIL_S)
        _say(f"{_judge(world)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it comes after what led to it
        problem = f"{type(error).__name__}: {error}"
    for time_s, event, commands in world.controller.journal:
        _say(f"{time_s:9.3f} s  {event}")
        for command in commands:
            _say(f"{'':13}-> {command}")
    _say(problem)
    return 1 if problem else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
