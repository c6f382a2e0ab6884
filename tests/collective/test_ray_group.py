"""The backend under Ray's own collective functions, in real actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORLD = 2


def _actor_class() -> Any:
    import ray

    @ray.remote(num_cpus=0, max_concurrency=2)
    class Member:
        """Runs functions of this module; one thread may be blocked in a collective while the other one aborts it."""

        def call(self, function: Callable[..., Any], *args: Any) -> Any:
            return function(*args)

    return Member


@pytest.fixture(scope="module")
def started(ray_cluster: None) -> Iterator[list[Any]]:
    """Start the members of all groups and a victim, all at the same time."""
    import ray

    made = [_actor_class().remote() for _ in range(WORLD + 1)]
    everywhere(made, register_here)
    yield made
    for actor in made:
        ray.kill(actor)


@pytest.fixture
def actors(started: list[Any]) -> list[Any]:
    """Return the members of a group, which wait and encrypt as they do at first, whatever a test before asked for."""
    members = started[:WORLD]
    everywhere(members, demand_tls, [], 60)
    return members


def everywhere(actors: list[Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(rank, *args) in all actors at once."""
    import ray

    return ray.get([actor.call.remote(function, rank, *args) for rank, actor in enumerate(actors)], timeout=60)


def register_here(rank: int) -> None:
    from lepton_ray.collective import register

    register()


def join(rank: int, world: int, group: str, timeout_s: float | None = None) -> None:
    import ray.util.collective as collective

    from lepton_ray.collective import register

    register(timeout_s)
    collective.init_collective_group(world, rank, backend="LEPTON", group_name=group)


def leave(rank: int, group: str) -> None:
    import ray.util.collective as collective

    collective.destroy_collective_group(group)


def keys() -> list[bytes]:
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_list("collective/", namespace=b"lepton")


def check_allreduce(rank: int, group: str) -> None:
    import numpy as np
    import ray.util.collective as collective
    import torch
    from ray.util.collective.types import ReduceOp

    world = collective.get_collective_group_size(group)
    reference = {
        ReduceOp.SUM: lambda rows: rows.sum(0),
        ReduceOp.PRODUCT: lambda rows: rows.prod(0),
        ReduceOp.MIN: lambda rows: rows.amin(0),
        ReduceOp.MAX: lambda rows: rows.amax(0),
    }
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    for dtype in [*floats, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]:
        for count in (0, 7, 30_011):
            rows = torch.stack([(torch.arange(count) * (each + 3)) % 3 + 1 for each in range(world)]).to(dtype)
            if dtype == torch.bool:
                rows = rows.logical_xor(torch.arange(world * count).reshape(world, count) % 2 == 0)
            for op, expect in reference.items():
                if dtype.is_complex and op in (ReduceOp.MIN, ReduceOp.MAX):
                    continue
                wide = rows.to(torch.int64) if dtype in (torch.bool, torch.uint8, torch.int8) else rows
                expected = expect(wide).to(dtype)
                tensor = rows[rank].clone()
                collective.allreduce(tensor, group_name=group, op=op)
                assert tensor.equal(expected), (dtype, count, op)
                if dtype != torch.bfloat16:  # numpy has none
                    array = rows[rank].clone().numpy()
                    collective.allreduce(array, group_name=group, op=op)
                    np.testing.assert_array_equal(array, expected.numpy())
    # What Ray leaves in its options class does not reach a call that names no operation.
    collective.allreduce(tensor := torch.ones(3), group_name=group, op=ReduceOp.MAX)
    collective.allreduce(tensor, group_name=group)
    assert tensor.tolist() == [world] * 3


def check_layouts(rank: int, group: str) -> None:
    import numpy as np
    import ray.util.collective as collective
    import torch

    world = collective.get_collective_group_size(group)
    base = torch.arange(24.0).reshape(4, 6)
    for view in (
        base.clone().t(),
        base.clone()[:, ::2],
        base.clone()[1:3],
        base.clone()[0, 0],
        base.clone().bfloat16().t(),
        torch.nn.Parameter(base.clone()),
        base.to(torch.complex64).conj(),
    ):
        expected = view.detach() * world
        collective.allreduce(view, group_name=group)
        assert torch.equal(view.detach(), expected)
    for array in (base.numpy().copy().T, base.numpy().copy()[:, ::2], np.array(5.0)):
        expected = array * world
        collective.allreduce(array, group_name=group)
        np.testing.assert_array_equal(array, expected)


def check_other_operations(rank: int, group: str) -> None:
    import numpy as np
    import ray.util.collective as collective
    import torch
    from ray.util.collective.types import ReduceOp

    world = collective.get_collective_group_size(group)
    collective.barrier(group)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        for count in (5, 40_000):
            data = [((torch.arange(2 * count) * (each + 2)) % 5).to(dtype).reshape(2, count) for each in range(world)]
            own = data[rank]
            for root in range(world):
                work = own.clone()
                collective.broadcast(work, src_rank=root, group_name=group)
                assert work.equal(data[root])
                work = own.clone()
                collective.reduce(work, dst_rank=root, group_name=group, op=ReduceOp.MAX)
                assert work.equal(torch.stack(data).amax(0) if rank == root else own)
            outputs = [torch.empty_like(own) for _ in range(world)]
            outputs[0] = torch.empty(count, 2, dtype=dtype).t()
            collective.allgather(outputs, own, group_name=group)
            assert all(output.equal(expected) for output, expected in zip(outputs, data))
            output = torch.empty_like(own)
            inputs = [own.roll(each, 1) for each in range(world)]
            collective.reducescatter(output, inputs, group_name=group, op=ReduceOp.MAX)
            assert output.equal(torch.stack(data).roll(rank, 2).amax(0))
            assert all(each.equal(own.roll(i, 1)) for i, each in enumerate(inputs))
            for source in range(world):
                to = (source + 1) % world
                if rank == source:
                    collective.send(own, to, group_name=group)
                elif rank == to:
                    work = torch.empty_like(own)
                    collective.recv(work, source, group_name=group)
                    assert work.equal(data[source])
    rows = [np.empty(3) for _ in range(world)]
    collective.allgather(rows, np.full(3, float(rank)), group_name=group)
    assert [row.tolist() for row in rows] == [[float(each)] * 3 for each in range(world)]


def check_memory_of_the_group(rank: int, group: str) -> None:
    import ray.util.collective as collective
    import torch

    from lepton_ray.collective import empty, ray_group
    from lepton_ray.collective.holdings import HEAP

    formed = ray_group._forming_or_formed[group].formed
    assert formed.transport == "shared memory"
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        tensor = empty(70_000, dtype)
        tensor.copy_(torch.arange(70_000) % 50 + rank)
        assert HEAP.find(tensor.view(torch.uint8).numpy()).inode
        collective.allreduce(tensor[5:], group_name=group)
        assert tensor[5:].equal((torch.arange(5, 70_000) % 50 * 2 + 1).to(dtype))
        assert tensor[:5].tolist() == [rank + i for i in range(5)]


def check_wire(rank: int, group: str) -> None:
    import torch

    from lepton_ray.collective import allreduce, explain

    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.full((2, 5000), rank + 1, dtype=dtype).t()
        allreduce(group, tensor, wire="auto")
        assert tensor.eq(3).all()
    assert explain(group, 20_000) == "20000 bytes between 2 ranks of one node: shared memory"


def check_refusals(rank: int, group: str) -> None:
    import numpy as np
    import ray.util.collective as collective
    import torch
    from ray.util.collective.types import ReduceOp

    from lepton_ray.errors import ConfigError

    frozen = np.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(ConfigError, match="read-only"):
        collective.allreduce(frozen, group_name=group)
    with pytest.raises(ConfigError, match="no order"):
        collective.allreduce(torch.zeros(3, dtype=torch.complex64), group_name=group, op=ReduceOp.MAX)
    for kind in (ConfigError, RuntimeError):  # the latter as with Ray's own backends
        with pytest.raises(kind, match="must be alike"):
            collective.allgather([torch.zeros(3)] * WORLD, torch.zeros(4), group_name=group)
    collective.barrier(group)  # the group lives on


@pytest.mark.parametrize(
    "check",
    [check_allreduce, check_layouts, check_other_operations, check_memory_of_the_group, check_wire, check_refusals],
)
def test_every_operation_of_rays_interface(actors: list[Any], check: Callable[[int, str], None]) -> None:
    everywhere(actors, join, WORLD, check.__name__)
    assert keys() == []
    everywhere(actors, check, check.__name__)
    everywhere(actors, leave, check.__name__)


def sum_of_arguments(rank: int, group: str, *arrays: Any) -> list[Any]:
    import ray.util.collective as collective

    assert not any(array.flags.writeable for array in arrays)
    for array in arrays:
        collective.allreduce(array, group_name=group)
    return [array[0, 0].item() for array in arrays]


def test_arrays_that_came_through_ray_are_reduced_in_place_as_with_its_own_backends(actors: list[Any]) -> None:
    import numpy as np

    everywhere(actors, join, WORLD, "arguments")
    arrays = [np.ones((2, 3)), np.ones((300, 700)), np.ones((3, 2), order="F")]
    assert everywhere(actors, sum_of_arguments, "arguments", *arrays) == [[2.0] * 3] * WORLD
    everywhere(actors, leave, "arguments")


def sum_in(rank: int, groups: list[str]) -> list[float]:
    import ray.util.collective as collective
    import torch

    sums = []
    for group in groups:
        tensor = torch.tensor([float(collective.get_rank(group) + 1)])
        collective.allreduce(tensor, group_name=group)
        sums.append(tensor.item())
    return sums


def test_groups_of_any_actors_live_side_by_side_and_a_name_can_return(actors: list[Any]) -> None:
    everywhere(actors, join, WORLD, "all")
    pair = actors[::-1]  # ranks other than in the group of all
    for _ in range(2):
        everywhere(pair, join, 2, "all/pair")
        assert everywhere(pair, sum_in, ["all/pair"]) == [[3.0], [3.0]]
        assert everywhere(actors, sum_in, ["all"]) == [[3.0]] * WORLD
        everywhere(pair, leave, "all/pair")
    everywhere(actors[:1], join, 1, "alone")
    assert everywhere(actors[:1], sum_in, ["alone"]) == [[1.0]]
    everywhere(actors[:1], leave, "alone")
    everywhere(actors, leave, "all")


def blocked_sum(rank: int, group: str) -> tuple[str, float]:
    import ray.util.collective as collective
    import torch

    from lepton_ray.errors import LeptonError

    try:
        while True:
            collective.allreduce(torch.ones(100_000), group_name=group)
    except LeptonError as error:
        return f"{type(error).__name__}: {error}", time.time()


def abort_here(group: str) -> bool:
    from lepton_ray.collective import abort

    return abort(group, "told so")


def die() -> None:
    import os

    os._exit(1)


def test_survivors_of_a_death_form_the_next_generation(started: list[Any], actors: list[Any]) -> None:
    import ray

    members, victim = started, started[-1]
    everywhere(members, join, WORLD + 1, "job/1", 30)
    assert everywhere(members, sum_in, ["job/1"]) == [[6.0]] * (WORLD + 1)
    running = [actor.call.remote(blocked_sum, rank, "job/1") for rank, actor in enumerate(members)]
    died_s = time.time()
    victim.call.remote(die)
    for error, noticed_s in ray.get(running[:WORLD], timeout=30):
        assert error.startswith("PeerLost")
        assert noticed_s - died_s < 5  # includes the call that kills
    everywhere(actors, leave, "job/1")
    everywhere(actors, join, WORLD, "job/2")
    assert everywhere(actors, sum_in, ["job/2"]) == [[3.0]] * WORLD
    everywhere(actors, leave, "job/2")


def test_abort_reaches_a_group_that_waits_and_one_that_still_forms(actors: list[Any]) -> None:
    import ray

    from lepton_ray.errors import PeerLost

    everywhere(actors, join, WORLD, "busy", 60)
    waiting = [actor.call.remote(blocked_sum, rank, "busy") for rank, actor in enumerate(actors)]
    assert ray.get(actors[0].call.remote(abort_here, "busy"))
    errors = [error for error, _ in ray.get(waiting, timeout=20)]
    assert "told so" in errors[0]
    assert all(error.startswith("PeerLost") for error in errors)
    everywhere(actors, leave, "busy")

    forming = actors[0].call.remote(join, 0, 2, "forming", 60)
    while not ray.get(actors[0].call.remote(abort_here, "forming")):
        pass
    with pytest.raises(PeerLost, match="told so"):
        ray.get(forming, timeout=20)
    assert keys() == []


def check_on_a_device(rank: int, group: str) -> None:
    """With tensors of the CPU as if they lay elsewhere, and Gloo for them."""
    import ray.util.collective as collective
    import torch

    from lepton_ray.collective import ray_group

    formed = ray_group._forming_or_formed[group]
    formed.is_in_host = lambda tensor: False
    if rank == 0:  # two ranks alone do not begin with it
        collective.send(torch.ones(3), 1, group)
    else:
        collective.recv(tensor := torch.zeros(3), 0, group)
        assert tensor.eq(1).all()
    for _ in range(2):
        collective.allreduce(tensor := torch.full((3, 2), rank + 1.0).t(), group)
        assert tensor.eq(3).all()
        collective.broadcast(tensor := torch.full((3,), float(rank)), 1, group)
        assert tensor.eq(1).all()
        collective.reduce(tensor := torch.full((3,), rank + 1.0), 1, group)
        assert rank == 0 or tensor.eq(3).all()
        collective.allgather(rows := [torch.zeros(3) for _ in range(WORLD)], tensor.fill_(rank), group)
        assert [row[0].item() for row in rows] == [0, 1]
        collective.barrier(group)
    assert [type(each).__name__ for each in formed._accelerators.values()] == ["Accelerator"]


def test_tensors_of_an_accelerator_go_by_what_torch_has_for_it(actors: list[Any]) -> None:
    everywhere(actors, join, WORLD, "device", 20)
    everywhere(actors, check_on_a_device, "device")
    assert keys() != []  # torch's, for as long as the group lives
    everywhere(actors, leave, "device")
    assert keys() == []


def demand_tls(rank: int, ranks: list[int], timeout_s: float) -> None:
    from lepton_ray.collective import register

    register(timeout_s, tls=rank in ranks)


def kinds_of_links(rank: int, group: str) -> set[str]:
    from lepton_ray.collective import ray_group

    formed = ray_group._forming_or_formed[group].formed
    return {type(link).__name__ for link in formed._mesh.links.values()}


def test_connections_are_encrypted_where_rank_0_says_so_and_nobody_who_wants_it_does_without(actors: list[Any]) -> None:
    import ray

    from lepton_ray.errors import ConfigError

    for ranks in ([0], [0, 1]):
        everywhere(actors, demand_tls, ranks, 20)
        everywhere(actors, join, WORLD, "sealed")
        assert everywhere(actors, kinds_of_links, "sealed") == [{"SealedLink"}] * WORLD
        assert everywhere(actors, sum_in, ["sealed"]) == [[3.0]] * WORLD
        everywhere(actors, leave, "sealed")
    everywhere(actors, demand_tls, [1], 1)
    joining = [actor.call.remote(join, rank, WORLD, "half sealed") for rank, actor in enumerate(actors)]
    with pytest.raises(ConfigError, match="asks for TLS, and rank 0 does not"):
        ray.get(joining[1], timeout=20)
    ray.wait(joining, num_returns=2, timeout=20)
    assert keys() == []


def test_a_rank_that_never_comes_is_named(actors: list[Any]) -> None:
    import ray

    from lepton_ray.errors import WaitTimeout

    with pytest.raises(WaitTimeout, match="waited 0.3 s for rank 1"):
        ray.get(actors[0].call.remote(join, 0, 2, "half", 0.3), timeout=20)
    assert keys() == []


def test_a_group_declared_by_the_driver_works(actors: list[Any]) -> None:
    import ray.util.collective as collective

    register_here(0)
    everywhere(actors, register_here)
    collective.create_collective_group(actors, WORLD, [1, 0], backend="LEPTON", group_name="declared")

    def join_declared(rank: int) -> float:
        import torch

        tensor = torch.ones(4)
        collective.allreduce(tensor, group_name="declared")
        return tensor[0].item()

    assert everywhere(actors, join_declared) == [float(WORLD)] * WORLD
    everywhere(actors, leave, "declared")
