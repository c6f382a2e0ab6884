"""What carries tensors of an accelerator, with CPU tensors and Gloo in its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lepton_ray.collective import torch_backend
from lepton_ray.collective.accelerator import Accelerator, KeyStore, backend_for
from lepton_ray.errors import PeerLost, WaitTimeout

WORLD = 2


class Dictionary:
    """Keys that threads share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def find(self, key: str) -> bytes | None:
        return self.values.get(key)

    def delete(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


def in_threads(act: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(act, range(WORLD)))


def made(name: str, look: Callable[[], object] = str, end: Callable[[str], object] = str) -> list[Accelerator]:
    keys = Dictionary()
    return in_threads(lambda rank: Accelerator(name, KeyStore(keys, 20), rank, WORLD, timeout_s=20, look=look, end=end))


@pytest.fixture(params=["gloo", torch_backend.BACKEND])
def name(request: pytest.FixtureRequest) -> str:
    """One that torch has, and one that a package has registered."""
    found: str = request.param
    return found


def test_the_choice_follows_what_torch_knows() -> None:
    assert backend_for("cpu") == "gloo"
    assert backend_for("cuda") == ("nccl" if hasattr(dist, "ProcessGroupNCCL") else None)
    assert backend_for("mps") is None  # torch names Gloo, which goes through host memory too
    assert backend_for("privateuseone") is None
    dist.Backend.register_backend("vendors_own", str, devices=["privateuseone"])
    try:
        assert backend_for("privateuseone") == "vendors_own"
    finally:
        del dist.Backend._plugins["VENDORS_OWN"], dist.Backend.default_device_backend_map["privateuseone"]


def test_operations(name: str) -> None:
    accelerators = made(name)

    def use(rank: int) -> None:
        own = accelerators[rank]
        for fresh in (lambda: torch.full((4, 3), rank + 1.0), lambda: torch.full((3, 4), rank + 1.0).t()):
            own.allreduce(tensor := fresh(), "sum")
            assert tensor.eq(3).all()
            own.allreduce(parameter := torch.nn.Parameter(fresh()), "product")
            assert parameter.eq(2).all()
            own.reduce(tensor := fresh(), 1, "max")
            assert rank == 0 or tensor.eq(2).all()
            own.broadcast(tensor := fresh(), 1)
            assert tensor.eq(2).all()
            own.allgather(outputs := [torch.zeros(3, 4).t() for _ in range(WORLD)], fresh())
            assert [output.unique().tolist() for output in outputs] == [[1.0], [2.0]]
            if name == "gloo":  # of what follows its works do not say when they are done (2.13)
                continue
            own.reducescatter(output := torch.zeros(3, 4).t(), [fresh() * 2, fresh() * 5], "sum")
            assert output.eq([6, 15][rank]).all()
            if rank == 0:
                own.send(fresh() * 7, 1)
            else:
                own.recv(tensor := fresh(), 0)
                assert tensor.eq(7).all()

    in_threads(use)
    for each in accelerators:
        each.abort()
        each.abort()


def test_whoever_waits_sees_the_end_of_the_group_beside(name: str) -> None:
    has_ended = threading.Event()

    def look() -> None:
        if has_ended.is_set():
            raise PeerLost("rank 1 has died")

    accelerators = made(name, look=look)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(accelerators[0].allreduce, torch.ones(3), "sum")
        time.sleep(0.05)  # in the middle of it
        ended_s = time.monotonic()
        has_ended.set()
        with pytest.raises(PeerLost, match="rank 1 has died"):
            waiting.result(10)
        assert time.monotonic() - ended_s < 5  # and not after the 20 s of the limit
    with pytest.raises(PeerLost):
        accelerators[0].allreduce(torch.ones(3), "sum")


def test_whoever_waits_does_so_no_longer_than_the_limit(name: str) -> None:
    reasons: list[str] = []
    accelerators = made(name, end=reasons.append)
    accelerators[0]._timeout_s = 0.3  # now that all are there
    with pytest.raises(WaitTimeout, match="not done after 0.3 s"):
        accelerators[0].allreduce(torch.ones(3), "sum")
    assert len(reasons) == 1  # the group beside is told, and so are the others
    assert reasons[0].startswith("allreduce on an accelerator: ")


def test_a_store_waits_for_keys_as_long_as_it_is_told() -> None:
    store = KeyStore(Dictionary(), 0.05)
    store.set("a", "text")
    assert (store.get("a"), store.check(["a"]), store.check(["a", "b"])) == (b"text", True, False)
    with pytest.raises(dist.DistStoreError, match="waited 0.05 s for b"):
        store.get("b")
    assert store.delete_key("a")
    assert not store.delete_key("a")
