"""The driver on the head of a cluster of hosts: starts Ray's head, then runs what it is told, a line of JSON each."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import ray

from lepton_ray import Faults
from lepton_ray.cluster.connect import _without_idle_services
from lepton_ray.verify import verify
from tests.faults.scene import LIMIT_S, Happening, assert_nothing_lost, scene, wait_for, weights


def run(
    calm: Any,
    *,
    storage: str,
    name: str,
    where: str,
    worker: int = 0,
    step: int = 0,
    resize: int | None = None,
    **options: Any,
) -> Any:
    """Run a job in which a worker waits at a place, and check it; return the weights.

    resize: asked for when the worker goes on.
    """
    flag = f"{storage}.{name}"
    happening = Happening(lambda: wait_for(f"{flag}.go"), where, worker, step, flag)
    job = scene(storage, name, happening if where else None, faults=Faults(), **options)
    if resize is not None:
        wait_for(f"{flag}.go")
        job.resize(resize)
    result = job.wait(LIMIT_S)
    if calm is not None:
        assert_nothing_lost(job, result, calm)
    problems, _ = verify(job.path)
    assert not problems, problems
    return weights(result)


def main(ip: str, folder: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not be taken for an answer
    with _without_idle_services():
        context = ray.init(
            address="local",
            num_cpus=0,
            include_dashboard=False,
            namespace="lepton_ray",
            log_to_driver=False,
            object_store_memory=100_000_000,
            _node_ip_address=ip,
            _temp_dir=folder,
        )
    print(json.dumps({"address": context.address_info["gcs_address"]}), file=out, flush=True)
    calm = None
    for line in sys.stdin:
        try:
            found = run(calm, **json.loads(line))
            calm = found if calm is None else calm
            answer: dict[str, Any] = {"error": ""}
        except BaseException:  # whatever it is, the test is told
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
