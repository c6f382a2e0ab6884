"""Seconds of `ray.train.report` without a checkpoint, called again and again, with one worker."""

import os
import time

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from workload import Run


def loop(config: dict[str, Run]) -> None:
    import ray.train

    run = config["run"]
    for _ in range(3):  # the first ones find an empty queue
        ray.train.report({"loss": 0.0})
    start = time.perf_counter()
    for _ in range(run.steps):
        ray.train.report({"loss": 0.0})
    run.mark("reported", s=(time.perf_counter() - start) / run.steps)


if __name__ == "__main__":
    run = Run.asked()
    ray.init(address="local", log_to_driver=False, num_cpus=run.workers)
    TorchTrainer(
        loop,
        train_loop_config={"run": run},
        scaling_config=ScalingConfig(num_workers=run.workers),
        run_config=RunConfig(storage_path=os.environ["BENCH_FOLDER"], name="ray-report"),
    ).fit()
