"""lepton_ray: `ours.py module` makes the model in the driver, `ours.py factory` in the workers (no torch here)."""

import functools
import os
import sys

from workload import BATCH, WORKERS, Run, images, make_cnn, make_optimizer

from lepton_ray import DistributedTrainer

if __name__ == "__main__":
    run = Run.asked()
    DistributedTrainer(
        model=make_cnn(run) if sys.argv[1] == "module" else functools.partial(make_cnn, run),
        train_data=images(WORKERS),
        num_workers=WORKERS,
        loss="cross_entropy",
        optimizer=make_optimizer,
        steps=run.steps,
        batch=BATCH * WORKERS,
        storage=os.environ["BENCH_FOLDER"],
    ).train()
