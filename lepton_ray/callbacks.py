"""Hooks into a run: `Callback`, early stopping and TensorBoard.

They run in the process of rank 0, in step order, on records that are stable: no later failure takes a step back that a
callback has seen. Their state is saved with each checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lepton_ray.config import is_larger_better
from lepton_ray.errors import ConfigError

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""Plain values: step, epoch, train_loss, lr, samples_per_s, test_..."""


@dataclass(slots=True, kw_only=True)
class RunView:
    """What a callback sees of its run."""

    name: str
    path: str
    """The run's folder: a path or an fsspec URL."""
    stop: Callable[[str], None]
    """Ask all workers to stop after the step that they are at; takes the reason."""
    step: int = 0
    """Steps done so far."""
    epoch: int = 0
    """Epochs done so far."""


class Callback:
    """Base of the callbacks: override what you need. The objects travel to the worker by pickling."""

    def on_step(self, run: RunView, record: Record) -> None:
        """Called after each step."""

    def on_epoch(self, run: RunView, record: Record) -> None:
        """Called after each epoch, with the results of its evaluation if there was one."""

    def on_checkpoint(self, run: RunView, record: Record) -> None:
        """Called when a checkpoint is safe on storage."""

    def on_end(self, run: RunView, record: Record) -> None:
        """Called once, when training is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to be saved with a checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state before the run goes on."""


class EarlyStopping(Callback):
    """Stops a run whose metric has not improved for a number of epochs."""

    def __init__(
        self,
        metric: str = "test_loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["auto", "min", "max"] = "auto",
    ) -> None:
        """patience: epochs in a row without an improvement by more than min_delta after which the run stops.

        mode: whether small or large is better; "auto" tells by the name of the metric. NaN is never an improvement.
        Epochs whose record lacks the metric do not count.
        """
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"EarlyStopping(patience={patience!r}): expected a whole number of epochs >= 1.")
        if not min_delta >= 0:
            raise ConfigError(f"EarlyStopping(min_delta={min_delta!r}): expected a number >= 0.")
        if mode not in ("auto", "min", "max"):
            raise ConfigError(f"EarlyStopping(mode={mode!r}): expected 'auto', 'min' or 'max'.")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self._sign = 1 if is_larger_better(metric, mode) else -1
        self.best: float | None = None
        self.bad_epochs = 0

    def on_epoch(self, run: RunView, record: Record) -> None:
        if self.metric not in record:
            return
        value = float(record[self.metric])
        gain = math.inf if self.best is None else self._sign * (value - self.best)
        if gain > self.min_delta and not math.isnan(value):
            self.best, self.bad_epochs = value, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs >= self.patience:
            best = "never was a number" if self.best is None else f"has not improved on {self.best:.6g}"
            run.stop(f"{self.metric} {best} for {self.bad_epochs} epochs")

    def on_end(self, run: RunView, record: Record) -> None:
        if self.best is None and self.bad_epochs == 0:
            log.warning("%s: EarlyStopping saw no %r; the last record has %s", run.name, self.metric, ", ".join(record))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad_epochs = state["best"], state["bad_epochs"]


class TensorBoard(Callback):
    """Writes the numbers of steps and epochs as TensorBoard scalars, under step/ and epoch/, over the step."""

    def __init__(self, folder: str | None = None) -> None:
        """folder: where the event files go, a path that the workers can write. None: tensorboard/ in the run's."""
        if importlib.util.find_spec("tensorboardX") is None:
            raise ConfigError("TensorBoard needs the package tensorboardX. Install it: pip install tensorboardX.")
        self.folder = folder
        # Made at the first record, in the worker: a writer holds a file and a thread, and cannot be pickled.
        self._writer: Any = None

    def on_step(self, run: RunView, record: Record) -> None:
        self._write(run, "step", record)

    def on_epoch(self, run: RunView, record: Record) -> None:
        self._write(run, "epoch", record)
        self._writer.flush()

    def on_end(self, run: RunView, record: Record) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, run: RunView, group: str, record: Record) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # optional, and it imports torch

        step = int(record["step"])
        if self._writer is None:
            self._writer = _open(self.folder or f"{run.path}/tensorboard", step)
        # One event for all values: a fourth of the time of SummaryWriter.add_scalar for each.
        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("step", "epoch") and isinstance(value, (int, float))
        ]
        self._writer.add_summary(Summary(value=values), step)


def _open(folder: str, step: int) -> Any:  # an optional package's type
    """Open an event file that takes the place of what an earlier life of the run wrote from `step` on."""
    from tensorboardX import FileWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    # The name of a file has the second in it; the step keeps two lives in one second apart.
    writer = FileWriter(folder, filename_suffix=f".{step}")
    writer.add_event(Event(file_version="brain.Event:2"), step)
    writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
    return writer
