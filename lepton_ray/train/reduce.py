"""Sum gradients over the workers, bucket by bucket, while backward is still running.

Gradients lie in flat buckets, in memory that the workers of a node share; what the collective sums is what the
optimizer reads. The first gradient that backward makes of a parameter in a step is copied into its place, later ones
are added there by backward itself: to add the first one too would take a pass over the bucket to clear it, and one more
to read it. Buckets fill in reverse order of the parameters, which is about the order in which backward finishes them,
and go out in that order on every worker. All but the last one travel on a thread of their own, where there is a core
for it or a network to wait for; the last has nothing left to hide behind and goes on the caller's.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from lepton_ray.collective.tensors import empty
from lepton_ray.errors import ConfigError
from lepton_ray.plan.ring import chunk_bounds
from lepton_ray.plan.tree import Turn
from lepton_ray.train.ordered import Aside, Tree
from lepton_ray.train.peers import Peers

AllReduce = Callable[[torch.Tensor], None]
"""Sum a contiguous 1-D tensor over all workers, in place."""

BUCKET_BYTES = 25 << 20
"""As torch's DDP: large enough for bandwidth, small enough to overlap."""
FIRST_BUCKET_BYTES = 1 << 20
"""The first one is small, so that the network starts early."""


class Buckets:
    """Where the gradients of one copy of the model lie; it can serve one group after another.

    Of a parameter that is sharded over other processes (a DTensor), the gradient is that of the shard; what backward
    makes of it in another layout, such as partial sums, torch brings into the parameter's before it adds it up here.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.flat: list[torch.Tensor] = []
        self.bucket_of: list[int] = [0] * len(self.parameters)
        """Of each parameter."""
        self.views: list[torch.Tensor] = list(self.parameters)
        """The place of each parameter's gradient."""
        for members in _groups(self.parameters):
            self._add(members)

    def _add(self, members: list[int]) -> None:
        first = self.parameters[members[0]]
        sizes = [_local(self.parameters[i]).numel() for i in members]
        if first.device.type == "cpu":
            bucket = empty(sum(sizes), first.dtype).zero_()
        else:
            bucket = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for i, part in zip(members, bucket.split(sizes)):
            self.bucket_of[i] = len(self.flat)
            self.views[i] = _like(self.parameters[i], part)
        self.flat.append(bucket)


class Reducer:
    """Sums the gradients of one copy of the model over one group.

    Call order per step: `begin`, one backward per owned microbatch with `arm` before the last, `finish`; then the
    gradients hold the sum over all workers. With a tree, `turn` before each backward.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        allreduce: AllReduce | None,
        buckets: Buckets | None = None,
        tree: Tree | None = None,
        is_overlapped: bool = True,
    ) -> None:
        """allreduce: None when this is the only worker. buckets: of these parameters; None makes them.

        tree: takes the place of `allreduce`, and sums in its order. is_overlapped: whether full buckets leave while
        backward still runs, on a thread of their own.
        """
        self._names = list(parameters)
        self._allreduce, self._tree = allreduce, tree
        buckets = buckets or Buckets(parameters.values())
        self._parameters, self._views, self._bucket_of = buckets.parameters, buckets.views, buckets.bucket_of
        self.buckets = buckets.flat
        self._members = [self._bucket_of.count(b) for b in range(len(self.buckets))]
        # In a tree zeros are added to sums, which changes the bits of -0.0; what begins from zero never is that. A
        # DTensor's gradient may come in another layout.
        self._is_added = [tree is not None or hasattr(p, "to_local") for p in self._parameters]
        """Of each parameter, whether backward is to add up all of its gradients, beginning from zero."""
        self._aside = [Aside() for _ in self.buckets]
        self._merges = 0
        self._armed = False
        self._touched: set[int] = set()
        self._ready: set[int] = set()
        self._missing: list[int] = []
        self._next = 0
        self._sender = _Sender(self._sum) if allreduce and len(self.buckets) > 1 and is_overlapped else None
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda _, index=index: self._on_grad(index))
            for index, p in enumerate(self._parameters)
        ]

    @property
    def size(self) -> int:
        """Count the parameters."""
        return len(self._parameters)

    def begin(self) -> None:
        """Start a step without gradients."""
        for aside in self._aside:
            aside.clear()
        for p, view, is_added in zip(self._parameters, self._views, self._is_added):
            p.grad = view.zero_() if is_added else None
        self._armed = False
        self._touched.clear()
        self._ready.clear()
        self._missing = list(self._members)
        self._next = self._merges = 0

    def turn(self, turn: Turn) -> None:
        """Take a microbatch's turn in the tree."""
        for bucket, aside in zip(self.buckets, self._aside):
            aside.merge(bucket, self._merges)
            if turn.is_apart:
                aside.put(bucket)
        self._merges = turn.merges
        self._ready.clear()

    def arm(self) -> None:
        """Say that the coming backward is this worker's last in this step: full buckets may leave."""
        self._armed = True

    def finish(self) -> None:
        """Send what has not left yet and wait for all sums. Raises what the collective raised."""
        if not self.buckets:
            return
        for p, view in zip(self._parameters, self._views):
            if p.grad is None:
                p.grad = view.zero_()
        self._launch(len(self.buckets) - 1)
        if self._sender:
            self._sender.drain()
        for index in range(self._next, len(self.buckets)):
            self._sum(index)

    def _sum(self, index: int) -> None:
        """Sum a bucket over all workers."""
        bucket, aside = self.buckets[index], self._aside[index]
        if self._tree is not None:
            aside.merge(bucket, self._merges)
            self._tree.total(aside.kept, bucket)
        elif self._allreduce is not None:
            self._allreduce(bucket)

    def untouched(self) -> torch.Tensor | None:
        """Return one flag per parameter that no backward of this worker reached, or None when all were reached."""
        if len(self._touched) == len(self._parameters):
            return None
        return torch.tensor([float(i not in self._touched) for i in range(len(self._parameters))], dtype=torch.float64)

    def drop(self, unused: torch.Tensor) -> None:
        """Take the gradient from the flagged parameters, so that the optimizer skips them, as torch does."""
        for index in torch.nonzero(unused).flatten().tolist():
            self._parameters[index].grad = None

    def reclaim(self) -> None:
        """Take gradients that user code put in the place of ours back into the buckets, as `module.zero_grad` does."""
        for p, view in zip(self._parameters, self._views):
            if p.grad is not view:
                view.zero_() if p.grad is None else view.copy_(p.grad.detach())
                p.grad = view

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        if factor != 1.0:
            for bucket in self.buckets:
                bucket.mul_(factor)

    def norm(self) -> float:
        """Return the L2 norm of all gradients, inf or nan when one of them is."""
        found = math.inf
        for kind in (torch.float32, torch.float64):  # in float64 it takes 50 times as long; float32 overflows at 1e19
            kinds = [torch.promote_types(bucket.dtype, kind) for bucket in self.buckets]
            norms = [torch.linalg.vector_norm(b, dtype=k).double() for b, k in zip(self.buckets, kinds)]
            found = float(torch.stack(norms).square().sum().sqrt())
            if math.isfinite(found):
                break
        return found

    def share_sum(self, rank: int, world: int) -> torch.Tensor:
        """Return a number that is finite when a worker's share of the gradients is; the shares make up all of them."""
        parts = [chunk_bounds(bucket.numel(), world) for bucket in self.buckets]
        return sum_of(bucket[part[rank] : part[rank + 1]] for bucket, part in zip(self.buckets, parts))

    def close(self) -> None:
        """Take the hooks off the parameters and end the thread."""
        for hook in self._hooks:
            hook.remove()
        if self._sender:
            self._sender.close()

    def _on_grad(self, index: int) -> None:
        self._touched.add(index)
        parameter, view = self._parameters[index], self._views[index]
        if (grad := parameter.grad) is not view:
            assert grad is not None
            view.copy_(grad if grad.layout is torch.strided else grad.to_dense())
            parameter.grad = view
        if index in self._ready:
            if self._tree is not None or self._bucket_of[index] < self._next:
                raise ConfigError(
                    f"the gradient of {self._names[index]} arrived twice in one backward, after it had been summed. "
                    "Pass use_reentrant=False to torch.utils.checkpoint."
                )
            return
        if self._armed or self._tree is not None:
            self._ready.add(index)
        if not self._armed:
            return
        self._missing[self._bucket_of[index]] -= 1
        if self._sender:
            full = self._next
            while full < len(self.buckets) - 1 and self._missing[full] == 0:
                full += 1
            self._launch(full)

    def _launch(self, stop: int) -> None:
        """Hand the buckets up to `stop` to the sender, in the order that all workers share."""
        if self._sender:
            for index in range(self._next, stop):
                self._sender.put(index)
            self._next = max(self._next, stop)


def can_overlap(peers: Peers) -> bool:
    """Tell whether sums gain from going on beside backward.

    Over a network they mostly wait. In shared memory they take a core, and where all cores compute, a second thread for
    each worker only gets into the way of the others (measured with 2 workers on 2 cores: up to a tenth of a step).
    """
    return not peers.is_in_one_node or len(os.sched_getaffinity(0)) > peers.world * torch.get_num_threads()


def over_wire(peers: Peers, wire: str) -> AllReduce | None:
    """Return what sums buckets in a number format; what that leaves out of a bucket is added to its next sum.

    None when there is nobody to sum with.
    """
    if peers.world == 1 or wire == "fp32":
        return peers.allreduce if peers.world > 1 else None
    residuals: dict[int, torch.Tensor] = {}

    def allreduce(bucket: torch.Tensor) -> None:
        place = bucket.data_ptr()
        if place not in residuals:
            residuals[place] = torch.zeros(bucket.numel())  # of float32: no other type is shortened
        peers.allreduce(bucket, wire, residuals[place])

    return allreduce


def sum_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all elements, the cheapest number that tells whether all are finite; waits for no device."""
    sums = [tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    absolute = [each.abs().double() for each in sums] or [torch.zeros((), dtype=torch.float64)]
    return functools.reduce(torch.add, absolute)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter. (To import DTensor by name takes a worker half a second.)"""
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _like(parameter: Any, flat: torch.Tensor) -> torch.Tensor:
    """Show flat memory as a tensor of the shape, and the layout over processes, of a parameter."""
    view = flat.view(_local(parameter).shape)
    if not hasattr(parameter, "to_local"):
        return view
    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    sharded: torch.Tensor = type(parameter).from_local(view, parameter.device_mesh, parameter.placements, **layout)
    return sharded


def _groups(parameters: list[nn.Parameter]) -> list[list[int]]:
    """Group parameter indices into buckets of one dtype and device, in reverse order of the parameters."""
    open_groups: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    groups: list[list[int]] = []
    for index in reversed(range(len(parameters))):
        p = parameters[index]
        key = (p.dtype, p.device)
        members, size = open_groups.pop(key, ([], 0))
        members.append(index)
        size += _local(p).numel() * p.element_size()
        if size >= (BUCKET_BYTES if groups else FIRST_BUCKET_BYTES):
            groups.append(members)
        else:
            open_groups[key] = (members, size)
    return groups + [members for members, _ in open_groups.values()]


class _Sender:
    """A thread that sums buckets over the workers in the order in which they are put."""

    def __init__(self, total: Callable[[int], None]) -> None:
        self._total = total
        self._queue: SimpleQueue[int | threading.Event | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lepton-reduce", daemon=True)
        self._thread.start()

    def put(self, bucket: int) -> None:
        self._queue.put(bucket)

    def drain(self) -> None:
        """Wait until all that was put is summed; the collective's own time limit bounds the wait."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._error is None:
                try:
                    self._total(item)
                except BaseException as error:  # noqa: BLE001 - it is raised again in the training thread, by `drain`
                    self._error = error
