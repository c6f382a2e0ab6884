"""Admission: first come first served, warm workers first, never more than fits."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.plan.allocate import Grant, Refuse, Wait, Warm, admit, fit, spots
from lepton_ray.plan.types import Node, Request, Slot

CPU = Slot(resources={"CPU": 1.0, "GPU": 0.0})
GPU = Slot(resources={"CPU": 1.0, "GPU": 1.0})
SLOTS = st.builds(
    lambda cpus, gpus: Slot(resources={"CPU": cpus, "GPU": gpus}),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.25, 1.0]),
)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    total = {"CPU": float(draw(st.integers(0, 8))), "GPU": float(draw(st.integers(0, 2)))}
    free = {name: float(draw(st.integers(0, int(amount)))) for name, amount in total.items()}
    return Node(name="node", total=total, free=free)


CLUSTERS = st.lists(nodes(), max_size=3)
POOLS = st.lists(st.tuples(SLOTS, st.sampled_from(["a", "b"])), max_size=4).map(
    lambda found: [Warm(worker=f"w{i}", slot=slot, environment=e) for i, (slot, e) in enumerate(found)]
)


def ask(workers: int, slot: Slot = CPU, environment: str = "a") -> Request:
    return Request(job="job", workers=workers, slot=slot, environment=environment)


def node(total: float, free: float, gpus: float = 0) -> Node:
    return Node(name="10.0.0.1", total={"CPU": total, "GPU": gpus}, free={"CPU": free, "GPU": gpus})


def most_room(cluster: list[Node], slot: Slot, freed: list[Warm], most: int) -> int:
    """Count slots in what is free and what the freed workers held, wherever they were."""
    sums = {
        name: sum(n.free.get(name, 0) for n in cluster) + sum(w.slot.resources.get(name, 0) for w in freed)
        for name in slot.resources
    }
    return fit([sums], slot, most)


@given(CLUSTERS, SLOTS, st.integers(1, 12))
def test_what_fits_can_be_packed_and_one_more_slot_cannot(cluster: list[Node], slot: Slot, most: int) -> None:
    free = [dict(n.free) for n in cluster]
    count = fit(free, slot, most)
    for _ in range(count):
        place = next((f for f in free if all(f[k] >= v - 1e-6 for k, v in slot.resources.items())), None)
        assert place is not None
        for name, amount in slot.resources.items():
            place[name] -= amount
    if count < most:
        assert not any(all(f[k] >= v for k, v in slot.resources.items()) for f in free)


@given(CLUSTERS, st.integers(1, 10), SLOTS, st.sampled_from(["a", "b"]), POOLS)
def test_every_answer_is_sound(
    cluster: list[Node], workers: int, slot: Slot, environment: str, pool: list[Warm]
) -> None:
    request = ask(workers, slot, environment)
    possible = fit([n.total for n in cluster], slot, workers)
    alike = [w.worker for w in pool if w.slot == slot and w.environment == environment]
    match admit(request, cluster, pool):
        case Grant() as grant:
            assert possible == workers
            assert len(grant.reuse) + grant.create == workers
            assert list(grant.reuse) == alike[:workers]  # warm first, those that wait longest first
            assert not set(grant.reuse) & set(grant.evict)
            assert set(grant.evict) <= {w.worker for w in pool}
            freed = [w for w in pool if w.worker in grant.evict]
            if grant.evict:
                assert fit([n.free for n in cluster], slot, grant.create) < grant.create
                assert most_room(cluster, slot, freed, grant.create) == grant.create
            else:
                assert fit([n.free for n in cluster], slot, grant.create) == grant.create
            assert grant.reason
        case Wait(reason=reason):
            assert possible == workers
            assert len(alike) < workers
            assert "job" in reason
        case Refuse(reason=reason):
            assert possible < workers
            assert str(slot) in reason


@given(CLUSTERS, SLOTS, st.integers(0, 12))
def test_new_slots_go_where_there_is_room(cluster: list[Node], slot: Slot, count: int) -> None:
    chosen = spots(cluster, slot, count)
    room = sum(fit([node.free], slot, count) for node in cluster)
    assert len(chosen) == count
    assert sum(node is not None for node in chosen) == min(room, count)
    for node in cluster:
        assert sum(each is node for each in chosen) <= fit([node.free], slot, count)


def test_warm_workers_come_before_new_ones() -> None:
    pool = [Warm(worker="other", slot=CPU, environment="b"), Warm(worker="mine", slot=CPU, environment="a")]
    grant = admit(ask(2), [node(6, 3)], pool)
    assert isinstance(grant, Grant)
    assert (grant.reuse, grant.evict, grant.create) == (("mine",), (), 1)


def test_idle_workers_of_others_end_to_make_room() -> None:
    pool = [Warm(worker="other", slot=CPU, environment="b")]
    grant = admit(ask(2), [node(2, 1)], pool)
    assert isinstance(grant, Grant)
    assert (grant.reuse, grant.evict, grant.create) == ((), ("other",), 2)


def test_idle_workers_stay_when_their_end_would_not_make_room() -> None:
    pool = [Warm(worker="other", slot=CPU, environment="b")]
    answer = admit(ask(4), [node(6, 1)], pool)
    assert isinstance(answer, Wait)
    assert re.search(r"job waits for 4 x \(1 CPU\).*room for 1", answer.reason)


def test_a_refusal_says_what_was_asked_what_there_is_and_what_to_do() -> None:
    answer = admit(ask(9), [node(6, 6)], [])
    assert isinstance(answer, Refuse)
    for part in ("num_workers=9", "1 CPU", "can hold 6", "10.0.0.1: 6 CPU", "Use num_workers=6"):
        assert part in answer.reason


def test_a_device_that_no_node_has_is_named() -> None:
    answer = admit(ask(1, GPU), [node(6, 6)], [])
    assert isinstance(answer, Refuse)
    assert "1 CPU + 1 GPU" in answer.reason
    assert "no node" in answer.reason
