"""When and what a worker writes to the run's folder, and how a run goes on from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from lepton_ray.storage import Folder
from lepton_ray.train.ballot import Ballots
from lepton_ray.train.checkpoint import Checkpointer
from lepton_ray.train.checkpoint_format import File, load, load_own, newest
from lepton_ray.train.mirror import Bytes, Mirror, Mirrors, read, step_of
from lepton_ray.train.outbox import Outbox
from lepton_ray.train.own_files import write_files
from lepton_ray.train.parts import Parts
from lepton_ray.train.peers import Peers
from lepton_ray.train.spec import TrainSpec
from lepton_ray.train.state import TrainState
from lepton_ray.train.transfer import give, take
from lepton_ray.train.weights import write_weights

WRITE_OUT_S = 8.0
"""How long a run that failed waits for a checkpoint that is being written."""
LAST_WRITE_S = 600.0
"""How long a run waits for its last checkpoint."""


class Saver:
    """The checkpoints of a run, as one worker sees them; that of rank 0 writes them."""

    def __init__(
        self, spec: TrainSpec, parts: Parts, state: TrainState, outbox: Outbox, record: Callable[[int], None]
    ) -> None:
        """record: returns when what was done before a step is on record for good; raises where this worker is out."""
        self._spec, self._parts, self._state, self._outbox, self._record = spec, parts, state, outbox, record
        self._folder = Folder(spec.run_url)
        if spec.coordinate:
            self._folder = self._folder.sub(f"part-{spec.coordinate}")
        self._checkpoints = self._folder.sub("checkpoints")
        self._checkpointer: Checkpointer | None = None
        self._mirrors: Mirrors | None = None
        self._mirror: Mirror | None = None
        self._has_room = False
        self._saved_step = -1

    def join(self, peers: Peers, ballots: Ballots, mirrors: Mirrors | None = None) -> None:
        """Take part in a generation: whoever has rank 0 of the peers writes from now on, and nobody else.

        peers: as of `Loop.join`. mirrors: where and how often the state is mirrored; all know it, so that all take part
        in the ballot.
        """
        self._mirrors = None if self._spec.sync.is_local else mirrors
        self._peers, self._ballots, self._is_writer = peers, ballots, peers.rank == 0
        if not self._is_writer:
            self.close(0.0)
            return
        limits = self._spec.checkpoints
        if self._checkpointer is None:
            self._has_room = False
            self._checkpointer = Checkpointer(
                self._checkpoints,
                keep=limits.keep,
                best=limits.best,
                best_mode=limits.best_mode,
                on_event=self._checkpoint_event,
            )
        # Nobody may wait for rank 0 for so long that it is given up.
        self._checkpointer.write_timeout_s = (
            LAST_WRITE_S if peers.world * self._spec.size == 1 else self._spec.patience_s / 2
        )

    def _checkpoint_event(self, kind: str, **fields: Any) -> None:
        if self._outbox.is_first:
            self._outbox.checkpoint_event(kind, **fields)

    def make_room(self) -> None:
        """Find memory of the right size for a checkpoint: the optimizer has its state now."""
        if self._checkpointer is not None and not self._has_room:
            self._has_room = True
            self._checkpointer.prepare(*self._parts.state())

    def forget(self) -> None:
        """Know that the weights are others than those that were saved."""
        self._saved_step = -1

    def save(self, generation: int, beside: list[File] | None = None) -> None:
        """Copy the state after a stable step; it is written in the background.

        It counts as saved when the work that made it is on record: the receipt must survive whatever the model does.
        beside: files that the other workers wrote, where all hold something of their own.
        """
        if self._checkpointer is None or self._saved_step == self._state.step:
            return
        step = self._state.step
        tensors, state = self._whole()
        is_local = self._spec.sync.is_local
        with self._parts.shared():
            is_saved = self._checkpointer.save(
                step,
                tensors,
                state,
                generation=generation,
                after=lambda: self._record(step),
                beside=beside if is_local else (),
            )
        if is_saved or is_local:  # where all save together, all must try again, or nobody
            self._saved_step = step

    def _whole(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all that a run needs to go on."""
        tensors, state = self._parts.state()
        beside = {"callbacks": self._outbox.states(), "stop_reason": self._outbox.stop_reason}
        return tensors, {**state, "loop": self._state.plain(), **beside}

    def is_mirror_due(self) -> bool:
        """Tell whether the state after this step is to be mirrored."""
        return self._mirrors is not None and self._state.step % self._mirrors.every == 0

    def is_mirror_busy(self) -> bool:
        """Tell whether this worker could not mirror now: then nobody does, so that all parts have the same steps."""
        return self._mirror is not None and self._mirror.is_busy()

    def mirror(self, generation: int) -> None:
        """Copy the state after a stable step; it is sent in the background."""
        if self._mirrors is not None and self._is_writer:
            step = self._state.step
            self._mirror = self._mirror or Mirror()
            self._mirror.save(self._mirrors, generation, step, *self._whole(), lambda: self._record(step))

    def save_own(self, peers: Peers) -> list[File] | None:
        """Let the other workers write what only they hold; all call this together."""
        is_ready = self._checkpointer is None or self._checkpointer.is_idle()
        return write_files(self._checkpoints, self._state.step, self._parts.own_state, peers, is_ready=is_ready)

    def resume(self, generation: int) -> bool:
        """Load the newest state, mirrored or checkpoint, that those of rank 0 find; return whether there is one."""
        peers = self._peers
        # All look, since all would wait for one that does: it reads the checkpoint to the end.
        found, problems = newest(self._checkpoints)
        for problem in problems:
            self._outbox.now("checkpoint_refused", reason=problem)

        def saved(limit: float) -> float:
            at = found if found is None or found.step <= limit else newest(self._checkpoints, limit)[0]
            return -1 if at is None else at.step

        step = self._newest_of_all(saved)
        mirrored, is_mirrored = self._mirrored(step) if self._mirrors is not None else (None, False)
        if is_mirrored:
            whole = None if mirrored is None else read(mirrored)
            if whole is not None:
                give(peers, *whole)
            tensors, state = whole or take(peers, self._parts.model.state())
        elif step >= 0:
            tensors, state = load(self._checkpoints, step)
        else:
            return False
        if self._spec.sync.is_local and peers.rank > 0:
            state |= load_own(self._checkpoints, step, peers.rank)
        self._parts.load(tensors, state)
        self._state.load({**state["loop"], "todo": [], "untold": 0, "is_stopping": state["loop"]["is_done"]})
        self._outbox.stop_reason = state["stop_reason"]
        self._outbox.load_states(state["callbacks"])
        self._saved_step = -1 if is_mirrored else step
        place = {"step": self._state.step, "epoch": self._state.epoch, "generation": generation}
        self._outbox.now("resumed", **place, origin="mirror" if is_mirrored else "checkpoint")
        return True

    def _mirrored(self, above: int) -> tuple[Bytes | None, bool]:
        """Fetch the newest mirror, if this is rank 0, and tell whether there is one of a step above this one."""
        assert self._mirrors is not None
        kept = self._mirrors.kept() if self._peers.rank == 0 else []
        at = self._newest_of_all(lambda limit: max((each for each in kept if each <= limit), default=-1))
        if at < 0 or step_of(at) <= above:
            return None, False
        data = self._mirrors.fetch(at) if self._peers.rank == 0 else None
        is_missed = self._peers.rank == 0 and data is None  # it went with its node just now
        return data, self._ballots.hold([is_missed], [])[0] == 0

    def _newest_of_all(self, newest: Callable[[float], float]) -> int:
        """Find the newest place that all parts of the model have a state of; -1 for none.

        newest: the newest up to a limit of this worker's part; asked where this is rank 0.
        """
        limit = math.inf
        while True:
            own = newest(limit) + 1 if self._peers.rank == 0 else 0.0
            places = self._ballots.hold([], [own])
            if min(places) == max(places):
                return int(places[0]) - 1
            limit = min(places) - 1

    def finish(self, generation: int, is_complete: bool) -> None:
        """Write what a run leaves: its last checkpoint and, when it is complete, its weights."""
        if self._checkpointer is None:
            return
        self._checkpointer.write_timeout_s = LAST_WRITE_S  # nobody waits for this rank any more
        if not self._spec.sync.is_local:
            self.save(generation)
        self.close(LAST_WRITE_S)
        if is_complete:
            write_weights(self._folder, self._parts.model.state())

    def close(self, limit_s: float) -> None:
        """End the thread that writes, when it has written what it has; it is waited for so long."""
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            mirror.close()
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            checkpointer.close(limit_s)

    def give_up(self) -> None:
        """Write out what is being written, if that is quick: the run has failed."""
        with suppress(Exception):  # the first error is the one to tell
            self.close(WRITE_OUT_S)
