"""Made-up jobs under seeded faults: all rules hold, a seed is a life, and planted mistakes of the planner are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest

from lepton_ray.plan import membership, replicas
from lepton_ray.plan.adopt import At, Past, Word
from lepton_ray.plan.events import (
    BETWEEN,
    Broke,
    Command,
    Committed,
    Event,
    Failure,
    Form,
    Formed,
    Left,
    Lost,
    Outcome,
    Phase,
    Refused,
    Run,
    Step,
    Tick,
)
from lepton_ray.plan.recover import Position, Settlement, workers_of
from lepton_ray.sim import controller, drive, faults
from lepton_ray.sim.controller import Broken


def test_all_rules_hold_in_every_life(monkeypatch: pytest.MonkeyPatch):
    met: Counter[tuple[Phase, type[Event]]] = Counter()
    real = controller.advance

    def advance(run: Run, event: Event, now_s: float) -> Step:
        met[run.phase, type(event)] += 1
        return real(run, event, now_s)

    monkeypatch.setattr(controller, "advance", advance)
    lives = [drive.drive(seed) for seed in range(600)]
    outcomes = Counter(life.outcome for life in lives)
    assert outcomes[Outcome.FINISHED] > 500
    assert sum(life.generations for life in lives) > 1500
    assert min(life.faults for life in lives) >= 3
    assert EXPECTED.issubset(met)


def test_every_life_has_fifty_steps():
    assert min(faults.setting(seed).steps for seed in range(100)) >= 50


def test_a_seed_is_a_life(capsys: pytest.CaptureFixture[str]):
    assert drive.drive(5) == drive.drive(5)
    shown = []
    for _ in range(2):
        assert drive.main(["--seed", "5"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "-> Form(generation=1" in shown[0]


EXPECTED: set[tuple[Phase, type[Event]]] = {
    *product(set(Phase).difference([Phase.STOPPING, Phase.ENDED]), set(get_args(Event)).difference([Broke, Refused])),
    *product([Phase.STOPPING], [Committed, Left, Lost, Tick]),
}
"""What these lives must meet. Few of them are stopped or refused, and none has an error of the controller itself."""


# --- planted mistakes -------------------------------------------------------------------------------------------------


def settle_takes_the_oldest(patch: pytest.MonkeyPatch) -> None:
    real = membership.settle

    def settle(positions: dict[int, Position], size: int) -> Settlement | None:
        oldest = min((position.committed for position in positions.values()), default=0)
        return real({w: position for w, position in positions.items() if position.committed == oldest}, size)

    patch.setattr(membership, "settle", settle)


def nobody_rolls_forward(patch: pytest.MonkeyPatch) -> None:
    real = membership.settle

    def settle(positions: dict[int, Position], size: int) -> Settlement | None:
        found = real(positions, size)
        return found and replace(found, forward=frozenset())

    patch.setattr(membership, "settle", settle)


def old_generations_count(patch: pytest.MonkeyPatch) -> None:
    real = controller.advance

    def advance(run: Run, event: Event, now_s: float) -> Step:
        if isinstance(event, (Left, Formed, Committed)):
            event = replace(event, generation=run.generation)
        return real(run, event, now_s)

    patch.setattr(controller, "advance", advance)


def the_replica_of_a_dead_worker_stays(patch: pytest.MonkeyPatch) -> None:
    real = replicas.staying

    def staying(run: Run) -> list[int]:
        return real(replace(run, replicas={n: replace(r, gone=frozenset()) for n, r in run.replicas.items()}))

    patch.setattr(replicas, "staying", staying)
    patch.setattr(membership, "staying", staying)


def what_leavers_hold_is_dropped(patch: pytest.MonkeyPatch) -> None:
    real = membership._left

    def left(run: Run, event: Left, now_s: float) -> Step:
        is_able = event.worker // run.size in membership.able(run)
        return real(run, event if is_able else replace(event, position=None), now_s)

    patch.setattr(membership, "_left", left)


def leavers_are_released_before_the_others_have_formed(patch: pytest.MonkeyPatch) -> None:
    real = membership._form

    def form(run: Run, *arguments: Any) -> Step:
        run, commands = real(run, *arguments)
        poorer, released = replicas.trim(replace(run, positions={}, lenders=frozenset()), "it leaves")
        return replace(run, replicas=poorer.replicas), [*commands, *released]

    patch.setattr(membership, "_form", form)


def settling_has_no_deadline(patch: pytest.MonkeyPatch) -> None:
    real = membership._settling

    def settling(*arguments: Any, **more: Any) -> Step:
        run, commands = real(*arguments, **more)
        return replace(run, deadline_s=None), commands

    patch.setattr(membership, "_settling", settling)


def a_generation_is_formed_again_under_its_number(patch: pytest.MonkeyPatch) -> None:
    real = membership._form

    def form(run: Run, *arguments: Any) -> Step:
        if run.failed:
            run = replace(run, generation=run.generation - 1)
        return real(run, *arguments)

    patch.setattr(membership, "_form", form)


def all_who_have_not_formed_are_blamed(patch: pytest.MonkeyPatch) -> None:
    real = membership._tick

    def tick(run: Run, now_s: float) -> Step:
        if run.phase is Phase.FORMING and run.deadline_s is not None and now_s >= run.deadline_s - 10:
            silent = [worker for worker in membership.crew(run) if worker not in run.done]
            return membership.lose(run, silent, "they did not form", None, now_s)
        return real(run, now_s)

    patch.setattr(membership, "_tick", tick)


def newcomers_that_do_not_start_end_a_run_that_trains(patch: pytest.MonkeyPatch) -> None:
    real = membership._misstarted

    def misstarted(run: Run, count: int, reason: str, now_s: float) -> Run:
        run = real(run, count, reason, now_s)
        return run if run.phase in BETWEEN else replace(run, failure=Failure(message=reason))

    patch.setattr(membership, "_misstarted", misstarted)


def anybody_may_be_the_source(patch: pytest.MonkeyPatch) -> None:
    def sources(run: Run) -> dict[int, int] | None:
        if run.settlement is None or not membership.able(run):
            return None
        return {worker % run.size: worker for worker in workers_of(membership.able(run)[-1], run.size)}

    patch.setattr(membership, "_sources", sources)


def one_error_on_two_ranks_counts_twice(patch: pytest.MonkeyPatch) -> None:
    real = membership._erred

    def erred(run: Run, failure: Failure) -> Run:
        return real(replace(run, errors=dict.fromkeys(run.errors, -1)), failure)

    patch.setattr(membership, "_erred", erred)


def a_run_is_finished_when_anybody_is(patch: pytest.MonkeyPatch) -> None:
    real = membership._left

    def left(run: Run, event: Left, now_s: float) -> Step:
        if event.is_end and run.members:
            run = replace(run, done=frozenset(run.members), ended=frozenset(run.members[:1]))
            return membership._gather(run, now_s)
        return real(run, event, now_s)

    patch.setattr(membership, "_left", left)


def nothing_is_ever_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "trim", lambda run, reason: (run, []))


def nothing_is_asked_for_once_it_has_trained(patch: pytest.MonkeyPatch) -> None:
    real = membership.fill
    patch.setattr(membership, "fill", lambda run, now_s: (run, []) if run.has_trained else real(run, now_s))


def who_comes_back_takes_all_for_at_work(patch: pytest.MonkeyPatch) -> None:
    real = controller.adopt

    def adopt(run: Run, past: Past, *, words: dict[int, Word], **more: Any) -> Step:
        if past.form is not None:
            generation = past.form.generation
            words = {w: replace(word, at=At.JOINED, generation=generation) for w, word in words.items()}
        return real(run, past, words=words, **more)

    patch.setattr(controller, "adopt", adopt)


def the_abort_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = membership._settling

    def settling(*arguments: Any, **more: Any) -> Step:
        run, _ = real(*arguments, **more)
        return run, list[Command]()

    patch.setattr(membership, "_settling", settling)


def newcomers_are_members_before_they_are_ready(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "able", replicas.staying)


def all_go_back_to_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    real = membership._form

    def form(run: Run, numbers: Any, sources: dict[int, int] | None, now_s: float) -> Step:
        run, (order,) = real(run, numbers, sources, now_s)
        assert isinstance(order, Form)
        return run, [replace(order, settlement=None, sources=None) if run.failed else order]

    patch.setattr(membership, "_form", form)


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    settle_takes_the_oldest,
    nobody_rolls_forward,
    old_generations_count,
    the_replica_of_a_dead_worker_stays,
    what_leavers_hold_is_dropped,
    leavers_are_released_before_the_others_have_formed,
    settling_has_no_deadline,
    a_generation_is_formed_again_under_its_number,
    all_who_have_not_formed_are_blamed,
    newcomers_that_do_not_start_end_a_run_that_trains,
    anybody_may_be_the_source,
    one_error_on_two_ranks_counts_twice,
    a_run_is_finished_when_anybody_is,
    nothing_is_ever_given_back,
    nothing_is_asked_for_once_it_has_trained,
    who_comes_back_takes_all_for_at_work,
    the_abort_is_forgotten,
    newcomers_are_members_before_they_are_ready,
    all_go_back_to_the_checkpoint,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    mistake(monkeypatch)
    for seed in range(400):
        try:
            drive.drive(seed)
        except Broken:
            return
    pytest.fail("400 lives went by, and nothing was found")


def test_what_is_found_comes_with_the_command_that_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    nobody_rolls_forward(monkeypatch)
    seed = next(seed for seed in range(400) if drive.main(["--first", str(seed), "--seeds", "1"]))
    assert f"replay it: python -m lepton_ray.sim.drive --seed {seed}\n" in capsys.readouterr().out
    assert drive.main(["--seed", str(seed)]) == 1
