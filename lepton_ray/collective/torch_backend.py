"""The backend "lepton" of torch.distributed, for CPU tensors.

    import lepton_ray.collective.torch_backend
    torch.distributed.init_process_group("lepton")

A process group is a `Group` for the collectives and a `Post` for the messages between two ranks. Collectives run one
after the other, in the order in which they were issued; all ranks issue the same ones in the same order. Messages go on
beside them, so that a receive that waits holds up nothing. The first error ends a process group.

Torch lets a package write a whole process group in Python, and nothing smaller (2.13). Some methods have two names:
Python calls a newer one, and other code, or an older torch, the older one.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend as NativeBackend

from lepton_ray.collective import torch_collectives as collectives
from lepton_ray.collective.post import ANYBODY
from lepton_ray.collective.tensors import flat
from lepton_ray.collective.torch_collectives import ALL_TO_ALL, GATHER, SCATTER
from lepton_ray.collective.torch_input import check, check_parts, check_whole, only, reducing, split
from lepton_ray.collective.torch_store import meet
from lepton_ray.collective.torch_work import Turns, Work
from lepton_ray.errors import ConfigError, PeerLost

BACKEND = "lepton"

Tensor = torch.Tensor
Options = Any  # a class for each call, defined in C++

_CPU = torch.device("cpu")

_living: WeakSet[ProcessGroup] = WeakSet()


def register(tls: bool | None = None) -> None:
    """Make the backend known to torch in this process. Importing this module does it too.

    tls: whether process groups that are made from now on encrypt what leaves a process over TCP; as in
    `ray_group.register`.
    """
    if tls is not None:
        ProcessGroup.tls = tls
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, ProcessGroup, devices=["cpu"])


class ProcessGroup(dist.ProcessGroup):
    """One rank's part of a process group. Made by torch."""

    tls: ClassVar[bool] = False

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
        super().__init__(rank, world)  # the constructor with a store makes no group that Python can extend (2.13)
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout
        self._group, self._post = meet(store, rank, world, timeout.total_seconds(), self._end, tls=self.tls)
        self._turns = Turns()
        self._name, self._description, self._issued = "", "", 0
        self._pid = os.getpid()
        _living.add(self)

    # --- what torch asks about a group; C++ asks by other names than Python

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    name = _get_backend_name = getBackendName
    _set_group_name, group_name = setGroupName, property(getGroupName)
    _set_group_desc, group_desc = setGroupDesc, property(getGroupDesc)

    @property
    def _device_types(self) -> list[torch.device]:
        return [_CPU]

    @property
    def options(self) -> NativeBackend.Options:
        return NativeBackend.Options(BACKEND, self._timeout)

    @property
    def transport(self) -> str:
        """Say how arrays travel; see `Group.transport`."""
        return self._group.transport

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"the backend lepton is for CPU tensors: it has nothing for {device}")
        return self

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def get_group_store(self) -> dist.Store:
        return self._store

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: each group counts from 0 anyway."""

    def _get_sequence_number_for_group(self) -> int:
        return self._issued

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long operations wait without progress from now on."""
        self._timeout = timeout
        self._post.timeout_s = timeout.total_seconds()
        self._turns.issue(Work("set_timeout", []), lambda: self._group.limit(timeout.total_seconds()), at_once=True)

    _set_default_timeout = set_timeout

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: object = None,
    ) -> ProcessGroup | None:
        """Make a group of some ranks of this one, in their order. All of these call it; others may."""
        if self._rank not in new_ranks:
            return None
        name = group_name or f"{self._name}:split:{','.join(map(str, new_ranks))}"
        store = dist.PrefixStore(f"{name}/", self._store)
        group = ProcessGroup(store, list(new_ranks).index(self._rank), len(new_ranks), timeout or self._timeout)
        group.setGroupName(name)
        group.setGroupDesc(group_desc or f"{self._description}:split")
        return group

    # --- the end

    def shutdown(self) -> None:
        """Finish what was issued, and leave. Peers may finish without this rank what it has finished."""
        self._turns.close()
        self._leave()

    def abort(self) -> None:
        """End what is under way, here and on all other ranks, from any thread."""
        self._end("aborted")
        self._turns.close()
        self._leave()

    def _end(self, reason: str) -> None:
        self._group.abort(reason)
        self._post.abort(reason)

    def _leave(self) -> None:
        self._group.close()
        self._post.close()
        _living.discard(self)

    # --- collectives

    def allreduce(self, tensors: Tensor | Sequence[Tensor], opts: Options = dist.ReduceOp.SUM) -> Work:
        tensor = only("allreduce", tensors)
        op = reducing(opts, tensor)
        return self._issue("allreduce", [tensor], [], opts, lambda: collectives.allreduce(self._group, tensor, op))

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Options = dist.ReduceOp.SUM) -> Work:
        ops = [reducing(opts, tensor) for tensor in tensors]

        def act() -> None:
            for tensor, op in zip(tensors, ops):
                collectives.allreduce(self._group, tensor, op)

        return self._issue("allreduce_coalesced", tensors, [], opts, act)

    def reduce(self, tensors: Sequence[Tensor], opts: Options) -> Work:
        tensor = only("reduce", tensors)
        op, root = reducing(opts, tensor), opts.rootRank
        return self._issue("reduce", [tensor], [], opts, lambda: collectives.reduce(self._group, tensor, root, op))

    def broadcast(self, tensors: Tensor | Sequence[Tensor], opts: Options) -> Work:
        tensor = only("broadcast", tensors)
        root = opts if isinstance(opts, int) else opts.rootRank
        return self._issue("broadcast", [tensor], [], opts, lambda: collectives.broadcast(self._group, tensor, root))

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Options = None) -> Work:
        tensor, into = only("allgather", inputs), only("allgather", outputs)
        check_parts(self._world, "allgather", into, tensor)
        return self._issue("allgather", into, [tensor], opts, lambda: collectives.allgather(self._group, into, tensor))

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Options = None
    ) -> Work:
        """outputs: by rank, then like `inputs`."""
        for index, tensor in enumerate(inputs):
            check_parts(self._world, "allgather_coalesced", [each[index] for each in outputs], tensor)

        def act() -> None:
            for index, tensor in enumerate(inputs):
                collectives.allgather(self._group, [each[index] for each in outputs], tensor)

        return self._issue("allgather_coalesced", list(chain(*outputs)), inputs, opts, act)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Options = None) -> Work:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Options = None
    ) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            check_whole(self._world, "all_gather_single", output, tensor)

        def act() -> None:
            for output, tensor in zip(outputs, inputs):
                collectives.allgather_single(self._group, output, tensor)

        return self._issue("all_gather_single", outputs, inputs, opts, act)

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Options) -> Work:
        output, parts = only("reduce_scatter", outputs), only("reduce_scatter", inputs)
        op = reducing(opts, output)
        check_parts(self._world, "reduce_scatter", parts, output)
        return self._issue(
            "reduce_scatter", [output], parts, opts, lambda: collectives.reduce_scatter(self._group, output, parts, op)
        )

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Options) -> Work:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Options
    ) -> Work:
        ops = [reducing(opts, output) for output in outputs]
        for output, tensor in zip(outputs, inputs, strict=True):
            check_whole(self._world, "reduce_scatter_single", tensor, output)

        def act() -> None:
            for output, tensor, op in zip(outputs, inputs, ops):
                collectives.reduce_scatter_single(self._group, output, tensor, op)

        return self._issue("reduce_scatter_single", outputs, inputs, opts, act)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Options) -> Work:
        tensor, root = only("gather", inputs), opts.rootRank
        into = list(only("gather", outputs)) if self._rank == root else []
        if into:
            check_parts(self._world, "gather", into, tensor)
        return self._exchange(GATHER, root, self._for_rank(root, tensor), into, opts)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Options) -> Work:
        output, root = only("scatter", outputs), opts.rootRank
        parts = list(only("scatter", inputs)) if self._rank == root else []
        if parts:
            check_parts(self._world, "scatter", parts, output)
        return self._exchange(SCATTER, root, parts, self._for_rank(root, output), opts)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Options = None) -> Work:
        for tensors in (outputs, inputs):
            if len(tensors) != self._world:
                raise ConfigError(f"alltoall got a list of {len(tensors)} tensors for {self._world} ranks.")
        return self._exchange(ALL_TO_ALL, 0, inputs, outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Options = None,
    ) -> Work:
        return self._exchange(
            ALL_TO_ALL,
            0,
            split(self._world, tensor, input_splits),
            split(self._world, output, output_splits),
            opts,
            [output],
        )

    def barrier(self, opts: Options = None) -> Work:
        return self._issue("barrier", [], [], opts, self._group.barrier)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- messages

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Work:
        return self._message("send", self._post.send, only("send", tensors), to, tag)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Work:
        return self._message("recv", self._post.receive, only("recv", tensors), source, tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        return self._message("recv", self._post.receive, only("recv", tensors), ANYBODY, tag)

    def _message(self, call: str, post: Callable[..., None], tensor: Tensor, peer: int, tag: int) -> Work:
        check(call, tensor)
        array, finish = flat(tensor, is_written=call == "recv")
        work = Work(call, [tensor])

        def done(error: Exception | None, source: int) -> None:
            if error is None:
                try:
                    finish()
                except RuntimeError as failure:  # the tensor is not what it was
                    error = failure
            work.finish(error, source)

        try:
            post(memoryview(array.view(np.uint8)), peer, tag, done)
        except PeerLost as error:
            work.finish(error)
        return work

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return when all ranks have called it; on rank 0, say which ones did not.

        All of them are named, whatever `wait_all_ranks`. As after any error, the process group has then ended.
        """
        del wait_all_ranks
        limit_s = (self._timeout if timeout is None else timeout).total_seconds()
        act = partial(collectives.call_roll, self._post, limit_s)
        self._issue("monitored_barrier", [], [], None, act).wait()

    # --- inside

    def _issue(
        self,
        call: str,
        written: Sequence[Tensor],
        read: Sequence[Tensor],
        opts: Options,
        act: Callable[[], object],
    ) -> Work:
        for tensor in chain(written, read):
            check(call, tensor)
        work = Work(call, written)
        self._issued += 1
        limit = getattr(opts, "timeout", None)
        limit_s = limit.total_seconds() if isinstance(limit, timedelta) else 0

        def carry_out() -> None:
            try:
                if limit_s > 0:
                    self._group.limit(limit_s)
                act()
                if limit_s > 0:
                    self._group.limit(self._timeout.total_seconds())
            except BaseException as error:
                self._end(f"{call}: {error}")
                raise

        self._turns.issue(work, carry_out, at_once=not getattr(opts, "asyncOp", True))
        return work

    def _exchange(
        self,
        call: int,
        root: int,
        outgoing: Sequence[Tensor | None],
        incoming: Sequence[Tensor | None],
        opts: Options,
        written: Sequence[Tensor] | None = None,
    ) -> Work:
        nothing = [None] * self._world
        outgoing, incoming = outgoing or nothing, incoming or nothing
        read = [each for each in outgoing if each is not None]
        written = written or [each for each in incoming if each is not None]
        return self._issue(
            collectives.EXCHANGES[call],
            written,
            read,
            opts,
            lambda: collectives.exchange(self._group, self._post, call, root, outgoing, incoming),
        )

    def _for_rank(self, rank: int, tensor: Tensor) -> list[Tensor | None]:
        return [tensor if each == rank else None for each in range(self._world)]


def _leave_all() -> None:
    """End the threads of groups that nobody destroyed, before Python ends without asking them."""
    for group in list(_living):
        if group._pid == os.getpid():  # not in a process that was forked from ours
            group._leave()


atexit.register(_leave_all)
register()
