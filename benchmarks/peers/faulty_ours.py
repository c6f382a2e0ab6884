"""lepton_ray, with workers that are killed or come and go. Arguments: the numbers of workers to go through."""

import functools
import os
import sys
import time

import ray
from faulty import BATCH, data, make_model, make_optimizer
from workload import Run

from lepton_ray import Batch, DistributedTrainer

MOST = 4

if __name__ == "__main__":
    run = Run.asked()
    ray.init(address="local", num_cpus=MOST + 2, log_to_driver=False, include_dashboard=False)
    job = DistributedTrainer(
        model=functools.partial(make_model, run),
        train_data=data(run),
        num_workers=run.workers,
        loss="cross_entropy",
        optimizer=functools.partial(make_optimizer, run),
        steps=run.steps,
        batch=Batch(samples=BATCH * MOST, microbatches=MOST),
        storage=os.environ["BENCH_FOLDER"],
    ).submit()
    wanted = [int(number) for number in sys.argv[1:]]
    for record in job.events():
        if record["event"] == "worker":
            run.mark("worker", worker=record["pid"])
        if record["event"] == "generation" and len(record["workers"]) == (wanted[0] if wanted else 0):
            wanted.pop(0)
        if record["event"] == "phase" and record["phase"] == "training":
            run.mark("training", generation=record["generation"])
            if wanted:
                time.sleep(5)  # so that it trains for a while
                run.mark("resize", workers=wanted[0])
                job.resize(wanted[0])
            elif sys.argv[1:]:
                time.sleep(5)
                job.cancel()
        if record["event"] == "ended":
            run.mark("ended")
