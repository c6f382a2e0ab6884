"""lepton_ray. `module`: the model is made in the driver; `factory`: in the workers, and the driver has no torch.

A second word, `reproducible`, asks for the same bits whatever the number of workers; `mirrored`, for a copy of the
state in another process every 10 steps.
"""

import functools
import os
import sys

from workload import Run, make_model, make_optimizer

from lepton_ray import DistributedTrainer, Faults

if __name__ == "__main__":
    run = Run.asked()
    DistributedTrainer(
        model=make_model(run) if sys.argv[1] == "module" else functools.partial(make_model, run),
        train_data=run.data(),
        num_workers=run.workers,
        loss=run.loss,
        optimizer=make_optimizer,
        steps=run.steps,
        batch=run.batch * run.workers,
        reproducible="reproducible" in sys.argv,
        faults=Faults(mirror_every=10 if "mirrored" in sys.argv else 0),
        storage=os.environ["BENCH_FOLDER"],
    ).train()
