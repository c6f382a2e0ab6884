"""Ray Train v2's TorchTrainer, as its guide tells one to write it. RAY_ADDRESS names a running cluster, if any."""

import os

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from workload import WORKERS, Run


def loop(run: Run) -> None:
    import ray.train
    import ray.train.torch
    from workload import make_cnn, train

    context = ray.train.get_context()
    model = ray.train.torch.prepare_model(make_cnn(run))
    train(run, model, context.get_world_rank(), context.get_world_size())


if __name__ == "__main__":
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, **({"num_cpus": WORKERS} if address == "local" else {}))
    TorchTrainer(
        loop,
        train_loop_config=Run.asked(),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=os.environ["BENCH_FOLDER"], name=f"ray-train-{os.getpid()}"),
    ).fit()
