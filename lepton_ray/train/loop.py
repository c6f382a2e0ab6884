"""The training of one worker, as a sequence of transactions that all workers commit together, or not at all.

A transaction is computed together with the others, so that it can be undone; it is agreed on in a ballot, one small
all-reduce which a worker joins when all its other sums of the transaction have returned; then each worker commits it by
itself. So workers that are torn apart differ by one transaction at most, and those that are behind hold every sum of it
(`plan.recover` settles where they go on). What leaves the process does so after a later ballot: see `train.outbox`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lepton_ray.data.feed import Feed, StreamFeed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import RunFailed
from lepton_ray.plan.batch import own
from lepton_ray.plan.recover import Position
from lepton_ray.train.ballot import Ballots, vote
from lepton_ray.train.local_step import LocalStepper
from lepton_ray.train.mirror import Mirrors
from lepton_ray.train.outbox import Outbox, Report
from lepton_ray.train.own_files import File
from lepton_ray.train.parts import Parts
from lepton_ray.train.peers import Peers
from lepton_ray.train.pulse import PULSE
from lepton_ray.train.reduce import sum_of
from lepton_ray.train.saver import Saver
from lepton_ray.train.spec import TrainSpec
from lepton_ray.train.speed import Speed
from lepton_ray.train.state import Kind, TrainState
from lepton_ray.train.step import Committed, Stepping
from lepton_ray.train.weights import weights_digest


class Loop:
    """Trains one copy of the model together with the other workers of a generation; it outlives generations."""

    def __init__(
        self,
        spec: TrainSpec,
        parts: Parts,
        *,
        feed: Feed | StreamFeed,
        test_source: Source | Stream | None,
        report: Report,
        record: Callable[[int], None],
        wish: Callable[[], bool],
        pause: Callable[[], bool],
    ) -> None:
        """record: see `Saver`. wish, pause: whether somebody asked this worker to stop, or to pause; for ballots."""
        self._spec, self._parts, self._feed, self._test_source = spec, parts, feed, test_source
        self._wish, self._pause = wish, pause
        self.state = TrainState()
        self._outbox = Outbox(report, parts.callbacks, spec.name, spec.run_url)
        self._saver = Saver(spec, parts, self.state, self._outbox, record)
        self._speed = Speed()
        self._generation = 0
        self._owned = range(0)
        self._done: deque[tuple[int, int, float]] = deque()
        """Step, epoch and learning rate of what is done here, but that no ballot has told of (local steps)."""
        # The transaction that is open, and what is known of it.
        self._open: Kind | None = None
        self._is_reduced = False
        self._ballot: tuple[float, ...] = ()
        self._found: Any = None
        self._voted = b""
        """The callbacks' memory that this worker's last ballot told the length of."""
        self._covered = 0
        """Records that the memory holds which is being told."""
        self._has_begun = False
        self._since_step = 0
        self._is_spoiled = True
        """The state is none that could be given to others, or gone on from."""

    # --- generations -------------------------------------------------------------------------------------------------

    def join(
        self,
        peers: Peers,
        everybody: Peers,
        generation: int,
        *,
        is_fresh: bool,
        since_step: int,
        mirrors: Mirrors | None,
    ) -> None:
        """Take a place in a generation; the stepper is bound to it.

        peers: workers with the same part of the model, one of each replica. everybody: all workers; they hold the
        ballots. is_fresh: nobody holds the state of the training, so all load it, or begin. since_step: the first step
        that the journal has no record of. mirrors: see `Saver.join`.
        """
        self._peers, self._everybody = peers, everybody
        self._ballots = Ballots(everybody, self._spec.size, self._spec.coordinate)
        self._generation, self._since_step = generation, since_step
        self._owned = own(self._spec.batch.microbatches or peers.world, [1.0] * peers.world)[peers.rank]
        is_first = everybody.rank == 0
        if is_first and not self._outbox.is_first and not is_fresh:
            self._outbox.take_over()
        self._outbox.is_first = is_first
        self._saver.join(peers, self._ballots, mirrors)
        self._parts.model.train(True)
        if not is_fresh:
            self._outbox.publish_again(since_step)
            return
        self._is_spoiled = True
        self._done.clear()
        if self._saver.resume(generation):
            self._feed.seek(self.state.step)
        else:
            if self._has_begun:
                self._parts.restart()
                self.state.load(TrainState().plain())
            for tensor in self._parts.model.state().values():
                shared = tensor.contiguous()
                peers.broadcast(shared)
                tensor.copy_(shared)
            self._parts.begin()
            self.state.todo = [Kind.SAVE]
            self._outbox.now("started", step=0, generation=generation)
        self._outbox.rewind(self.state.step)
        self._has_begun, self._is_spoiled = True, False

    def position(self) -> Position | None:
        """Say where this worker stands; None when its state is of no use to go on from."""
        if self._is_spoiled or self._spec.sync.is_local:
            return None
        is_reduced = self._open is not None and self._is_reduced
        return Position(committed=self.state.committed, is_reduced=is_reduced, ballot=self._ballot)

    def settle(self, ballot: Sequence[float] | None) -> None:
        """Close the transaction that was open when the generation ended. ballot: it is committed with that."""
        kind, self._open = self._open, None
        if self._spec.sync.is_local:
            return  # all begin from a checkpoint
        if ballot is not None:
            assert kind is not None
            self._commit(kind, ballot)
        elif kind is Kind.STEP:
            self._is_spoiled = True
            self._stepper.discard()
            self._is_spoiled = False

    def copy_out(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what a newcomer needs: the live tensors of the model, and the rest as a tree."""
        tensors, state = self._parts.state()
        outbox = self._outbox
        beside = {"callbacks": list(outbox.memory()), "tail": outbox.tail(self._since_step)}
        return tensors, {**state, "loop": self.state.plain(), **beside}

    def room(self) -> dict[str, torch.Tensor]:
        """Return the live tensors of the model, for another worker's to be written into: ours are worth nothing."""
        self._is_spoiled = True
        return self._parts.model.state()

    def copy_in(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take over the state of another worker."""
        self._is_spoiled = True
        self._parts.load(tensors, state)
        self.state.load(state["loop"])
        self._outbox.remember(bytes(state["callbacks"]))
        self._outbox.load_tail(state["tail"])
        self._outbox.publish_again(self._since_step)
        self._feed.seek(self.state.step)
        self._has_begun, self._is_spoiled = True, False

    def close(self) -> None:
        """End what goes on in the background."""
        self._saver.give_up()

    # --- transactions ------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train; return whether that has come to its end, or to an agreed stop, rather than to a pause."""
        # Stable, as all have formed with it. A stop that it leads to must not come later than in a calm run.
        self._outbox.publish(self.state.step, self.state.epoch)
        with PULSE.expected():
            while True:
                kind = self._next()
                if self._transact(kind) or kind is Kind.END:
                    return kind is Kind.END

    def _next(self) -> Kind:
        """Return what is to be done next."""
        state = self.state
        if state.untold:
            return Kind.TELL
        if not state.todo:
            if not state.is_stopping and not self._is_over():
                return Kind.STEP
            # A stop for another reason than a callback's wish is to be gone on from.
            complete = [Kind.FINALIZE, Kind.VALIDATE] if state.is_done or not state.is_stopping else []
            state.todo = [*complete, Kind.COMPARE, Kind.SAVE, Kind.END]
        return state.todo[0]

    def _is_over(self) -> bool:
        """Tell whether all steps are done; of a stream only its end tells."""
        if self._spec.steps is not None:
            return self.state.step >= self._spec.steps
        return self.state.epoch >= (self._spec.epochs or 1)

    def _transact(self, kind: Kind) -> bool:
        """Do a transaction with all workers; return whether some of them was asked to pause after it."""
        PULSE.beat()
        self._open, self._is_reduced = kind, False
        if kind is Kind.STEP and isinstance(self._parts.stepper, LocalStepper):
            return self._local_step(self._parts.stepper)
        numbers: list[float] | None = self._compute(kind)
        while numbers is not None:
            self._voted = self._outbox.vote()
            untold = len(self._voted) if self._everybody.world > 1 else 0
            head = [self._wish(), self._outbox.stop_reason is not None, self._pause(), untold]
            self._is_reduced = True
            ballot = self._ballots.hold(head, numbers)
            if kind is not Kind.STEP:
                break
            numbers = self._ballots.again(numbers, self._stepper.again(self._ballots.own(ballot)))
        self._ballot = tuple(ballot)
        self._outbox.publish(self.state.step, self.state.epoch)
        self._open = None
        self._commit(kind, ballot)
        return ballot[2] > 0

    def _commit(self, kind: Kind, ballot: Sequence[float]) -> None:
        """Make a transaction so, which cannot be undone from here on."""
        state = self.state
        self._is_spoiled = True
        state.committed += 1
        state.is_stopping |= ballot[0] + ballot[1] > 0
        state.is_done |= ballot[1] > 0
        if kind is not Kind.TELL:
            state.untold, self._covered = int(ballot[3]), self._outbox.covered
        if kind is Kind.TELL or not state.untold:
            state.untold = 0
            self._outbox.agreed(self._covered)
        if kind not in (Kind.STEP, Kind.TELL):
            assert state.todo[0] is kind
            state.todo = state.todo[1:]
        match kind:
            case Kind.STEP:
                self._after_step(self._stepper.commit(self._ballots.own(ballot)))
            case Kind.VALIDATE:
                self._validated(self._found)
            case Kind.EPOCH:
                self._end_epoch()
            case Kind.TELL:
                if not self._outbox.is_first:
                    self._outbox.remember(self._found)
                self._outbox.told = self._found
            case Kind.SAVE:
                self._saver.save(self._generation, self._found)
            case Kind.MIRROR:
                if not sum(ballot[Ballots.HEAD :]):
                    self._saver.mirror(self._generation)
            case Kind.FINALIZE:
                self._finalized()
            case Kind.COMPARE:
                self._compared(self._ballots.own(ballot))
            case Kind.END:
                with PULSE.expected(False):  # the last checkpoint is written
                    self._ended()
        self._found = None
        self._is_spoiled = False

    def _compute(self, kind: Kind) -> list[float]:
        """Do what a transaction needs the others for; return this worker's numbers for the ballot."""
        if isinstance(self._parts.stepper, LocalStepper):
            self._take(self._parts.stepper.settle())
        match kind:
            case Kind.STEP:
                return self._stepper.compute(self.state.step, self._feed.plan(self.state.step), self._owned)
            case Kind.VALIDATE:
                self._found = self._evaluate()
            case Kind.TELL:
                self._found = self._tell()
            case Kind.SAVE:
                self._found = self._prepare_save()
            case Kind.FINALIZE if self._spec.sync.is_local:
                self._found = self._parts.finalize()
            case Kind.COMPARE:
                return self._digest_number()
            case Kind.MIRROR:
                return [float(self._saver.is_mirror_busy())]
        return []

    @property
    def _stepper(self) -> Stepping:
        """Return what does steps that all workers commit together."""
        assert not isinstance(self._parts.stepper, LocalStepper)
        return self._parts.stepper

    # --- steps -------------------------------------------------------------------------------------------------------

    def _local_step(self, stepper: LocalStepper) -> bool:
        """Do a step that needs no ballot."""
        plan = self._feed.plan(self.state.step)
        wishes = self._wish() or self._outbox.stop_reason is not None
        committed = stepper.run(self.state.step, plan, self._owned, wishes)
        self._outbox.publish(self.state.step, self.state.epoch)
        self._open, self._is_spoiled = None, True
        self.state.committed += 1
        self._after_step(committed)
        if any(each.stop for each in committed):  # the next ballot tells why
            self.state.is_stopping = True
            self.state.todo.append(Kind.SETTLE)
        self._is_spoiled = False
        return False

    def _after_step(self, committed: list[Committed]) -> None:
        """Take in a step, and see what is due after it."""
        state, limits = self.state, self._spec.checkpoints
        is_epoch_end = self._feed.plan(state.step).is_epoch_end
        self._done.append((state.step, state.epoch, self._parts.schedulers.rate()))
        self._take(committed)
        self._parts.schedulers.after_step()
        state.step += 1
        state.measured = {}
        if self._test_source is not None and self._is_due(self._spec.validate_every, is_epoch_end):
            state.todo.append(Kind.VALIDATE)
        if is_epoch_end:
            # Callbacks hear of the epoch after one ballot, and are heard in the next.
            state.todo += [Kind.EPOCH, Kind.SETTLE, Kind.SETTLE]
        if self._is_due(limits.every_steps, is_epoch_end):
            state.todo.append(Kind.SAVE)
        if self._saver.is_mirror_due():
            state.todo.append(Kind.MIRROR)
        self._saver.make_room()

    def _is_due(self, every: int | None, is_epoch_end: bool) -> bool:
        return is_epoch_end if every is None else self.state.step % every == 0

    def _take(self, committed: list[Committed]) -> None:
        """Take in what all workers agreed on about the first of the steps that are done."""
        samples_per_s = self._speed.add(sum(each.samples for each in committed)) if committed else 0.0
        for each in committed:
            self.state.loss_sum += each.loss_sum
            self.state.weight += each.weight
            step, epoch, rate = self._done.popleft()
            record: dict[str, Any] = {
                "step": step,
                "epoch": epoch,
                "train_loss": each.loss,
                "lr": rate,
                "samples_per_s": samples_per_s,
                **each.extra,
            }
            if each.grad_norm is not None:
                record["grad_norm"] = each.grad_norm
            if each.is_skipped:
                record["skipped"] = True
            half = len(each.work) // 2
            record["work"] = [[int(n), int(digest)] for n, digest in zip(each.work[:half], each.work[half:])]
            self._outbox.put("step", {**record, "generation": self._generation})

    # --- epochs and evaluations --------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        state = self.state
        found = {"train_loss": state.loss, **state.tested}
        state.note(found)
        self._parts.schedulers.after_epoch(found.get("train_loss" if self._test_source is None else "test_loss"))
        record = {"epoch": state.epoch, "step": state.step, "samples_per_s": self._speed.value, **found}
        self._outbox.put("epoch", {**record, "generation": self._generation})
        state.epoch, state.loss_sum, state.weight, state.tested = state.epoch + 1, 0.0, 0.0, {}
        self._save_best()

    def _save_best(self) -> None:
        """Save where the metric was measured that decides about the best checkpoint."""
        if self._spec.checkpoints.best in self.state.measured and Kind.SAVE not in self.state.todo:
            self.state.todo.append(Kind.SAVE)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate on the test data, unless these weights have been; every worker gets the same numbers."""
        if self._test_source is None or self.state.validated_step == self.state.step:
            return {}
        return {f"test_{name}": value for name, value in self._parts.evaluate(self._test_source).items()}

    def _validated(self, found: dict[str, float]) -> None:
        state, best = self.state, self._spec.checkpoints.best
        if found:
            if best not in (None, "train_loss", *found) and "test_loss" not in state.metrics:
                names = ", ".join(["train_loss", *found])
                self._outbox.now("note", text=f"Checkpoints(best={best!r}) keeps nothing: what is measured is {names}.")
            state.validated_step = state.step
            state.tested = found
            state.note(found)
            record = {"step": state.step, "epoch": state.epoch, **state.metrics}
            self._outbox.put("validated", {**record, "generation": self._generation})
            self._save_best()

    def _tell(self) -> bytes:
        """Return what the callbacks of rank 0 remembered at the last ballot."""
        own = self._voted if self._outbox.is_first else bytes(self.state.untold)
        told = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self._everybody.broadcast(told)
        return told.numpy().tobytes()

    # --- checkpoints and the end -------------------------------------------------------------------------------------

    def _prepare_save(self) -> list[File] | None:
        """Refuse weights that are inf or nan, on all workers; write what only the others hold. Raises RunFailed."""
        is_broken = not math.isfinite(sum_of(self._parts.model.parameters().values()))
        if self._spec.sync.is_local:
            is_broken = vote(self._peers, [is_broken])[0] > 0  # of any worker
        if is_broken:
            raise RunFailed(
                f"some weights are inf or nan after {self.state.step} steps. Lower the learning rate; the last "
                "checkpoint is from before it."
            )
        return self._saver.save_own(self._peers) if self._spec.sync.is_local else None

    def _finalized(self) -> None:
        is_changed = self._found if self._spec.sync.is_local else self._parts.finalize()
        if is_changed:  # these are other weights than those that were measured and saved
            self.state.validated_step, self.state.measured = -1, {}
            self._saver.forget()

    def _digest_number(self) -> list[float]:
        """Return a number for each worker, of which this one's tells its weights."""
        with self._parts.shared():
            self._found = weights_digest(self._parts.model.state())
        return [float(int(self._found[:12], 16)) if r == self._peers.rank else 0.0 for r in range(self._peers.world)]

    def _compared(self, numbers: Sequence[float]) -> None:
        """Refuse to end with workers whose models differ."""
        odd = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
        if odd:
            raise RunFailed(f"the models of ranks {odd} differ from that of rank 0 after step {self.state.step}.")
        if self.state.weight:
            self.state.note({"train_loss": self.state.loss})
        self.state.digest = self._found

    def _ended(self) -> None:
        """Write what the run leaves, and report its end."""
        state = self.state
        is_complete = state.is_done or not state.is_stopping
        self._saver.finish(self._generation, is_complete)
        self._outbox.publish(state.step, state.epoch)
        end = {"step": state.step, "epoch": state.epoch, "metrics": state.metrics, "sha256": state.digest}
        if is_complete and self._outbox.is_first:
            self._outbox.call("on_end", end)
        reason = self._outbox.stop_reason
        self._outbox.now("trained", complete=is_complete, reason=reason, generation=self._generation, **end)
