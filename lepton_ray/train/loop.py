"""The training loop of one worker: steps, evaluations, checkpoints, reports and callbacks, in step order.

What leaves this process (records, checkpoints, callbacks) is stable: a step's record goes out after the ballot of the
next step, or after a closing ballot, because only then has every worker applied it.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from lepton_ray.callbacks import Callback, RunView
from lepton_ray.data.feed import Feed, StreamFeed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import RunFailed
from lepton_ray.plan.batch import own
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint import Checkpointer
from lepton_ray.train.checkpoint_format import load, newest
from lepton_ray.train.evaluate import evaluate
from lepton_ray.train.parts import Parts
from lepton_ray.train.peers import Peers
from lepton_ray.train.spec import TrainSpec
from lepton_ray.train.step import Committed, vote
from lepton_ray.train.weights import write_weights

Report = Callable[..., None]
"""(event name, **fields): hand a record to the journal; returns at once."""

WRITE_OUT_S = 8.0
"""How long a run that failed waits for a checkpoint that is being written."""
SPEED_WINDOW_S = 2.0
"""Samples per second are measured over at least so long, or since the last record that carried them."""


@dataclass(slots=True)
class _Epoch:
    """Running sums of an epoch's training loss."""

    loss_sum: float = 0.0
    weight: float = 0.0

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
        self._pending: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
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
        total = self._total_steps()
        stop, has_room = self._has_stopped, False
        while not stop and (total is None or self.step < total) and not self._is_over():
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
        self._sums.add(committed)
        self._pending = self._record(committed)
        self._report("work", step=self.step, first=self._owned.start, sizes=[plan.sizes[m] for m in self._owned])
        self._parts.schedulers.after_step()
        self.step += 1
        stop = committed.stop
        if plan.is_epoch_end:
            stop |= self._end_epoch()
            self._epoch += 1
        if self._is_due(self._spec.validate_every):
            self._settle()
            self._validate()
        every = self._spec.checkpoints.every_steps
        if self._is_due(every) or (every is None and plan.is_epoch_end):
            self._settle()
            self._save(stop)
        return stop

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _record(self, committed: Committed) -> dict[str, Any]:
        record = {
            "step": self.step,
            "epoch": self._epoch,
            "train_loss": committed.loss,
            "lr": self._parts.schedulers.rate(),
            "samples_per_s": self._speed.add(committed.samples),
            **committed.extra,
        }
        if committed.grad_norm is not None:
            record["grad_norm"] = committed.grad_norm
        if committed.is_skipped:
            record["skipped"] = True
        return record

    def _settle(self) -> bool:
        """Hold a closing ballot: the last step is stable. Return whether anybody wishes to stop."""
        stop = self._stepper.vote(self._wishes())
        self._publish()
        return stop

    def _publish(self) -> None:
        """Hand out the record of the last step, which is stable now."""
        record, self._pending = self._pending, None
        if record is not None and self._is_first:
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
        self._metrics["train_loss"] = self._sums.loss
        self._sums = _Epoch()
        if self._test_source is not None and self._spec.validate_every is None:
            self._validate()
        self._parts.schedulers.after_epoch(self._metrics)
        if self._is_first:
            record = {
                "epoch": self._epoch,
                "step": self.step,
                "samples_per_s": self._speed.value,
                **self._metrics,
            }
            self._report("epoch", **record)
            self._call("on_epoch", record)
        return self._settle()

    def _validate(self) -> None:
        """Evaluate on the test data; every worker gets the same numbers."""
        if self._test_source is None or self._validated_step == self.step:
            return
        self._validated_step = self.step
        found = evaluate(
            self._parts.model,
            self._parts.judge,
            self._parts.counts,
            self._test_source,
            block_samples=-(-self._spec.batch.samples // self._peers.world),
            precision=self._spec.precision,
            peers=self._peers,
            device=self._parts.device,
        )
        self._metrics.update({f"test_{name}": value for name, value in found.items()})
        if self._is_first:
            self._report("validated", step=self.step, epoch=self._epoch, **self._metrics)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _make_checkpointer(self) -> Checkpointer:
        limits = self._spec.checkpoints
        return Checkpointer(
            self._folder.sub("checkpoints"),
            keep=limits.keep,
            best=limits.best,
            best_mode=limits.best_mode,
            on_event=self._on_checkpoint_event,
        )

    def _on_checkpoint_event(self, kind: str, **fields: Any) -> None:
        """Take news from the thread that writes; callbacks hear of it in the training thread."""
        self._report(kind, **fields)
        if kind == "checkpoint_saved":
            self._saved.append(fields)

    def _save(self, stop: bool = False) -> None:
        """Stage the state after a settled step; it is written in the background.

        It counts as saved when the work that made it is on record: the receipt must survive whatever the model does.
        stop: the workers agreed to stop here.
        """
        if self._checkpointer is None or self._saved_step == self.step:
            return
        tensors, state = self._parts.state()
        state |= {
            "epoch": self._epoch,
            "epoch_sums": [self._sums.loss_sum, self._sums.weight],
            "metrics": self._metrics,
            "callbacks": [callback.state_dict() for callback in self._parts.callbacks],
            "stop_reason": self._stop_reason,
            "has_stopped": stop and self._stop_reason is not None,
        }
        step = self.step
        self._checkpointer.stage(step, tensors, state, generation=self._generation)
        self._checkpointer.commit(step, after=lambda: self._record_to(step))
        self._saved_step = step

    def _resume(self) -> None:
        """Load the newest valid checkpoint, the one that rank 0 chooses; without one, agree on the first weights."""
        found, problems = newest(self._folder.sub("checkpoints")) if self._is_first else (None, [])
        step = int(vote(self._peers, [found.step + 1 if found else 0])[0]) - 1
        for problem in problems:
            self._report("checkpoint_refused", reason=problem)
        if step < 0:
            for tensor in self._parts.model.state().values():
                shared = tensor.contiguous()
                self._peers.broadcast(shared)
                tensor.copy_(shared)
            if self._is_first:
                self._report("started", step=0)
            self._save()
            return
        tensors, state = load(self._folder.sub("checkpoints"), step)
        self._parts.load(tensors, state)
        self.step, self._epoch, self._metrics = step, state["epoch"], state["metrics"]
        self._sums = _Epoch(*state["epoch_sums"])
        self._saved_step = step
        self._stop_reason, self._has_stopped = state["stop_reason"], state["has_stopped"]
        for callback, saved in zip(self._parts.callbacks, state["callbacks"]):
            callback.load_state_dict(saved)
        self._feed.seek(step)
        if self._is_first:
            self._report("resumed", step=step, epoch=self._epoch)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, stopped: bool) -> None:
        """Evaluate, save, check that all workers hold the same model, and report the end."""
        is_complete = not stopped or vote(self._peers, [self._stop_reason is not None])[0] > 0
        if self._sums.weight:
            self._metrics["train_loss"] = self._sums.loss
        if is_complete:
            self._parts.finalize()
            self._validate()
        digest = weights_digest(self._parts.model.state())
        self._compare(digest)
        if self._checkpointer is None:
            return
        self._save()
        self._checkpointer.close()
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
