"""What the ranks of a torch process group do in tests. They import torch, which the tests' own process need not."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.collective import torch_backend
from lepton_ray.errors import ConfigError
from lepton_ray.train.reduce import Reducer
from tests.collective import members

Tensor = torch.Tensor
Call = Callable[[dist.ProcessGroup, Tensor, Any], list[Tensor]]
"""(group, the rank's own tensor of a multiple of `world` rows, reduction) -> results."""


def breed(orders: Connection) -> None:
    """Fork a rank for each connection that comes. Importing torch takes longer than all that a rank does in a test."""
    context = multiprocessing.get_context("fork")
    children = []
    while True:
        try:
            pipe = orders.recv()
        except EOFError:
            break
        child = context.Process(target=members.serve, args=(pipe,))
        child.start()
        pipe.close()
        children.append(child)
        orders.send(child.pid)
    for child in children:
        child.kill()


HELD: dict[str, Any] = {}
"""What a rank keeps between two things it is told."""


def init(path: str, rank: int, world: int, timeout_s: float = 20) -> str:
    torch.set_num_threads(1)
    store = dist.FileStore(path, world)
    dist.init_process_group("lepton", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    assert type(dist.group.WORLD) is torch_backend.ProcessGroup
    return dist.group.WORLD.transport


def destroy() -> None:
    dist.destroy_process_group()


# --- every call


def _parts(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    return [part.clone() for part in tensor.chunk(group.size())]


def _in_place(call: Callable[..., object]) -> Call:
    def run(group: dist.ProcessGroup, own: Tensor, op: Any) -> list[Tensor]:
        result = own.clone()
        call(result, group=group, op=op)
        return [result]

    return run


def _all_reduce_coalesced(group: dist.ProcessGroup, own: Tensor, op: Any) -> list[Tensor]:
    results = [own.clone(), own[:1].clone()]
    dist.all_reduce_coalesced(results, op=op, group=group)
    return results


def _reduce(group: dist.ProcessGroup, own: Tensor, op: Any) -> list[Tensor]:
    result = own.clone()
    dist.reduce(result, group=group, op=op, group_dst=1)
    return [result] if group.rank() == 1 else []  # elsewhere it is undefined


def _reduce_scatter(group: dist.ProcessGroup, own: Tensor, op: Any) -> list[Tensor]:
    result = torch.empty_like(_parts(own, group)[0])
    dist.reduce_scatter(result, _parts(own, group), group=group, op=op)
    return [result]


def _reduce_scatter_tensor(group: dist.ProcessGroup, own: Tensor, op: Any) -> list[Tensor]:
    result, source = torch.empty_like(_parts(own, group)[0]), own.clone()
    dist.reduce_scatter_tensor(result, source, group=group, op=op)
    assert torch.equal(source, own)  # an input is not for writing
    return [result]


REDUCING: dict[str, Call] = {
    "all_reduce": _in_place(lambda tensor, group, op: dist.all_reduce(tensor, group=group, op=op)),
    "all_reduce_coalesced": _all_reduce_coalesced,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
}


def _all_gather(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    results = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(results, own, group=group)
    return results


def _all_gather_into_tensor(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    result = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    dist.all_gather_into_tensor(result, own, group=group)
    return [result]


def _all_gather_coalesced(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    results = [[torch.empty_like(own), torch.empty_like(own[:1])] for _ in range(group.size())]
    dist.all_gather_coalesced(results, [own, own[:1].clone()], group=group)
    return [each for pair in results for each in pair]


def _gather(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    results = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == 1 else None
    dist.gather(own, results, group=group, group_dst=1)
    return results or []


def _scatter(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    result = torch.empty_like(_parts(own, group)[0])
    dist.scatter(result, _parts(own, group) if group.rank() == 1 else None, group=group, group_src=1)
    return [result]


def _all_to_all(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    results = [torch.empty_like(part) for part in _parts(own, group)]
    dist.all_to_all(results, _parts(own, group), group=group)
    return results


def _all_to_all_single(group: dist.ProcessGroup, own: Tensor, _: Any) -> list[Tensor]:
    """Send as many rows to a rank as its number, and one more."""
    rank, world = group.rank(), group.size()
    rows = [peer + 1 for peer in range(world)]
    own = own.repeat(2, *[1] * (own.dim() - 1))[: sum(rows)]
    result = own.new_empty(world * (rank + 1), *own.shape[1:])
    dist.all_to_all_single(result, own, [rank + 1] * world, rows, group=group)
    return [result]


MOVING: dict[str, Call] = {
    "broadcast": _in_place(lambda tensor, group, op: dist.broadcast(tensor, group_src=1, group=group)),
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "all_gather_coalesced": _all_gather_coalesced,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
}
FLOATS = ["float64", "float32", "float16", "bfloat16"]
DTYPES = [*FLOATS, "int64", "int32", "int8", "uint8", "bool"]
OPS = ["SUM", "PRODUCT", "MIN", "MAX", "AVG", "BAND", "BOR", "BXOR"]


def own_rows(rank: int, rows: int, dtype: str) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 3, (rows, 7), generator=generator).to(getattr(torch, dtype))


def compare_with_gloo(rows: int) -> int:
    """Make every call on both backends, and return how many are equal. Those that Gloo refuses we refuse, by name."""
    gloo = HELD.setdefault("gloo", dist.new_group(backend="gloo"))
    ours = dist.group.WORLD
    equal = 0
    for name, call in (REDUCING | MOVING).items():
        for dtype in DTYPES:
            own = own_rows(ours.rank(), rows, dtype)
            for op in OPS if name in REDUCING else ["-"]:
                kind = getattr(dist.ReduceOp, op, None)
                if (op == "AVG") != (dtype in FLOATS) if op in ("AVG", "BAND", "BOR", "BXOR") else False:
                    for group, error, text in ((gloo, RuntimeError, ""), (ours, ConfigError, f"op={op} ")):
                        with pytest.raises(error, match=text):
                            call(group, own, kind)
                    continue
                for one, other in zip(call(ours, own, kind), call(gloo, own, kind), strict=True):
                    if dtype == "bool":  # Gloo adds them up as bytes, and shows 2 as True
                        one, other = (each.to(torch.uint8).ne(0) for each in (one, other))
                    assert torch.equal(one, other), (name, dtype, op)
                equal += 1
    return equal


def move_other_dtypes() -> None:
    """Move what Gloo does not, and complex numbers, which torch often hands over as pairs of reals."""
    world = dist.get_world_size()
    for dtype in ("complex64", "complex128", "int16", "float8_e5m2", "uint16"):
        for name in ("all_gather", "all_gather_into_tensor", "all_to_all"):
            rows = torch.arange(2 * world).to(torch.float32).to(getattr(torch, dtype))
            found = torch.cat(MOVING[name](dist.group.WORLD, rows, None))
            whole = rows if name != "all_to_all" else rows.reshape(world, 2)[dist.get_rank()]
            assert torch.equal(found.view(torch.uint8), whole.repeat(world).view(torch.uint8)), (dtype, name)


# --- works and messages


def start(key: str, count: int) -> bool:
    """Issue a sum; return whether it is done."""
    tensor = torch.full((count,), dist.get_rank() + 1.0)
    HELD[key] = tensor, dist.all_reduce(tensor, async_op=True)
    return bool(HELD[key][1].is_completed())


def conclude(key: str) -> float:
    """Wait for what `start` issued; its future, its callbacks and its result say the same."""
    tensor, work = HELD.pop(key)
    doubled = work.get_future().then(lambda done: 2 * done.value()[0])
    assert work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.result()[0] is tensor
    assert torch.equal(doubled.wait(), 2 * tensor)
    return float(tensor[0])


def sums_in_order(count: int) -> list[float]:
    """Issue many sums of which each depends on the one before."""
    tensor = torch.ones(1000)
    works = [dist.all_reduce(tensor, async_op=True) for _ in range(count)]
    dist.all_reduce(tensor)  # waits for its turn
    assert all(work.is_completed() for work in works)
    return [float(tensor.min()), float(tensor.max())]


def messages_across(size: int) -> None:
    """Post receives first, out of order; sum up while they wait; then send, in another order on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    peers = [peer for peer in range(world) if peer != rank]
    places = {(peer, tag): torch.empty(size, 2).t() for peer in peers for tag in (7, 3)}  # and not contiguous
    receives = [dist.irecv(place, peer, tag=tag) for (peer, tag), place in places.items()]
    total = torch.ones(size)
    dist.all_reduce(total)
    assert float(total[0]) == world
    sends = [
        dist.isend(torch.full((size, 2), 100.0 * rank + tag), peer, tag=tag)
        for tag in ((3, 7) if rank else (7, 3))
        for peer in peers
    ]
    for work in [*sends, *receives][:: 1 if rank else -1]:
        work.wait()
    for (peer, tag), place in places.items():
        assert torch.equal(place, torch.full((2, size), 100.0 * peer + tag))


def messages_from_anybody(size: int) -> set[int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank:
        dist.send(torch.full((size,), float(rank)), 0)
        return set()
    sources = set()
    for _ in range(1, world):
        place = torch.empty(size)
        sources.add(dist.recv(place))
        assert float(place[0]) in sources
    return sources


def messages_in_batches(size: int) -> None:
    """Both ways round a ring, sends first: a send that waits for its receive must not hold up the rank's own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % world, (rank - 1) % world
    own, from_before, from_after = torch.full((size,), float(rank)), torch.empty(size), torch.empty(size)
    operations = [
        dist.P2POp(dist.isend, own, after),
        dist.P2POp(dist.isend, own, before),
        dist.P2POp(dist.irecv, from_after, after),
        dist.P2POp(dist.irecv, from_before, before),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert float(from_before[-1]) == before
    assert float(from_after[-1]) == after


# --- groups, objects, functional collectives


def use_subgroups() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = [[0, 2], [1]]
    groups = [dist.new_group(ranks) for ranks in rows]
    for ranks, group in zip(rows, groups):
        if rank in ranks:
            assert (dist.get_backend(group), dist.get_rank(group)) == ("lepton", ranks.index(rank))
            tensor = torch.tensor([rank])
            dist.all_reduce(tensor, group=group)
            assert int(tensor) == sum(ranks)
    whole = dist.group.WORLD
    half = whole.split_group([2, 0], group_name="half")
    if rank != 1:
        tensor = torch.tensor([rank])
        half.broadcast(tensor, 0).wait()
        assert int(tensor) == 2
        half.shutdown()
    dist.destroy_process_group(groups[0] if rank in rows[0] else groups[1])
    assert whole.size() == world
    whole.monitored_barrier()


def use_objects() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * world
    dist.all_gather_object(found, {"rank": rank, "rows": list(range(rank))})
    assert found == [{"rank": each, "rows": list(range(each))} for each in range(world)]
    gathered = [None] * world if rank == 1 else None
    dist.gather_object(rank, gathered, dst=1)
    assert gathered in (None, list(range(world)))
    shared = ["from 2" if rank == 2 else None]
    dist.broadcast_object_list(shared, src=2)
    assert shared == ["from 2"]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {each}" for each in range(world)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]


def use_functions() -> None:
    """The collectives that traced programs and DTensor call, through C++."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    own = torch.arange(2.0 * world).reshape(world, 2) + rank
    everybody = torch.stack([torch.arange(2.0 * world).reshape(world, 2) + each for each in range(world)])
    assert torch.equal(functional.all_reduce(own, "sum", group), everybody.sum(0))
    assert torch.equal(functional.all_reduce(own, "avg", group), everybody.sum(0) / world)
    assert torch.equal(functional.all_gather_tensor(own, 0, group), everybody.reshape(-1, 2))
    assert torch.equal(functional.reduce_scatter_tensor(own, "sum", 0, group), everybody.sum(0)[rank : rank + 1])
    assert torch.equal(functional.all_to_all_single(own, None, None, group), everybody[:, rank])
    assert torch.equal(functional.broadcast(own, 1, group), everybody[1])
    first, second = functional.all_reduce_coalesced([own, own[:1]], "max", group)
    assert torch.equal(first, everybody.amax(0))
    assert torch.equal(second, everybody.amax(0)[:1])


def sum_sparse() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.arange(rank + 1)
    tensor = torch.sparse_coo_tensor(rows[None], torch.ones(rank + 1, 2), (world, 2))
    dist.all_reduce(tensor)
    assert torch.equal(tensor.to_dense()[:, 0], torch.arange(world, 0, -1.0))


# --- what is built on it


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))


def _samples(rank: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(rank))


def _trained(model: nn.Module, samples: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for inputs in samples:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def _ddp(group: dist.ProcessGroup, steps: int) -> list[Tensor]:
    # Buckets so small that there are several.
    model = DistributedDataParallel(_network(), process_group=group, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    return _trained(model, [_samples(10 * step + group.rank()) for step in range(steps)])


def train_ddp(steps: int) -> None:
    gloo = HELD.setdefault("gloo", dist.new_group(backend="gloo"))
    for one, other in zip(_ddp(dist.group.WORLD, steps), _ddp(gloo, steps), strict=True):
        torch.testing.assert_close(one, other)


def train_ddp_compressed(steps: int) -> None:
    """PowerSGD, a hook of torch's DDP, sends its factors over whatever group DDP has."""
    gloo = HELD.setdefault("gloo", dist.new_group(backend="gloo"))
    found = []
    for group in (dist.group.WORLD, gloo):
        model = DistributedDataParallel(_network(), process_group=group)
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        found.append(_trained(model, [_samples(10 * step + group.rank()) for step in range(steps)]))
        assert state.iter > state.start_powerSGD_iter
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def sum_gradients_of_shards(steps: int) -> None:
    """Our own reducer, where each process holds a part of each weight: gradients lie in its buckets."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole, model = _network(), _network()
    weight, bias = model[0].weight, model[0].bias
    model[0].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    model[0].bias = nn.Parameter(distribute_tensor(bias.detach(), mesh, [Replicate()]))
    reducer = Reducer(dict(model[0].named_parameters()), None)
    samples = [_samples(each) for each in range(world)]
    for _ in range(steps):
        reducer.begin()
        reducer.arm()
        # Each process has samples of its own, so the gradient of the bias is a partial sum.
        outputs = model[0](distribute_tensor(torch.cat(samples), mesh, [Shard(0)]))
        outputs.square().sum().backward()
        reducer.finish()
    whole[0](torch.cat(samples)).square().sum().backward()
    for one, other in ((model[0].weight, whole[0].weight), (model[0].bias, whole[0].bias)):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    own = [model[0].weight.grad.to_local(), model[0].bias.grad.to_local()]
    assert reducer.buckets[0].numel() == sum(each.numel() for each in own)
    within = range(reducer.buckets[0].data_ptr(), reducer.buckets[0].data_ptr() + reducer.buckets[0].nbytes)
    assert all(each.data_ptr() in within for each in own), rank


def train_fsdp(steps: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = _network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    found = _trained(model, [_samples(10 * step + rank) for step in range(steps)])
    whole = [torch.cat([_samples(10 * step + each) for each in range(world)]) for step in range(steps)]
    for one, other in zip(found, _trained(_network(), whole), strict=True):
        torch.testing.assert_close(one.full_tensor(), other)


def redistribute() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(60.0).reshape(6, 10)
    tensor = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(tensor.redistribute(placements=[Shard(1)]).full_tensor(), whole)
    assert torch.equal(tensor.redistribute(placements=[Replicate()]).to_local(), whole)
    product = tensor.redistribute(placements=[Shard(1)]) @ distribute_tensor(whole.t(), mesh, [Shard(0)])
    assert torch.equal(product.full_tensor(), whole @ whole.t())


def run_pipeline(microbatches: int) -> None:
    """Two stages; the gradients are those of the whole model."""
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    if rank > 1:
        return
    part, samples = slice(0, 1) if rank == 0 else slice(1, 3), _samples(0)
    own, whole = _network()[part], _network()
    stage = PipelineStage(own, rank, 2, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=lambda output, target: (output - target).square().mean())
    schedule.step(*([samples] if rank == 0 else []), **({"target": samples} if rank == 1 else {}))
    (whole(samples) - samples).square().mean().backward()
    for one, other in zip(own.parameters(), whole[part].parameters()):
        torch.testing.assert_close(one.grad, other.grad)


# --- errors


def fails(act: Callable[[], object]) -> tuple[str, bool, str, float]:
    """Return the type of the error, whether torch's own programs catch it, its text, and when it came."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, isinstance(error, RuntimeError), str(error), time.monotonic()
    raise AssertionError("it succeeded")


def wait_in_vain(how: str) -> tuple[str, bool, str, float]:
    """Wait for something that another rank does not take part in."""
    tensor = torch.ones(99_999)
    work = {
        "all_reduce": lambda: dist.all_reduce(tensor, async_op=True),
        "recv": lambda: dist.irecv(tensor, 2),
        "all_to_all": lambda: dist.all_to_all_single(tensor, tensor.clone(), async_op=True),
    }[how.removesuffix(" future")]()
    return fails(work.get_future().wait if how.endswith("future") else work.wait)


def backward_in_vain() -> tuple[str, bool, str, float]:
    """Let DDP, which waits in C++, meet the error."""
    model = HELD.pop("model")
    return fails(lambda: model(_samples(0)).sum().backward())


def wrap() -> None:
    HELD["model"] = DistributedDataParallel(_network())


def abort_soon() -> tuple[str, bool, str, float]:
    work = dist.irecv(torch.ones(3), 1)
    threading.Thread(target=dist.group.WORLD.abort).start()
    return fails(work.wait)


def call_wrongly(what: str) -> tuple[str, bool, str, float]:
    """Make a call that the ranks do not agree on."""
    rank = dist.get_rank()
    tensor = torch.ones(6)
    return fails(
        {
            "all_reduce": lambda: dist.all_reduce(torch.ones(5 if rank else 6)),
            "gather": lambda: dist.gather(tensor, [tensor] * 3 if rank < 2 else None, dst=int(rank == 1)),
            "all_to_all": lambda: dist.all_to_all_single(tensor[: 6 - rank // 2], tensor, [2, 2, 2 - rank // 2]),
        }[what]
    )


def wait_shortly(timeout_s: float) -> tuple[str, bool, str, float]:
    """Give one call a shorter limit than the group has."""
    options = dist.BarrierOptions()
    options.timeout = timedelta(seconds=timeout_s)
    return fails(dist.group.WORLD.barrier(options).wait)


def call_the_roll(timeout_s: float) -> tuple[str, bool, str, float]:
    return fails(lambda: dist.group.WORLD.monitored_barrier(timedelta(seconds=timeout_s)))


def inventory() -> tuple[int, int, int]:
    return members.inventory()
