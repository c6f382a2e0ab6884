"""A driver with a cluster of three raylets on this machine, one of which is drained while a run trains.

Run by `test_drain.py` in a process of its own, since a process can be in one cluster only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util import placement_group_table

from lepton_ray import Elastic
from lepton_ray.cluster.places import GROUP_PREFIX
from tests.faults.scene import LIMIT_S, Happening, assert_nothing_lost, records, scene, wait_for, weights


def drain(address: str, node: str) -> None:
    """Tell Ray, as a cloud's notice does, that a node will go in a minute."""
    client = ray._raylet.GcsClient(address=address)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    is_accepted, why = client.drain_node(node, reason, "spot reclaim", int((time.time() + 60) * 1000))
    assert is_accepted, why


def homes() -> list[str]:
    """List the nodes on which workers are, by the ids that Ray gives them."""
    groups = [g for g in placement_group_table().values() if g["name"].startswith(GROUP_PREFIX)]
    return [group["bundles_to_node_id"][0] for group in groups if group["state"] == "CREATED"]


def main(storage: str) -> None:
    options: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(address=cluster.address, namespace="lepton_ray", log_to_driver=False)
    try:
        calm = weights(scene(storage, "calm").wait(LIMIT_S))
        gate = f"{storage}.gate"
        hold = Happening(lambda: wait_for(gate), "forward", 0, 8, f"{storage}.happened")
        job = scene(storage, "job", hold)
        wait_for(f"{storage}.happened")
        head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
        drained = next(node for node in homes() if node != head)
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        drain(cluster.address, drained)
        while not any(record["phase"] == "pausing" for record in records(job, "phase")):
            time.sleep(0.05)
        Path(gate).touch()
        result = job.wait(LIMIT_S)
        assert_nothing_lost(job, result, calm)
        causes = [record["cause"] for record in records(job, "generation")]
        assert "drained" in causes[1], causes
        assert [record["kind"] for record in _losses(job)] == []

        other = scene(storage, "other", num_workers=Elastic(min=2, max=3))
        other.wait(LIMIT_S)
        places = [place for record in records(other, "admitted") for place in record["places"].values()]
        on = {g["name"]: g["bundles_to_node_id"][0] for g in placement_group_table().values()}
        assert {on[place] for place in places} == {n["NodeID"] for n in ray.nodes()} - {drained}
    finally:
        ray.shutdown()
        cluster.shutdown()


def _losses(job: Any) -> list[dict[str, Any]]:
    return [record["what"] for record in records(job, "told") if record["what"]["kind"] == "Lost"]


if __name__ == "__main__":
    main(sys.argv[1])
