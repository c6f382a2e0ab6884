"""Write checkpoints durably behind the training's back, and delete those that are no longer wanted.

Training is blocked for one copy into a staging buffer that is laid out as the data section of the safetensors file,
kept from save to save and touched before the first one, so that neither page faults nor a serializer lie in its way; a
background thread hashes and writes the buffer. There is one buffer, not two: a second one would cost the size of model
and optimizer again, to gain something only where checkpoints follow each other faster than the storage takes them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lepton_ray.config import is_larger_better
from lepton_ray.errors import CheckpointError, WaitTimeout
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import (
    CHUNK_BYTES,
    MANIFEST,
    File,
    FilePlan,
    ForeignManifest,
    Manifest,
    manifest_bytes,
    plan_file,
    read_manifest,
    step_folder,
    steps_in,
    write_file,
)
from lepton_ray.train.tree import flatten

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Copy:
    """A checkpoint in the staging buffer."""

    step: int
    generation: int
    state: Any
    head: bytes
    size_bytes: int
    beside: Sequence[File]
    began_s: float
    waited_s: float
    ready: torch.Event | None
    """Says when the copies from a device are done."""
    blocked_s: float = 0.0


class Checkpointer:
    """Write the checkpoints of one run. One caller; one background thread that does everything but the copy.

    folder: that of the checkpoints. keep: newest checkpoints that stay. best: name in state["loop"]["measured"] whose
    best checkpoint stays too; best_mode: which values are better.
    on_event: told "checkpoint_saved" (step, generation, path, size_bytes, duration_s from copy to manifest,
    blocked_s of the training, waited_s of it for an earlier write) and "checkpoint_failed" (step, error) in the
    background thread. A failed save raises nothing: training goes on, older checkpoints stay.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        keep: int,
        best: str | None = None,
        best_mode: Literal["auto", "min", "max"] = "auto",
        on_event: Callable[..., object] | None = None,
        write_timeout_s: float = 600,
    ) -> None:
        self.folder = folder
        self.keep, self.best = keep, best
        self.is_max_best = best is not None and is_larger_better(best, best_mode)
        self.write_timeout_s = write_timeout_s
        self._on_event = on_event
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._buffer_user: Future[None] | None = None  # the last job that reads or fills the buffer
        self._last: Future[None] | None = None
        self._saved: dict[int, Manifest] = {}  # manifests need not be read again to choose what to keep
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        # a daemon, so that a storage that hangs cannot keep the process alive
        self._thread = threading.Thread(target=self._serve, name="checkpointer", daemon=True)
        self._thread.start()

    def prepare(self, tensors: Mapping[str, Tensor], state: Any = None) -> None:
        """Allocate and touch the staging buffer in the background, for tensors and state of these sizes."""
        tensors, _ = _together(tensors, state)
        size_bytes, is_pinned = plan_file(tensors).size_bytes, _is_cuda(tensors)
        self._buffer_user = self._submit(lambda: self._allocate(size_bytes, is_pinned))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Any,
        *,
        generation: int = 0,
        after: Callable[[], None] | None = None,
        beside: Sequence[File] | None = (),
    ) -> bool:
        """Copy what makes a checkpoint, which the background thread then writes. The tensors may change afterwards.

        state: a tree of dicts, lists, tuples, scalars and tensors. after: what has to be done before the checkpoint
        exists, in the background; it fails when that raises. beside: files of its folder that other workers
        wrote; None when one of them could not, so that there is no checkpoint. Waits for an earlier write that still
        needs the buffer, at most write_timeout_s; returns whether it is going to be written.
        Raises CheckpointError for a tensor or a value that a checkpoint cannot hold.
        """
        began_s = time.perf_counter()
        all_tensors, json_state = _together(tensors, state)
        plan = plan_file(all_tensors)
        error = "" if beside is not None else "another worker could not write its own state"
        if self._buffer_user is not None and wait([self._buffer_user], self.write_timeout_s).not_done:
            error = f"the write of an earlier checkpoint did not end within {self.write_timeout_s:g} s"
        waited_s = time.perf_counter() - began_s
        try:
            if not error:
                self._allocate(plan.size_bytes, _is_cuda(all_tensors))
        except (RuntimeError, MemoryError) as failure:
            error = f"no memory for a staging buffer of {plan.size_bytes} bytes ({failure})"
        if error:
            self._submit(lambda: self._report_failure(step, error))
            return False
        copy = _Copy(
            step=step,
            generation=generation,
            state=json_state,
            head=plan.head,
            size_bytes=plan.size_bytes,
            beside=beside or (),
            began_s=began_s,
            waited_s=waited_s,
            ready=copy_into(all_tensors, plan, self._buffer),
        )
        copy.blocked_s = time.perf_counter() - began_s
        self._buffer_user = self._submit(lambda: self._write(copy, after))
        return True

    def is_idle(self) -> bool:
        """Wait for all that was asked for, at most write_timeout_s; tell whether it is done."""
        return self._last is None or not wait([self._last], self.write_timeout_s).not_done

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all that was asked for is done. Raises WaitTimeout after timeout_s (default write_timeout_s)."""
        limit_s = self.write_timeout_s if timeout_s is None else timeout_s
        if self._last is not None and wait([self._last], limit_s).not_done:
            raise WaitTimeout(f"Waited {limit_s:g} s for checkpoints to be written to {self.folder.url}.")

    def close(self, timeout_s: float | None = None) -> None:
        """Wait, then end the thread and free the buffer. Raises WaitTimeout; the thread then ends by itself."""
        self._jobs.put(None)
        self.wait(timeout_s)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    # --- the background thread

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        self._last = Future()
        self._jobs.put((self._last, work))
        return self._last

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                work()
            except Exception:  # of the caller's on_event, or no memory; the next checkpoint must still be possible
                log.exception("Background work on the checkpoints in %s failed.", self.folder.url)
            future.set_result(None)

    def _allocate(self, size_bytes: int, is_pinned: bool) -> None:
        if self._buffer.numel() >= size_bytes and (self._buffer.is_pinned() or not is_pinned):
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first: both might not fit
        buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        for start in range(0, size_bytes, CHUNK_BYTES):  # in pieces that torch does not spread over threads
            buffer[start : start + CHUNK_BYTES].zero_()
        self._buffer = buffer

    def _write(self, copy: _Copy, after: Callable[[], None] | None) -> None:
        step, at = copy.step, step_folder(self.folder, copy.step)
        try:
            file = self._write_tensors(copy, at)
            if after is not None:
                after()
            manifest = Manifest(
                step=step,
                generation=copy.generation,
                saved_at_s=time.time(),
                state=copy.state,
                files=(file, *copy.beside),
            )
            at.write(MANIFEST, manifest_bytes(manifest))
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own
            self._quietly(self._tidy, step)
            self._report_failure(step, f"{type(error).__name__}: {error}")
            return
        self._saved[step] = manifest
        self._tell(
            "checkpoint_saved",
            step=step,
            generation=copy.generation,
            path=at.url,
            size_bytes=file.size_bytes,
            duration_s=time.perf_counter() - copy.began_s,
            blocked_s=copy.blocked_s,
            waited_s=copy.waited_s,
        )
        self._quietly(self._retain, step)

    def _write_tensors(self, copy: _Copy, at: Folder) -> File:
        if copy.ready is not None:
            copy.ready.synchronize()
        return write_file(at, "state", copy.head, [self._buffer[: copy.size_bytes]])

    def _quietly(self, delete: Callable[[int], None], step: int) -> None:
        try:
            delete(step)
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own; the next save tries it again
            log.warning("Old checkpoints in %s cannot be deleted (%s).", self.folder.url, error)

    def _report_failure(self, step: int, error: str) -> None:
        log.warning("The checkpoint of step %s in %s failed (%s); older ones are kept.", step, self.folder.url, error)
        self._tell("checkpoint_failed", step=step, path=step_folder(self.folder, step).url, error=error)

    def _tell(self, kind: str, **fields: object) -> None:
        if self._on_event is not None:
            self._on_event(kind, **fields)

    def _retain(self, published: int) -> None:
        """Delete what is neither among the newest nor the best, and what dead writers left.

        Steps after the one published now belong to a life of the run that this one did not continue.
        """
        whole: list[int] = []
        for step in steps_in(self.folder):
            try:
                if step not in self._saved:
                    self._saved[step] = read_manifest(self.folder, step)
            except ForeignManifest:
                continue
            except (FileNotFoundError, CheckpointError):
                self._delete(step)
                continue
            if step > published:
                self._delete(step)
            else:
                whole.append(step)
        stay = set(whole[-self.keep :])
        scores = {step: score for step in whole if (score := self._score(self._saved[step])) is not None}
        if scores:
            stay.add(max(scores, key=lambda step: (scores[step], -step)))
        for step in whole:
            if step not in stay:
                self._delete(step)
        self._tidy(published)

    def _score(self, manifest: Manifest) -> float | None:
        if self.best is None:
            return None
        try:
            value = float(manifest.state["loop"]["measured"][self.best])
        except (KeyError, TypeError, ValueError):
            return None
        if value != value:
            return None
        return value if self.is_max_best else -value

    def _delete(self, step: int) -> None:
        at = step_folder(self.folder, step)
        at.delete(MANIFEST)  # first, so that no moment shows a manifest without its files
        at.delete_all()
        self._saved.pop(step, None)

    def _tidy(self, step: int) -> None:
        """Delete from a step's folder what its manifest does not name; without a manifest, all of it."""
        at = step_folder(self.folder, step)
        try:
            manifest = read_manifest(self.folder, step)
        except FileNotFoundError:
            at.delete_all()
            return
        except CheckpointError:
            return
        for name in set(at.names()) - {MANIFEST, *(file.name for file in manifest.files)}:
            at.delete(name)


def _together(tensors: Mapping[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
    both = dict(tensors)
    return both, flatten(state, "state", both)


def copy_into(tensors: Mapping[str, Tensor], plan: FilePlan, buffer: Tensor) -> torch.Event | None:
    """Copy tensors into the buffer. Copies from a device run behind its queue; the event says when they are done."""
    device = None
    with torch.no_grad():
        for span in plan.spans:
            source = tensors[span.name]
            if span.stop > span.start:
                span.view(buffer).copy_(source, non_blocking=True)
            if source.device.type != "cpu":
                device = source.device
    if device is None:
        return None
    event = torch.Event(device)
    event.record()
    return event


def _is_cuda(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())
