"""What befalls a made-up job: drawn from a seed before it begins, done to whoever is there when the time comes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from lepton_ray.plan.adopt import At
from lepton_ray.plan.events import Limits, ResizeAsked, StopAsked
from lepton_ray.sim.workers import Worker
from lepton_ray.sim.world import Node, Setting, World

LIMITS = Limits(admit_s=60.0, start_s=12.0, settle_s=2.0, retries=8)
"""More retries than any life has faults, so that a job that gives up has no excuse."""
LEAST = 3
"""Faults of every life."""


def setting(seed: int) -> Setting:
    """Draw a cluster and a job."""
    draw = Random(f"setting {seed}")
    size = draw.choice([1, 1, 1, 2])
    target = draw.choice([1, 2, 2, 3, 4])
    slots = draw.choice([1, 2, 4])
    spare = draw.choice([0, 1, 2, 4])
    least = draw.randint(1, target)
    return Setting(
        size=size,
        least=least,
        start=draw.choice([target, target, draw.randint(least, target)]),
        target=target,
        steps=draw.randint(50, 70),
        step_s=draw.choice([0.1, 0.2, 0.3]),
        nodes=-(-(size * target + spare) // slots),
        slots=slots,
        save_every=draw.choice([5, 10, 20]),
        is_prompt=draw.random() < 0.5,
        limits=LIMITS,
    )


def plan(world: World, seed: int) -> list[str]:
    """Draw what befalls a world, and have it happen. Returns what was drawn, one line each."""
    draw = Random(f"faults {seed}")
    span_s = 3.0 + 0.7 * world.setting.steps * world.setting.step_s
    times_s = sorted(draw.uniform(0.5, span_s) for _ in range(draw.choice([LEAST, LEAST, 4, 5, 6])))
    plan = [(time_s, draw.choice(FAULTS)) for time_s in times_s]
    if draw.random() < 0.4:  # two in one moment, so that the second meets the recovery from the first
        plan.append((draw.choice(times_s) + draw.choice([0.01, 0.1, 0.5, 2.1]), draw.choice(FAULTS)))
    plan += [(draw.uniform(2.0, span_s), _resize) for _ in range(draw.choice([0, 0, 1, 2]))]
    rest, last_s = draw.random(), draw.uniform(times_s[LEAST - 1], span_s)
    if rest < 0.08:
        plan.append((last_s, _stop))
    elif rest < 0.10:
        plan.append((last_s, _fail_always))
    elif rest < 0.12:
        plan.append((last_s, _refuse))
    plan.sort(key=lambda item: item[0])
    for time_s, fault in plan:
        world.later(time_s, _strike, world, fault, Random(draw.random()))
    return [f"{time_s:7.2f} s {fault.__name__.strip('_')}" for time_s, fault in plan]


def _strike(world: World, fault: Fault, draw: Random) -> None:
    """Have a fault happen, as soon as there is somebody whom it can strike. What ends a life comes late in it."""
    if (fault not in ENDS or world.struck >= LEAST) and fault(world, draw):
        world.struck += fault in FAULTS
    else:
        world.later(0.2, _strike, world, fault, draw)


def _victims(world: World) -> list[Worker]:
    """List the workers that live: those at work, if any are."""
    alive = [worker for worker in world.workers.values() if worker.is_alive]
    return [worker for worker in alive if worker.at in (At.JOINED, At.FORMING, At.LEFT)] or alive


def _one(world: World, draw: Random) -> Worker | None:
    """Choose a worker, if there is one."""
    victims = _victims(world)
    return draw.choice(victims) if victims else None


def _node(world: World, draw: Random) -> Node:
    """Choose a node, if there is one, on which somebody is."""
    return draw.choice([worker.node for worker in _victims(world)] or world.nodes)


def _kill(world: World, draw: Random) -> bool:
    worker = _one(world, draw)
    if worker:
        worker.die()
    return worker is not None


def _kill_in_ballot(world: World, draw: Random) -> bool:
    """Have a worker die while a ballot is coming to its end: some have its result, others never get it."""
    world.traps += 1
    return True


def _kill_newcomer(world: World, draw: Random) -> bool:
    """Have a worker die that has not been at work, if there is one, else any."""
    fresh = [worker for worker in world.workers.values() if worker.is_alive and worker.at in (At.STARTING, At.READY)]
    if fresh:
        draw.choice(fresh).die()
    return bool(fresh) or _kill(world, draw)


def _lose_node(world: World, draw: Random) -> bool:
    world.lose_node(_node(world, draw), draw.uniform(1.0, 20.0))
    return True


def _lose_rack(world: World, draw: Random) -> bool:
    back_s = draw.uniform(1.0, 20.0)
    for node in draw.sample(world.nodes, max(1, len(world.nodes) // 2)):
        world.lose_node(node, back_s)
    return True


def _revoke(world: World, draw: Random) -> bool:
    world.drain(_node(world, draw), draw.uniform(1.0, 10.0), draw.uniform(1.0, 20.0))
    return True


def _straggle(world: World, draw: Random) -> bool:
    worker = _one(world, draw)
    if worker:
        worker.slow, worker.has_trouble = draw.choice([3.0, 10.0, 30.0]), True
        world.later(draw.uniform(0.5, 5.0), setattr, worker, "slow", 1.0)
    return worker is not None


def _wedge(world: World, draw: Random) -> bool:
    worker = _one(world, draw)
    if worker:
        worker.wedge()
    return worker is not None


def _freeze(world: World, draw: Random) -> bool:
    worker = _one(world, draw)
    if worker:
        worker.freeze(draw.choice([0.3, 1.0, 2.5, 3.5, 6.0, 60.0]))
    return worker is not None


def _lose_messages(world: World, draw: Random) -> bool:
    world.loss = draw.choice([0.05, 0.3, 0.6])
    world.later(draw.uniform(1.0, 8.0), setattr, world, "loss", 0.0)
    return True


def _cut_link(world: World, draw: Random) -> bool:
    """Cut a link, if there is one; else lose messages."""
    victims = _victims(world)
    if len(victims) < 2:
        return _lose_messages(world, draw)
    world.cut(frozenset(worker.number for worker in draw.sample(victims, 2)), draw.choice([0.5, 3.0, 30.0]))
    return True


def _restart_controller(world: World, draw: Random) -> bool:
    is_up = world.controller.run is not None
    world.controller.crash(draw.uniform(0.1, 5.0))
    return is_up


def _restart_controller_in_change(world: World, draw: Random) -> bool:
    world.controller.is_doomed = True
    return True


def _fail_once(world: World, draw: Random) -> bool:
    """Have the user's code fail at a step that is near, in one try, on one rank or on all."""
    world.flaws.setdefault(_near(world, draw), [1, draw.choice([1, 9]), 0])
    return True


def _fail_always(world: World, draw: Random) -> bool:
    world.is_flawed = True
    world.flaws[_near(world, draw)] = [99, draw.choice([1, 9]), 0]
    return True


def _near(world: World, draw: Random) -> int:
    """Choose one of the next steps."""
    done = max((worker.state.steps for worker in world.workers.values() if worker.state), default=0)
    return min(done + draw.randint(1, 5), world.setting.steps - 1)


def _refuse(world: World, draw: Random) -> bool:
    world.is_refusing = world.has_refused = True
    world.later(draw.uniform(1.0, 10.0), setattr, world, "is_refusing", False)
    return True


def _resize(world: World, draw: Random) -> bool:
    world.controller.tell(ResizeAsked(draw.randint(1, world.setting.target + 1), "somebody asked"))
    return True


def _stop(world: World, draw: Random) -> bool:
    world.controller.tell(StopAsked("somebody asked"))
    return True


Fault = Callable[[World, Random], bool]
"""Returns whether it has found somebody to strike."""

FAULTS: list[Fault] = [
    _kill, _kill, _kill_in_ballot, _kill_in_ballot, _kill_newcomer, _lose_node, _lose_rack, _revoke, _revoke, _straggle,
    _wedge, _freeze, _freeze, _lose_messages, _cut_link, _restart_controller, _restart_controller_in_change,
    _restart_controller_in_change, _fail_once,
]  # fmt: skip
ENDS = (_stop, _fail_always, _refuse)
