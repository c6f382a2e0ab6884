"""Ranks in Ray actors that make the steps of a training on our collective: by hand, and as the trainer makes them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orders
import ray
from workload import Run, make_model, make_optimizer


class Rank:
    def serve(self, run: Run, place: str, rank: int) -> None:
        """Join the group, and act on orders, which name the microbatches of a worker."""
        import torch

        from lepton_ray.cluster.peers import RayPeers

        torch.set_num_threads(1)
        peers = RayPeers("steps", range(run.workers), rank, 60, tls=False)
        acts = {
            "by hand": functools.cache(functools.partial(by_hand, run, peers)),
            "steps": functools.cache(functools.partial(steps, run, peers, False)),
            "reproducible": functools.cache(functools.partial(steps, run, peers, True)),
        }
        orders.serve(run, place, acts, lambda: peers.allreduce(torch.zeros(1)))
        peers.close()


def by_hand(run: Run, peers: Any, microbatches: int) -> Callable[[], object]:
    """Sum gradients while backward runs, and no more."""
    import torch
    from torch.nn import functional

    from lepton_ray.train import optimizers
    from lepton_ray.train.reduce import Reducer

    loss = functional.cross_entropy if run.loss == "cross_entropy" else functional.mse_loss
    x, y = (torch.from_numpy(array)[peers.rank :: run.workers] for array in run.data())
    model = make_model(run)
    optimizer = make_optimizer(model)
    reducer = Reducer(dict(model.named_parameters()), peers.allreduce)
    count = itertools.count()

    def step() -> None:
        torch.set_deterministic_debug_mode("default")
        at = next(count) * run.batch % len(x)
        parts = list(zip(x[at : at + run.batch].chunk(microbatches), y[at : at + run.batch].chunk(microbatches)))
        reducer.begin()
        for given, asked in parts:
            if asked is parts[-1][1]:
                reducer.arm()
            (loss(model(given), asked) / microbatches).backward()
        reducer.finish()
        reducer.scale(1 / run.workers)
        optimizers.step(optimizer)

    return step


def steps(run: Run, peers: Any, is_reproducible: bool, microbatches: int) -> Callable[[], object]:
    """Make whole steps, with their ballots."""
    import torch

    from lepton_ray.data.arrays import array_source
    from lepton_ray.data.feed import open_feed
    from lepton_ray.plan.batch import own
    from lepton_ray.train.model import TorchModel
    from lepton_ray.train.objective import make_objective
    from lepton_ray.train.ordered import Tree
    from lepton_ray.train.step import Stepper, step_together

    device, count = torch.device("cpu"), microbatches * run.workers
    model = TorchModel(make_model(run), device)
    feed = open_feed(
        array_source(run.data(), "data"), batch_samples=run.batch * run.workers, microbatches=count, seed=0
    )
    stepper = Stepper(
        model=model,
        objective=make_objective(run.loss),
        optimizers={"": make_optimizer(model.module)},
        feed=feed,
        peers=peers,
        device=device,
        seed=0,
        tree=Tree(peers, count) if is_reproducible else None,
    )
    owned = own(count, [1.0] * run.workers)[peers.rank]
    numbers = itertools.count()

    def step() -> None:
        torch.set_deterministic_debug_mode("error" if is_reproducible else "default")
        number = next(numbers)
        step_together(stepper, peers, number, feed.plan(number), owned, False)

    return step


if __name__ == "__main__":
    run = replace(Run.asked(), steps=8)  # whose data are used in turn
    ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=run.workers)
    actors = [ray.remote(num_cpus=1)(Rank).remote() for _ in range(run.workers)]
    ray.get([actor.serve.remote(run, orders.place(), rank) for rank, actor in enumerate(actors)])
