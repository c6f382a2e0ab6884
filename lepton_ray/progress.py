"""Show a run's journal to a person: one live line on a terminal, plain lines anywhere else, on standard error.

Takes records as the training loop writes them (steps and epochs count from 0) and ignores those that it does not know.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, TextIO

UPDATES_PER_S = 4
PLAIN_EVERY_S = 5.0  # between two plain lines within an epoch
SPINNER = "|/-\\"
PHASES = {
    "waiting": "waiting for free workers",
    "starting": "starting the workers",
    "forming": "connecting the workers",
    "training": "waiting for the first step",
}


class _Display(Protocol):
    def show(self, line: str, *, is_milestone: bool) -> None:
        """Replace the line that tells how far the run is."""

    def say(self, line: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Leave the last line as it is."""


class _PlainLines:
    """Milestones at most UPDATES_PER_S times a second, other lines every PLAIN_EVERY_S; the last one always."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self._shown_s = float("-inf")
        self._pending = ""

    def show(self, line: str, *, is_milestone: bool) -> None:
        self._pending = line
        if self._clock() - self._shown_s >= (1 / UPDATES_PER_S if is_milestone else PLAIN_EVERY_S):
            self.close()

    def say(self, line: str) -> None:
        self.close()  # lines keep their order
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._pending:
            self._shown_s = self._clock()
            print(self._pending, file=self._stream, flush=True)
            self._pending = ""


class _LiveLine:
    """One line that a thread of rich draws again UPDATES_PER_S times a second."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._clock = clock
        self._line = ""
        self._is_open = True
        self._live = Live(
            console=Console(file=stream),
            get_renderable=self._draw,
            refresh_per_second=UPDATES_PER_S,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file must not end on the terminal
        )
        self._live.start()

    def _draw(self) -> Any:  # rich is not imported where annotations are read
        from rich.text import Text

        frame = SPINNER[int(self._clock() * UPDATES_PER_S) % len(SPINNER)] if self._is_open else " "
        return Text(f"{frame} {self._line}", no_wrap=True, overflow="ellipsis")

    def show(self, line: str, *, is_milestone: bool) -> None:
        self._line = line

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._is_open = False
        self._live.stop()


def say(lines: Iterable[str]) -> None:
    """Print notes of the driver."""
    for line in lines:
        print(f"lepton_ray: {line}", file=sys.stderr, flush=True)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and "ipykernel" not in sys.modules


class Progress:
    """Context manager around the wait for a run; feed it with `show`."""

    def __init__(
        self,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """steps, epochs: of the whole run, None when not known. stream: standard error by default."""
        self._steps, self._epochs, self._clock = steps, epochs, clock
        self._stream = stream or sys.stderr
        self._display: _Display | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first record, which the ETA counts from
        self._metrics: dict[str, float] = {}
        self._said: set[str] = set()

    def __enter__(self) -> Progress:
        make = _LiveLine if _is_terminal(self._stream) else _PlainLines
        self._display = make(self._stream, self._clock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._display is not None
        self._display.close()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show what a journal record tells; cheap enough for every step."""
        assert self._display is not None
        match record.get("event"):
            case "step":
                self._display.show(self._line(record, record["step"] + 1), is_milestone=self._first is None)
                self._first = self._first or (record["step"] + 1, self._clock())
            case "epoch":
                self._keep_metrics(record)
                self._display.show(self._line(record, record["step"]), is_milestone=True)
            case "validated":
                self._keep_metrics(record)
            case "phase":
                self._show_phase(str(record["phase"]), record.get("reason"))
            case "resumed":
                self._say(f"resumed at step {record['step']}")
            case "checkpoint_refused":
                self._say(f"checkpoint refused: {record['reason']}")
            case "trained":
                if record.get("reason"):
                    self._say(f"stopped after step {record['step']}: {record['reason']}")
            case "note":
                self._say(str(record["text"]))

    def _say(self, line: str) -> None:
        assert self._display is not None
        if line not in self._said:
            self._said.add(line)
            self._display.say(line)

    def _show_phase(self, phase: str, reason: object) -> None:
        assert self._display is not None
        if phase in PHASES and self._first is None:
            line = PHASES[phase]
            self._display.show(f"{line}: {reason}" if reason else line, is_milestone=True)
        elif phase == "stopping":
            self._say(f"stopping at the next step: {reason}" if reason else "stopping at the next step")

    def _keep_metrics(self, record: Mapping[str, Any]) -> None:
        self._metrics |= {name: value for name, value in record.items() if name.startswith("test_")}

    def _line(self, record: Mapping[str, Any], steps_done: int) -> str:
        """Write one line of what is known after `steps_done` steps."""
        parts = [f"epoch {_of(record['epoch'] + 1, self._epochs)}", f"step {_of(steps_done, self._steps)}"]
        if "train_loss" in record:
            parts.append(f"loss {record['train_loss']:.4g}")
        if "samples_per_s" in record:
            parts.append(f"{record['samples_per_s']:,.0f} samples/s")
        if (eta_s := self._eta_s(steps_done)) is not None:
            parts.append(f"ETA {_duration(eta_s)}")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        return "  ".join(parts)

    def _eta_s(self, steps_done: int) -> float | None:
        if self._first is None or self._steps is None or steps_done <= self._first[0]:
            return None
        first_step, first_s = self._first
        return (self._clock() - first_s) / (steps_done - first_step) * max(self._steps - steps_done, 0)


def _of(count: int, total: int | None) -> str:
    return str(count) if total is None else f"{count}/{total}"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"
