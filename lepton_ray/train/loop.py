"""The training loop of one worker: steps, evaluations, checkpoints, reports and callbacks, in step order.

What leaves this process (records, checkpoints, callbacks) is stable: a step's record goes out after the ballot of the
next step, or after a closing ballot, because only then has every worker applied it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lepton_ray.callbacks import Callback, RunView
from lepton_ray.data.datasets import qualified_name
from lepton_ray.data.feed import Feed, StreamFeed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import RunFailed
from lepton_ray.plan.batch import own
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint import Checkpointer
from lepton_ray.train.checkpoint_format import File, load, load_own, newest
from lepton_ray.train.own_files import write_files
from lepton_ray.train.parts import Parts
from lepton_ray.train.peers import Peers
from lepton_ray.train.reduce import sum_of
from lepton_ray.train.spec import TrainSpec
from lepton_ray.train.step import Committed, vote
from lepton_ray.train.weights import write_weights

Report = Callable[..., None]
"""(event name, **fields): hand a record to the journal; returns at once."""

WRITE_OUT_S = 8.0
"""How long a run that failed waits for a checkpoint that is being written."""
LAST_WRITE_S = 600.0
"""How long a run waits for its last checkpoint."""
SPEED_WINDOW_S = 2.0
"""Samples per second are measured over at least so long, or since the last record that carried them."""


@dataclass(slots=True)
class _Epoch:
    """Running sums of an epoch's training loss, and what was measured on the test data in it."""

    loss_sum: float = 0.0
    weight: float = 0.0
    tested: dict[str, float] = field(default_factory=dict)

    def add(self, committed: Committed) -> None:
        self.loss_sum += committed.loss_sum
        self.weight += committed.weight

    @property
    def loss(self) -> float:
        return self.loss_sum / self.weight if self.weight else 0.0


@dataclass(slots=True)
class _Speed:
    """Samples per second, as a figure that does not jump with every step."""

    since_s: float = field(default_factory=time.perf_counter)
    samples: int = 0
    value: float = 0.0

    def add(self, samples: int) -> float:
        self.samples += samples
        elapsed_s = time.perf_counter() - self.since_s
        if elapsed_s >= SPEED_WINDOW_S or not self.value:
            self.value = round(self.samples / max(elapsed_s, 1e-9), 1)
        if elapsed_s >= SPEED_WINDOW_S:
            self.since_s, self.samples = time.perf_counter(), 0
        return self.value


class Loop:
    """Trains one copy of the model together with the other workers."""

    def __init__(
        self,
        spec: TrainSpec,
        parts: Parts,
        *,
        feed: Feed | StreamFeed,
        test_source: Source | Stream | None,
        peers: Peers,
        generation: int,
        report: Report,
        record: Callable[[int], None],
        wish: Callable[[], bool],
    ) -> None:
        """record: returns when what all workers reported of the steps before one is on record for good.

        wish: whether somebody asked this worker to stop; read at every ballot.
        """
        self._spec, self._parts, self._peers, self._generation = spec, parts, peers, generation
        self._test_source, self._report, self._record_to, self._wish = test_source, report, record, wish
        self._feed, self._stepper = feed, parts.stepper
        self._owned = own(spec.batch.microbatches or peers.world, [1.0] * peers.world)[peers.rank]
        self._folder = Folder(spec.run_url)
        self._is_first = peers.rank == 0
        self._checkpointer = self._make_checkpointer() if self._is_first else None
        self.step = 0
        """Steps done."""
        self._epoch = 0
        self._sums = _Epoch()
        self._speed = _Speed()
        self._done: deque[tuple[int, int, float]] = deque()
        """Step, epoch and learning rate of what is done here, but not yet committed by all."""
        self._pending: deque[dict[str, Any]] = deque()
        """Records of what is committed, but perhaps not yet applied by all."""
        self._metrics: dict[str, float] = {}
        """The last of each."""
        self._measured: dict[str, float] = {}
        """What was measured of the weights as they are now."""
        self._saved_step = -1
        self._validated_step = -1
        self._saved: deque[dict[str, Any]] = deque()
        self._stop_reason: str | None = None
        """Why a callback wishes to stop."""
        self._has_stopped = False
        """An earlier life of the run agreed to that wish, and died before it had ended."""
        self._view = RunView(name=spec.name, path=spec.run_url, stop=self._ask_to_stop)

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the end or to an agreed stop."""
        try:
            self._train()
        except BaseException:
            if self._checkpointer is not None:
                with suppress(Exception):  # the first error is the one to tell
                    self._checkpointer.close(WRITE_OUT_S)
            raise

    def _train(self) -> None:
        self._resume()
        self._parts.model.train(True)
        end = self._total_steps()
        stop, has_room = self._has_stopped, False
        while not stop and (end is None or self.step < end) and not self._is_over():
            stop = self._one_step()
            if self._checkpointer and not has_room:
                # The optimizer has its state now: the next checkpoint finds memory of the right size.
                self._checkpointer.prepare(*self._parts.state())
                has_room = True
        self._settle()
        self._finish(stop)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _total_steps(self) -> int | None:
        """Count the steps of the whole run; None when only the end of a stream tells."""
        if self._spec.steps is not None:
            return self._spec.steps
        per_epoch = self._feed.steps_per_epoch
        return None if per_epoch is None else per_epoch * (self._spec.epochs or 1)

    def _is_over(self) -> bool:
        return self._spec.steps is None and self._epoch >= (self._spec.epochs or 1)

    def _one_step(self) -> bool:
        """Do one step and what is due after it; return whether the run is to stop."""
        plan = self._feed.plan(self.step)
        committed = self._stepper.run(self.step, plan, self._owned, self._wishes())
        self._publish()
        self._done.append((self.step, self._epoch, self._parts.schedulers.rate()))
        self._commit(committed)
        self._report("work", step=self.step, first=self._owned.start, sizes=[plan.sizes[m] for m in self._owned])
        self._parts.schedulers.after_step()
        self.step += 1
        self._measured = {}
        stop = any(each.stop for each in committed)
        if self._is_due(self._spec.validate_every, plan.is_epoch_end):
            self._settle()
            self._validate()
        if plan.is_epoch_end:
            stop |= self._end_epoch()
        limits = self._spec.checkpoints
        has_best = limits.best is not None and limits.best in self._measured
        if has_best or self._is_due(limits.every_steps, plan.is_epoch_end):
            self._settle()
            self._save(stop)
        return stop

    def _is_due(self, every: int | None, is_epoch_end: bool) -> bool:
        return is_epoch_end if every is None else self.step % every == 0

    def _commit(self, committed: list[Committed]) -> None:
        """Take in what all workers agreed on about the first of the steps that are done."""
        samples_per_s = self._speed.add(sum(each.samples for each in committed)) if committed else 0.0
        for each in committed:
            self._sums.add(each)
            step, epoch, rate = self._done.popleft()
            record = {
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
            self._pending.append(record)

    def _settle(self) -> bool:
        """Hold a closing ballot: all steps are stable. Return whether anybody wishes to stop."""
        self._commit(self._stepper.settle())
        stop = vote(self._peers, [self._wishes()])[0] > 0
        self._publish()
        return stop

    def _publish(self) -> None:
        """Hand out the records of committed steps, which are stable now."""
        while self._pending:
            record = self._pending.popleft()
            if self._is_first:
                self._report("step", **record)
                self._call("on_step", record)
        self._tell_saved()

    def _tell_saved(self) -> None:
        while self._saved:
            self._call("on_checkpoint", self._saved.popleft())

    # --- epochs, evaluation ------------------------------------------------------------------------------------------

    def _end_epoch(self) -> bool:
        """Evaluate, report and call back at the end of an epoch; return whether anybody wishes to stop now."""
        self._settle()
        found = {"train_loss": self._sums.loss, **self._sums.tested}
        self._note(found)
        self._parts.schedulers.after_epoch(found.get("train_loss" if self._test_source is None else "test_loss"))
        if self._is_first:
            record = {"epoch": self._epoch, "step": self.step, "samples_per_s": self._speed.value, **found}
            self._report("epoch", **record)
            self._call("on_epoch", record)
        self._epoch, self._sums = self._epoch + 1, _Epoch()
        return self._settle()

    def _validate(self) -> None:
        """Evaluate on the test data; every worker gets the same numbers."""
        if self._test_source is None or self._validated_step == self.step:
            return
        self._validated_step = self.step
        found = {f"test_{name}": value for name, value in self._parts.evaluate(self._test_source).items()}
        best = self._spec.checkpoints.best
        if self._is_first and best not in (None, "train_loss", *found) and "test_loss" not in self._metrics:
            names = ", ".join(["train_loss", *found])
            self._report("note", text=f"Checkpoints(best={best!r}) keeps nothing: what is measured is {names}.")
        self._sums.tested = found
        self._note(found)
        if self._is_first:
            self._report("validated", step=self.step, epoch=self._epoch, **self._metrics)

    def _note(self, found: dict[str, float]) -> None:
        """Take in what was measured at this step."""
        self._measured |= found
        self._metrics |= found

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _make_checkpointer(self) -> Checkpointer:
        limits = self._spec.checkpoints
        return Checkpointer(
            self._folder.sub("checkpoints"),
            keep=limits.keep,
            best=limits.best,
            best_mode=limits.best_mode,
            on_event=self._on_checkpoint_event,
            # Nobody may wait for rank 0 for so long that it is given up.
            write_timeout_s=LAST_WRITE_S if self._peers.world == 1 else self._spec.patience_s / 2,
        )

    def _on_checkpoint_event(self, kind: str, **fields: Any) -> None:
        """Take news from the thread that writes; callbacks hear of it in the training thread."""
        self._report(kind, **fields)
        if kind == "checkpoint_saved":
            self._saved.append(fields)

    def _save(self, stop: bool = False) -> None:
        """Copy the state after a settled step; it is written in the background.

        It counts as saved when the work that made it is on record: the receipt must survive whatever the model does.
        stop: the workers agreed to stop here. Raises RunFailed, on all workers, for weights that are inf or nan.
        """
        if self._saved_step == self.step:
            return
        is_broken = not math.isfinite(sum_of(self._parts.model.parameters().values()))
        if self._spec.sync.is_local:
            is_broken = vote(self._peers, [is_broken])[0] > 0  # of any worker
        if is_broken:
            raise RunFailed(
                f"some weights are inf or nan after {self.step} steps. Lower the learning rate; the last checkpoint is "
                "from before it."
            )
        self._saved_step = self.step
        beside = self._save_own() if self._spec.sync.is_local else ()
        if beside is None:
            self._saved_step = -1
        if self._checkpointer is None:
            return
        tensors, state = self._parts.state()
        state |= {
            "epoch": self._epoch,
            "epoch_sums": asdict(self._sums),
            "metrics": self._metrics,
            "measured": self._measured,
            "callbacks": [[qualified_name(callback), callback.state_dict()] for callback in self._parts.callbacks],
            "stop_reason": self._stop_reason,
            "has_stopped": stop and self._stop_reason is not None,
        }
        step = self.step
        with self._parts.shared():
            is_saved = self._checkpointer.save(
                step,
                tensors,
                state,
                generation=self._generation,
                after=lambda: self._record_to(step),
                beside=beside,
            )
        if not is_saved and not self._spec.sync.is_local:  # where all save together, all must try again, or nobody
            self._saved_step = -1

    def _save_own(self) -> list[File] | None:
        """Let the other workers write what only they hold."""
        is_ready = self._checkpointer is None or self._checkpointer.is_idle()
        folder = self._folder.sub("checkpoints")
        return write_files(folder, self.step, self._parts.own_state, self._peers, is_ready=is_ready)

    def _resume(self) -> None:
        """Load the newest valid checkpoint, the one that rank 0 chooses; without one, agree on the first weights."""
        # All look, since all would wait for one that does: it reads the checkpoint to the end.
        found, problems = newest(self._folder.sub("checkpoints"))
        step = int(vote(self._peers, [found.step + 1 if found and self._is_first else 0])[0]) - 1
        for problem in problems if self._is_first else ():
            self._report("checkpoint_refused", reason=problem)
        if step < 0:
            for tensor in self._parts.model.state().values():
                shared = tensor.contiguous()
                self._peers.broadcast(shared)
                tensor.copy_(shared)
            self._parts.begin()
            if self._is_first:
                self._report("started", step=0)
            self._save()
            return
        tensors, state = load(self._folder.sub("checkpoints"), step)
        if self._spec.sync.is_local and not self._is_first:
            state |= load_own(self._folder.sub("checkpoints"), step, self._peers.rank)
        self._parts.load(tensors, state)
        self.step, self._epoch, self._metrics = step, state["epoch"], state["metrics"]
        self._sums = _Epoch(**state["epoch_sums"])
        self._saved_step = step
        self._stop_reason, self._has_stopped = state["stop_reason"], state["has_stopped"]
        self._load_callbacks(state["callbacks"])
        self._feed.seek(step)
        if self._is_first:
            self._report("resumed", step=step, epoch=self._epoch)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, stopped: bool) -> None:
        """Evaluate, save, check that all workers hold the same model, and report the end."""
        is_complete = not stopped or vote(self._peers, [self._stop_reason is not None])[0] > 0
        if self._sums.weight:
            self._note({"train_loss": self._sums.loss})
        if is_complete:
            if self._parts.finalize():  # these are other weights than those that were measured and saved
                self._validated_step, self._saved_step, self._measured = -1, -1, {}
            self._validate()
        with self._parts.shared():
            digest = weights_digest(self._parts.model.state())
        self._compare(digest)
        if self._checkpointer is not None and not self._spec.sync.is_local:
            self._checkpointer.write_timeout_s = LAST_WRITE_S  # nobody waits for this rank any more
        self._save(stopped)
        if self._checkpointer is None:
            return
        self._checkpointer.close(LAST_WRITE_S)
        self._tell_saved()
        end = {"step": self.step, "epoch": self._epoch, "metrics": self._metrics, "sha256": digest}
        if is_complete:
            write_weights(self._folder, self._parts.model.state())
            self._call("on_end", end)
        self._report("trained", complete=is_complete, reason=self._stop_reason, **end)

    def _compare(self, digest: str) -> None:
        """Refuse to end with workers whose models differ."""
        digests = torch.zeros(self._peers.world, dtype=torch.float64)
        digests[self._peers.rank] = int(digest[:12], 16)
        self._peers.allreduce(digests)
        if (digests != digests[0]).any():
            odd = torch.nonzero(digests != digests[0]).flatten().tolist()
            raise RunFailed(f"the models of ranks {odd} differ from that of rank 0 after step {self.step}.")

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def _ask_to_stop(self, reason: str) -> None:
        self._stop_reason = reason

    def _wishes(self) -> bool:
        return self._stop_reason is not None or self._wish()

    def _load_callbacks(self, saved: list[list[Any]]) -> None:
        """Give each callback the state of the first one of its class that is left; callbacks may come and go."""
        waiting = list(saved)
        for callback in self._parts.callbacks:
            found = next((pair for pair in waiting if pair[0] == qualified_name(callback)), None)
            if found is not None:
                waiting.remove(found)
                callback.load_state_dict(found[1])

    def _call(self, hook: str, record: dict[str, Any]) -> None:
        self._view.step, self._view.epoch = self.step, self._epoch
        callback: Callback
        for callback in self._parts.callbacks:
            getattr(callback, hook)(self._view, record)


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over names, shapes, types and bytes of a model's tensors, in order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
