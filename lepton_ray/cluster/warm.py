"""Keep worker processes ready, with torch imported, before any job asks for them."""

from __future__ import annotations

import secrets

import ray
from ray.exceptions import RayError

from lepton_ray.cluster.controller import Controller
from lepton_ray.cluster.launch import check_room, environment
from lepton_ray.cluster.names import CALL_TIMEOUT_S
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.config import Resources
from lepton_ray.errors import ConfigError
from lepton_ray.plan.allocate import Refuse
from lepton_ray.plan.types import Request

START_TIMEOUT_S = 120.0


def warm(workers: int, resources: Resources, keep_s: float) -> str:
    """Have `workers` idle workers in the pool for `keep_s` seconds; return a sentence that says what was done.

    Raises ConfigError when the cluster cannot hold them.
    """
    slot = check_room(workers, resources, spare_cpus=0)
    owner = scheduler()
    job = f"warm-{secrets.token_hex(4)}"
    request = Request(job=job, workers=workers, slot=slot, environment=environment())
    granted = ray.get(owner.admit.remote(request, owner), timeout=START_TIMEOUT_S)
    if isinstance(granted, Refuse):
        raise ConfigError(granted.reason)
    actors = {held.name: held.actor or Controller.create(held) for held in granted.places}
    try:
        ray.get([actor.prepare.remote() for actor in actors.values()], timeout=START_TIMEOUT_S)
    except RayError as error:
        ray.get(owner.release.remote(job), timeout=CALL_TIMEOUT_S)
        raise ConfigError(f"the workers could not be started: {error}") from error
    for actor in actors.values():
        actor.lend.remote(owner, CALL_TIMEOUT_S)
    ray.get(owner.give_back.remote(job, actors, keep_s), timeout=CALL_TIMEOUT_S)
    return f"{workers} workers ({slot}) are warm for {keep_s / 60:g} minutes"
