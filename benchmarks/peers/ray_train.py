"""Ray Train v2's TorchTrainer, written as its guide does it. RAY_ADDRESS names a running cluster, if any."""

import os

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from workload import Run


def loop(config: dict[str, Run]) -> None:
    import ray.train
    import ray.train.torch
    from workload import make_model, train

    run = config["run"]
    train(run, ray.train.torch.prepare_model(make_model(run)), ray.train.get_context().get_world_rank())


if __name__ == "__main__":
    run = Run.asked()
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, **({"num_cpus": run.workers} if address == "local" else {}))
    TorchTrainer(
        loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=run.workers),
        run_config=RunConfig(storage_path=os.environ["BENCH_FOLDER"], name="ray-train"),
    ).fit()
