"""torch.distributed on our transport: real processes, compared with Gloo in the same ones."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.collective import torch_ranks as there
from tests.collective.members import Member, together

pytestmark = pytest.mark.slow

WORLD = 3
NOTICED_S = 0.5
CALLS = 5 * (4 * 5 + 5 * 7) + 8 * 9  # reducing ones with 4 floats and 5 others, moving ones
Grouped = Callable[..., AbstractContextManager[list[Member]]]


class Rank(Member):
    """A process with torch, forked from one that has it."""

    def __init__(self, breeder: Connection) -> None:
        self._breeder = breeder
        super().__init__()

    def _start(self, pipe: Connection) -> int:
        self._breeder.send(pipe)
        pid: int = self._breeder.recv()
        return pid

    def close(self) -> None:
        self._pipe.close()
        with suppress(ProcessLookupError):
            self.kill()


@pytest.fixture(scope="module")
def grouped() -> Iterator[Grouped]:
    """Return what makes processes and joins them in a process group "lepton"."""
    context = multiprocessing.get_context("spawn")
    breeder, orders = context.Pipe()
    process = context.Process(target=there.breed, args=(orders,))
    process.start()
    orders.close()

    @contextmanager
    def make(folder: Path, timeout_s: float = 20) -> Iterator[list[Member]]:
        made = [Rank(breeder) for _ in range(WORLD)]
        try:
            for rank, member in enumerate(made):
                member.tell(there.init, str(folder / "store"), rank, WORLD, timeout_s)
            assert [member.result() for member in made] == ["shared memory"] * WORLD
            yield [*made]
        finally:
            for member in made:
                member.close()

    yield make
    breeder.close()
    process.join()


@pytest.fixture(scope="module")
def ranks(grouped: Grouped, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """Processes for all tests that leave their group whole."""
    with grouped(tmp_path_factory.mktemp("ranks")) as made:
        yield made


@pytest.mark.parametrize("rows", [3, 3000])
def test_every_call_is_that_of_gloo(ranks: list[Member], rows: int) -> None:
    assert together(ranks, there.compare_with_gloo, rows) == [CALLS] * WORLD


def test_a_work_is_done_when_all_ranks_have_come(ranks: list[Member]) -> None:
    ranks[0].tell(there.start, "sum", 1000)
    assert ranks[0].result() is False
    ranks[1].tell(there.start, "sum", 1000)
    assert ranks[1].result() is False
    together(ranks[2:], there.start, "sum", 1000)
    assert together(ranks, there.conclude, "sum") == [6.0] * WORLD


@pytest.mark.parametrize(
    ("act", "size"),
    [
        (there.messages_across, 4),
        (there.messages_across, 500_000),
        (there.messages_in_batches, 4),
        (there.messages_in_batches, 2_000_000),
        (there.train_ddp, 3),
        (there.train_ddp_compressed, 5),
        (there.sum_gradients_of_shards, 2),
        (there.train_fsdp, 3),
        (there.run_pipeline, 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_works_with_size(ranks: list[Member], act: Callable[[int], None], size: int) -> None:
    together(ranks, act, size)


@pytest.mark.parametrize(
    "act",
    [
        there.move_other_dtypes,
        there.use_subgroups,
        there.use_objects,
        there.use_functions,
        there.sum_sparse,
        there.redistribute,
    ],
    ids=lambda act: act.__name__,
)
def test_it_works(ranks: list[Member], act: Callable[[], None]) -> None:
    together(ranks, act)


def test_works_are_done_in_the_order_of_issue(ranks: list[Member]) -> None:
    assert together(ranks, there.sums_in_order, 10) == [[float(WORLD**11)] * 2] * WORLD


def test_messages_from_anybody_say_from_whom(ranks: list[Member]) -> None:
    assert together(ranks, there.messages_from_anybody, 1000) == [{1, 2}, set(), set()]


def test_groups_can_be_made_again_and_leave_nothing(grouped: Grouped, tmp_path: Path) -> None:
    with grouped(tmp_path) as made:
        together(made, there.messages_across, 4)  # starts the threads
        together(made, there.destroy)
        left = together(made, there.inventory)
        for rank, member in enumerate(made):
            member.tell(there.init, str(tmp_path / "store"), rank, WORLD)  # the same store
        for member in made:
            member.result()
        together(made, there.messages_across, 4)
        together(made, there.destroy)
        for before, after in zip(left, together(made, there.inventory)):
            assert after <= before


# --- errors


def check_noticed(noticed: Any, since_s: float, *kinds: str) -> None:
    kind, is_torch_error, text, noticed_s = noticed
    assert kind in kinds, text
    assert is_torch_error
    assert noticed_s - since_s < NOTICED_S


@pytest.mark.parametrize("how", ["all_reduce", "all_reduce future", "recv", "all_to_all", "DDP"])
def test_a_killed_rank_is_noticed_where_its_peers_wait(grouped: Grouped, tmp_path: Path, how: str) -> None:
    with grouped(tmp_path) as made:
        if how == "DDP":
            together(made, there.wrap)
        for member in made[:2]:
            member.tell(*((there.backward_in_vain,) if how == "DDP" else (there.wait_in_vain, how)))
        killed_s = time.monotonic()
        made[2].kill()
        for member in made[:2]:
            # A future, which DDP waits for, knows errors of C++ only.
            is_future = how in ("DDP", "all_reduce future")
            noticed = member.result()
            check_noticed(noticed, killed_s, "RuntimeError" if is_future else "TorchPeerLost")


def test_the_timeout_is_honoured(grouped: Grouped, tmp_path: Path) -> None:
    with grouped(tmp_path, timeout_s=0.4) as made:
        started_s = time.monotonic()
        made[0].tell(there.wait_in_vain, "recv")
        noticed = made[0].result()
        check_noticed(noticed, started_s + 0.4, "TorchWaitTimeout")
        assert noticed[-1] - started_s > 0.4
        made[0].tell(there.wait_in_vain, "all_reduce")
        assert "nothing moved to or from rank 2" in made[0].result()[2]


def test_abort_wakes_who_waits(grouped: Grouped, tmp_path: Path) -> None:
    with grouped(tmp_path) as made:
        started_s = time.monotonic()
        made[1].tell(there.wait_in_vain, "all_reduce")
        made[0].tell(there.abort_soon)
        for member in made[:2]:
            check_noticed(member.result(), started_s, "TorchPeerLost")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("all_reduce", r"rank \d calls allreduce\(sum\) #\d of [56] x f4 but rank \d calls allreduce"),
        ("gather", r"rank \d calls gather with root [01], and rank \d calls gather with root [01]"),
        ("all_to_all", r"all_to_all: rank 2 sends 8 bytes to rank 2, which expects 4"),
    ],
)
def test_calls_that_differ_are_named(grouped: Grouped, tmp_path: Path, what: str, said: str) -> None:
    with grouped(tmp_path) as made:
        for kind, _, text, _ in together(made, there.call_wrongly, what):
            assert kind in ("ConfigError", "TorchPeerLost")
            assert re.search(said, text), text


def test_a_call_may_have_a_limit_of_its_own(grouped: Grouped, tmp_path: Path) -> None:
    with grouped(tmp_path) as made:
        started_s = time.monotonic()
        made[0].tell(there.wait_shortly, 0.3)
        check_noticed(made[0].result(), started_s + 0.3, "TorchWaitTimeout")


def test_a_monitored_barrier_names_who_does_not_come(grouped: Grouped, tmp_path: Path) -> None:
    with grouped(tmp_path) as made:
        made[0].tell(there.call_the_roll, 0.2)
        kind, _, text, _ = made[0].result()
        assert kind == "TorchWaitTimeout"
        assert "rank(s) 1, 2 did not come to the monitored barrier within 0.2 s" in text


def test_a_program_may_end_without_destroying_its_group(tmp_path: Path) -> None:
    code = (
        "import sys, torch, torch.distributed as dist, lepton_ray.collective.torch_backend;"
        "store = dist.FileStore(sys.argv[1], 2);"
        "dist.init_process_group('lepton', store=store, rank=int(sys.argv[2]), world_size=2);"
        "work = dist.irecv(torch.ones(3), 1 - dist.get_rank());"
        "tensor = torch.ones(3); dist.all_reduce(tensor, async_op=True).wait(); print(tensor.tolist())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "store")]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    programs = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    for program in programs:
        assert program.communicate(timeout=60) == ("[2.0, 2.0, 2.0]\n", "")
        assert program.returncode == 0
