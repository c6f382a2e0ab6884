"""Keep worker processes ready, with torch imported, before any job asks for them."""

from __future__ import annotations

import secrets
import time
from typing import Any

import ray
from ray.exceptions import RayError

from lepton_ray.cluster.crew import new_worker
from lepton_ray.cluster.host import new_controller
from lepton_ray.cluster.launch import check_room, environment
from lepton_ray.cluster.names import CALL_TIMEOUT_S, answer
from lepton_ray.cluster.places import Places
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.config import Resources
from lepton_ray.errors import ConfigError, WaitTimeout
from lepton_ray.plan.allocate import Refuse
from lepton_ray.plan.types import Request

START_TIMEOUT_S = 120.0
"""Longest wait for room, and again for the processes to start."""
STAY_S = 5.0
"""Seconds between two words to the controller, without which it ends: this process may be killed while it waits."""


def warm(workers: int, resources: Resources, keep_s: float) -> str:
    """Have `workers` idle workers in the pool for `keep_s` seconds; return a sentence that says what was done.

    Raises ConfigError when the cluster cannot hold them.
    """
    if workers < 1 or keep_s <= 0:
        raise ConfigError(f"workers={workers}, minutes={keep_s / 60:g}: both must be more than 0.")
    slot = check_room(workers, resources, spare_cpus=0)
    owner = scheduler()
    controller = new_controller()  # what this holds is freed when that one is gone
    job = f"warm-{secrets.token_hex(4)}"
    request = Request(job=job, workers=workers, slot=slot, environment=environment())
    try:
        granted = _wait_for_room(owner.admit.remote(request, controller), controller)
        if isinstance(granted, Refuse):
            raise ConfigError(granted.reason)
        actors = {held.name: held.actor or new_worker(held) for held in granted.places}
        for actor in actors.values():
            actor.lend.remote(owner, CALL_TIMEOUT_S)
        answer([actor.prepare.remote() for actor in actors.values()], "a worker", START_TIMEOUT_S)
        answer(owner.give_back.remote(job, actors, keep_s), "the scheduler")
        answer(owner.keep_spare.remote(job, controller, controller, request.environment, keep_s), "the scheduler")
    except RayError as error:
        controller.kill()
        raise ConfigError(f"the workers could not be started: {error}") from error
    except BaseException:
        controller.kill()
        raise
    return f"{workers} workers ({slot}) are warm for {keep_s / 60:g} minutes"


def _wait_for_room(admission: Any, controller: Any) -> Places | Refuse:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not ray.wait([admission], timeout=STAY_S)[0]:
        controller.stay.remote()
        if time.monotonic() > deadline_s:
            raise WaitTimeout(f"other jobs use the cluster; there was no room within {START_TIMEOUT_S:g} s.")
    places: Places | Refuse = ray.get(admission)
    return places
