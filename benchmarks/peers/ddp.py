"""torch DDP under torchrun, gloo: `torchrun --standalone --nproc-per-node 2 ddp.py`."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload import Run, make_cnn, train

if __name__ == "__main__":
    run = Run.asked()
    dist.init_process_group("gloo")
    train(run, DistributedDataParallel(make_cnn(run)), dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
