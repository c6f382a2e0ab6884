"""Ranks in Ray actors that call `ray.util.collective`, on our backend and on Ray's GLOO."""

from __future__ import annotations

from typing import Any

import orders
import ray
from workload import Run

OURS = "ours"


class Rank:
    def serve(self, run: Run, place: str, largest: int, rank: int) -> None:
        """Join the groups, and act on orders: the call, and the backend."""
        import ray.util.collective as collective
        import torch

        from lepton_ray.collective import empty, register

        torch.set_num_threads(1)
        register()
        collective.init_collective_group(run.workers, rank, "GLOO", "default")
        collective.init_collective_group(run.workers, rank, "LEPTON", OURS)
        memory = {
            "registered": (OURS, [empty(largest, torch.float32).zero_() for _ in range(2)]),
            "Ray GLOO": ("default", [torch.zeros(largest) for _ in range(2)]),
        }

        def act(call: str, backend: str) -> Any:
            group, (whole, parts) = memory[backend]

            def make(count: int) -> Any:
                part = count // run.workers
                one, all_of_them = whole[:part], list(parts[: part * run.workers].split(part))
                reduced = whole[:count]
                return {
                    "all-reduce": lambda: collective.allreduce(reduced, group),
                    "reduce-scatter": lambda: collective.reducescatter(one, all_of_them, group),
                    "all-gather": lambda: collective.allgather(all_of_them, one, group),
                }[call]

            return make

        calls = ("all-reduce", "reduce-scatter", "all-gather")
        acts = {f"{call}, {backend}": act(call, backend) for call in calls for backend in memory}
        orders.serve(run, place, acts, lambda: collective.barrier(OURS))
        for group in (OURS, "default"):
            collective.destroy_collective_group(group)


if __name__ == "__main__":
    run = Run.asked()
    ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=run.workers)
    actors = [ray.remote(num_cpus=1)(Rank).remote() for _ in range(run.workers)]
    ray.get([actor.serve.remote(run, orders.place(), orders.largest(), rank) for rank, actor in enumerate(actors)])
