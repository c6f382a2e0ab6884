"""torch DDP under torchrun, which starts all workers again when one dies; they go on from a checkpoint."""

import os

import torch
import torch.distributed as dist
from faulty import checkpoint_path, make_model, train
from torch.nn.parallel import DistributedDataParallel
from workload import Run


def save(state: object) -> None:
    if dist.get_rank() == 0:
        torch.save(state, checkpoint_path() + ".tmp")
        os.replace(checkpoint_path() + ".tmp", checkpoint_path())


if __name__ == "__main__":
    run = Run.asked()
    dist.init_process_group("gloo")
    run.mark("worker", worker=os.getpid())
    found = torch.load(checkpoint_path()) if os.path.exists(checkpoint_path()) else None
    train(run, DistributedDataParallel(make_model(run)), dist.get_rank(), dist.get_world_size(), save, found)
    dist.destroy_process_group()
