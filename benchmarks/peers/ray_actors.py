"""torch DDP in bare Ray actors: what one would write by hand with Ray alone. RAY_ADDRESS names a cluster, if any."""

import os
import socket

import ray
from workload import Run


class Worker:
    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def run(self, run: Run, rank: int, port: int) -> None:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from workload import make_model, train

        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=run.workers)
        train(run, DistributedDataParallel(make_model(run)), rank)
        dist.barrier()


if __name__ == "__main__":
    run = Run.asked()
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, **({"num_cpus": run.workers} if address == "local" else {}))
    actor = ray.remote(num_cpus=1)(Worker)
    workers = [actor.remote() for _ in range(run.workers)]
    port = ray.get(workers[0].free_port.remote())
    ray.get([worker.run.remote(run, rank, port) for rank, worker in enumerate(workers)])
