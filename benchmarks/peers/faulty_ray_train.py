"""Ray Train v2, which starts all workers again when one dies; they go on from the checkpoint that they reported."""

import os
import tempfile

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from workload import Run


def loop(config: dict[str, Run]) -> None:
    import ray.train
    import ray.train.torch
    import torch
    from faulty import make_model, train

    run, context = config["run"], ray.train.get_context()
    run.mark("worker", worker=os.getpid())
    found = None
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            found = torch.load(os.path.join(folder, "state.pt"))

    def save(state: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kept = None
            if context.get_world_rank() == 0:
                torch.save(state, os.path.join(folder, "state.pt"))
                kept = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({}, checkpoint=kept)

    model = ray.train.torch.prepare_model(make_model(run))
    train(run, model, context.get_world_rank(), context.get_world_size(), save, found)


if __name__ == "__main__":
    run = Run.asked()
    ray.init(address="local", num_cpus=run.workers + 1, log_to_driver=False, include_dashboard=False)
    TorchTrainer(
        loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=run.workers),
        run_config=RunConfig(
            storage_path=os.environ["BENCH_FOLDER"], name="run", failure_config=FailureConfig(max_failures=9)
        ),
    ).fit()
