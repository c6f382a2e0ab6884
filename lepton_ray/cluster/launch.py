"""Start a job on the cluster, from the driver."""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray.exceptions import RayActorError, RaySystemError

from lepton_ray.cluster.connect import connect as connect
from lepton_ray.cluster.connect import nodes
from lepton_ray.cluster.host import new_controller
from lepton_ray.cluster.names import CALL_TIMEOUT_S, CONTROLLER_PREFIX, SCHEDULER, actor_names, answer, named_actor
from lepton_ray.cluster.order import Order
from lepton_ray.cluster.scheduler import scheduler
from lepton_ray.config import Elastic, Faults, Resources
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.plan.allocate import fit, shortage
from lepton_ray.plan.events import Phase
from lepton_ray.plan.types import Request, Slot
from lepton_ray.storage import Folder
from lepton_ray.train.spec import TrainSpec


def check_room(num_workers: int, resources: Resources, spare_cpus: int) -> Slot:
    """Return what a worker gets.

    spare_cpus: CPUs that the data need beside the workers.
    Raises ConfigError when the whole cluster, empty, could not hold all that.
    """
    if not any((resources.cpus, resources.gpus is None or resources.gpus, *resources.custom.values())):
        raise ConfigError("Resources(...) asks for nothing, so Ray could put any number of workers anywhere.")
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
    controller, of = find(name), f"the controller of {name!r}"
    if controller is None:
        return None
    try:
        status = answer(controller.status.remote(), of)
        if status["phase"] == Phase.STOPPING.value:
            position, is_over = 0, False
            while not is_over:  # the stop has a time limit of its own
                _, position, is_over = answer(controller.events.remote(position), of)
            status = answer(controller.status.remote(), of)
        if status["outcome"] is None:
            return controller
        answer(controller.close.remote(), of)  # it only waits for a driver to read the end, which is in the journal
    except RayActorError:
        pass
    return None


def check_folder(controller: Any, name: str, folder: Folder) -> None:
    """Raise ConfigError when the job that runs under this name has another folder."""
    found = answer(controller.status.remote(), f"the controller of {name!r}")["path"]
    if found != folder.url:
        raise ConfigError(
            f"a run named {name!r} is under way in {found}, and this one would be in {folder.url}. Use another name, "
            "or the storage= of that run."
        )


def find(name: str) -> Any:
    """Return the controller of a job, running or just ended, or None."""
    if not any(each.startswith(CONTROLLER_PREFIX) for each in actor_names()):
        return None  # a scheduler need not start to find that out
    return _ask_scheduler("find", CALL_TIMEOUT_S, name)


def start(
    *,
    spec: TrainSpec,
    train_source: Source | Stream | None,
    test_source: Source | Stream | None,
    workers: Elastic,
    slot: Slot,
    spare_cpus: int,
    faults: Faults,
    has_lease: bool,
    is_resizable: bool = True,
    generation: int = 0,
    header: dict[str, Any] | None = None,
) -> tuple[Any, bool]:
    """Give a job to a controller; return it, and whether that is new: another driver may have been faster.

    header: what the journal begins with, unless it is there already.
    """
    offered = None
    if named_actor(SCHEDULER) is None:  # both processes start at the same time
        offered, _ = new_controller(), scheduler()
    order = Order(
        name=spec.name,
        run_url=spec.run_url,
        mode=spec.mode,
        workers=workers,
        most=0 if spec.sync.is_local or not is_resizable else spec.batch.microbatches or workers.max,
        slot=slot,
        environment=environment(),
        faults=faults,
        has_lease=has_lease,
        generation=generation,
        path=[entry for entry in sys.path if entry and os.path.isabs(entry)],
        spare_cpus=spare_cpus,
        header=header,
        size=spec.size,
    )
    held = [[] if value is None else [ray.put(value)] for value in (spec, train_source, test_source)]
    try:
        claimed = _ask_scheduler("claim", faults.start_timeout_s, order, held, offered)
        if claimed is None:
            offered = new_controller()
            claimed = _ask_scheduler("claim", faults.start_timeout_s, order, held, offered)
    except BaseException:
        if offered is not None:
            offered.kill()
        raise
    controller, is_new = claimed
    if offered is not None and controller != offered:
        offered.kill()
    return controller, is_new


def _ask_scheduler(method: str, limit_s: float, *args: Any) -> Any:
    """Ask the scheduler; when it ends meanwhile (it was idle), or the controller that it names, ask once more."""
    question = getattr(scheduler(), method).remote(*args)
    try:
        return answer(question, "the scheduler", limit_s)
    except (RayActorError, RaySystemError):  # the second: the handle in the answer is of a class that Ray has dropped
        return answer(getattr(scheduler(), method).remote(*args), "the scheduler", limit_s)
    except BaseException:
        ray.cancel(question)
        raise


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
