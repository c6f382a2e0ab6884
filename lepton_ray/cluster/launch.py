"""Start a job on the cluster, from the driver."""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from lepton_ray.cluster.connect import connect as connect
from lepton_ray.cluster.connect import nodes
from lepton_ray.cluster.controller import Controller, Order
from lepton_ray.cluster.names import CALL_TIMEOUT_S, NAMESPACE, controller_name
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.config import Faults, Resources
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError, WaitTimeout
from lepton_ray.plan.allocate import fit, shortage
from lepton_ray.plan.membership import Phase
from lepton_ray.plan.types import Request, Slot
from lepton_ray.storage import Folder
from lepton_ray.train.spec import TrainSpec


def check_room(num_workers: int, resources: Resources, spare_cpus: int) -> Slot:
    """Return what a worker gets.

    spare_cpus: CPUs that the data need beside the workers.
    Raises ConfigError when the whole cluster, empty, could not hold all that.
    """
    found = nodes()
    gpus = resources.gpus
    if gpus is None:
        gpus = 1.0 if sum(node.total.get("GPU", 0) for node in found) >= num_workers else 0.0
    slot = Slot(resources={"CPU": resources.cpus, "GPU": gpus, **resources.custom})
    possible = fit([node.total for node in found], slot, num_workers)
    if possible < num_workers:
        request = Request(job="", workers=num_workers, slot=slot, environment="")
        raise ConfigError(shortage(request, found, possible))
    total_cpus = sum(node.total.get("CPU", 0) for node in found)
    if total_cpus < num_workers * resources.cpus + spare_cpus:
        raise ConfigError(
            f"{num_workers} workers of {resources.cpus:g} CPU take all {total_cpus:g} CPUs of the cluster, and Ray "
            f"Data needs {spare_cpus} to read the stream. Use fewer workers, or call .materialize() on the dataset."
        )
    return slot


def default_storage(folder: str) -> Folder:
    """Return the folder under the user's home, which only a single machine is sure to share with itself."""
    addresses = sorted(node.name for node in nodes())
    if len(addresses) > 1:
        raise ConfigError(
            f"the cluster has {len(addresses)} nodes ({', '.join(addresses[:4])}), so storage= must name a folder that "
            "all of them can write: an absolute path on a shared disk, or a URL such as 's3://bucket/folder'."
        )
    return Folder(os.path.expanduser(folder))


def running(name: str) -> Any:
    """Return the controller of a running job, or None. One that is stopping is waited for."""
    try:
        controller = ray.get_actor(controller_name(name), namespace=NAMESPACE)
        status: Any = ray.get(controller.status.remote(), timeout=CALL_TIMEOUT_S)
        if status["phase"] == Phase.STOPPING.value:
            position, is_over = 0, False
            while not is_over:  # the stop has a time limit of its own
                _, position, is_over = ray.get(controller.events.remote(position), timeout=CALL_TIMEOUT_S)
            status = ray.get(controller.status.remote(), timeout=CALL_TIMEOUT_S)
    except (ValueError, RayActorError):
        return None
    if status["outcome"] is None:
        return controller
    ray.kill(controller)  # it only waits for a driver to read the end, which is in the journal
    return None


def start(
    *,
    spec: TrainSpec,
    train_source: Source | Stream | None,
    test_source: Source | Stream | None,
    num_workers: int,
    slot: Slot,
    faults: Faults,
    has_lease: bool,
    generation: int,
) -> Any:
    """Start a job's controller, hand it the job, and return it."""
    scheduler()  # both processes start at the same time
    order = Order(
        name=spec.name,
        run_url=spec.run_url,
        mode=spec.mode,
        num_workers=num_workers,
        slot=slot,
        environment=environment(),
        faults=faults,
        has_lease=has_lease,
        generation=generation,
        path=[entry for entry in sys.path if entry and os.path.isabs(entry)],
        writes_journal=spec.mode == "train",
    )
    try:
        controller: Any = (
            ray.remote(Controller)
            .options(
                name=controller_name(spec.name),
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_concurrency=1000,
            )
            .remote(order)
        )
    except ValueError:  # another driver was faster
        return ray.get_actor(controller_name(spec.name), namespace=NAMESPACE)
    held = [[] if value is None else [ray.put(value)] for value in (spec, train_source, test_source)]
    try:
        ray.get(controller.begin.remote(*held), timeout=faults.start_timeout_s)
    except GetTimeoutError:
        ray.kill(controller)
        raise WaitTimeout(
            f"the cluster did not start the controller of {spec.name!r} within {faults.start_timeout_s:g} s "
            "(Faults.start_timeout_s)."
        ) from None
    return controller


def environment() -> str:
    """Return what workers must share to be reused by another job: Ray's runtime environment, as text."""
    return str(ray.get_runtime_context().get_runtime_env_string())


def joined_outputs(outputs: list[Any]) -> Any:
    """Join the numbered blocks of all workers into arrays over the whole data, in order."""
    import numpy as np

    blocks = [block for _, block in sorted((block for part in outputs for block in part), key=lambda block: block[0])]
    if isinstance(blocks[0], (tuple, list)):
        return type(blocks[0])(np.concatenate(column) for column in zip(*blocks))
    if isinstance(blocks[0], dict):
        return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    return np.concatenate(blocks)
