"""torch DDP with gloo, for torchrun."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload import Run, make_model, train

if __name__ == "__main__":
    run = Run.asked()
    dist.init_process_group("gloo")
    train(run, DistributedDataParallel(make_model(run)), dist.get_rank())
    dist.destroy_process_group()
