"""torch DDP for torchrun, on gloo or the backend that is named. `alone`: workers that never talk to each other."""

import os
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload import Run, make_model, train

if __name__ == "__main__":
    run = Run.asked()
    backend = sys.argv[1] if sys.argv[1:] else "gloo"
    if backend == "alone":
        train(run, make_model(run), int(os.environ["RANK"]))
    else:
        if backend == "lepton":
            import lepton_ray.collective.torch_backend  # noqa: F401
        dist.init_process_group(backend)
        train(run, DistributedDataParallel(make_model(run)), dist.get_rank())
        dist.destroy_process_group()
