"""The progress shower, on a real pseudo-terminal and on a real pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from lepton_ray.progress import Progress


def step(number: int, epoch: int = 0, **fields: object) -> dict[str, object]:
    return {"event": "step", "step": number, "epoch": epoch, "train_loss": 0.5, "samples_per_s": 1234.5, **fields}


def epoch(number: int, steps_done: int, **metrics: float) -> dict[str, object]:
    return {"event": "epoch", "epoch": number, "step": steps_done, "train_loss": 0.25, **metrics}


class Shown:
    """Feed records at chosen times to a shower without a terminal, and read its lines."""

    def __init__(self, **totals: int | None) -> None:
        self.now_s = 0.0
        self.stream = io.StringIO()
        self.progress = Progress(stream=self.stream, clock=lambda: self.now_s, **totals)

    def at(self, now_s: float, *records: dict[str, object]) -> None:
        self.now_s = now_s
        for record in records:
            self.progress.show(record)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_a_line_tells_epoch_step_loss_speed_and_time_left():
    shown = Shown(steps=100, epochs=4)
    with shown.progress:
        shown.at(0, step(0))
        shown.at(10, step(10))
    assert shown.lines == [
        "epoch 1/4  step 1/100  loss 0.5  1,234 samples/s",
        "epoch 1/4  step 11/100  loss 0.5  1,234 samples/s  ETA 1:29",
    ]


def test_time_left_counts_from_the_step_that_a_run_resumed_at():
    shown = Shown(steps=10_000)
    with shown.progress:
        shown.at(0, step(4999))
        shown.at(10, step(5009))
    assert shown.lines[-1].endswith("ETA 1:23:10")


def test_without_totals_nothing_is_made_up():
    shown = Shown()
    with shown.progress:
        shown.at(0, step(0))
        shown.at(10, step(10))
    assert shown.lines[-1] == "epoch 1  step 11  loss 0.5  1,234 samples/s"


def test_plain_lines_come_every_few_seconds_and_at_each_epoch():
    shown = Shown(steps=40)
    with shown.progress:
        for number in range(40):  # ten steps a second
            shown.at(number / 10, step(number, number // 20))
            if number % 20 == 19:
                shown.at(number / 10, epoch(number // 20, number + 1, test_accuracy=0.975))
    assert [re.search(r"step (\d+)", line).group(1) for line in shown.lines] == ["1", "20", "40"]
    assert shown.lines[-1].endswith("test_accuracy 0.975")


def test_no_more_than_four_updates_a_second_but_always_the_last():
    shown = Shown(epochs=1000)
    with shown.progress:
        for number in range(1000):  # a hundred epochs a second
            shown.at(number / 100, step(number, number), epoch(number, number + 1))
    assert 30 <= len(shown.lines) <= 41
    assert shown.lines[-1].startswith("epoch 1000/1000")


def test_notes_are_printed_once():
    shown = Shown()
    note = {"event": "note", "text": "loss: cross_entropy (inferred)"}
    with shown.progress:
        shown.at(0, note, note, {"event": "resumed", "step": 7, "epoch": 0}, note)
        shown.at(1, {"event": "trained", "step": 9, "epoch": 0, "reason": "no better for 3 epochs"})
    assert shown.lines == [
        "loss: cross_entropy (inferred)",
        "resumed at step 7",
        "stopped after step 9: no better for 3 epochs",
    ]


def test_phases_are_shown_until_the_first_step():
    shown = Shown()
    with shown.progress:
        shown.at(0, {"event": "phase", "phase": "waiting", "reason": "2 of 4 CPUs are free"})
        shown.at(1, {"event": "phase", "phase": "starting"})
        shown.at(2, step(0), {"event": "phase", "phase": "training"})
    assert shown.lines[:2] == ["waiting for free workers: 2 of 4 CPUs are free", "starting the workers"]
    assert len(shown.lines) == 3


@pytest.mark.parametrize("record", [{"event": "work", "step": 1}, {"event": "checkpoint_saved"}, {}])
def test_other_records_show_nothing(record):
    shown = Shown()
    with shown.progress:
        shown.at(0, record)
    assert shown.lines == []


SCRIPT = """
import sys
from lepton_ray.progress import Progress

with Progress(steps=20, epochs=2) as progress:
    progress.show({"event": "note", "text": "loss: [cross_entropy] (inferred)"})
    progress.show({"event": "phase", "phase": "starting"})
    for number in range(20):
        progress.show({"event": "step", "step": number, "epoch": number // 10, "train_loss": 0.5, "samples_per_s": 9.0})
    progress.show({"event": "epoch", "epoch": 1, "step": 20, "train_loss": 0.25, "test_accuracy": 0.99})
    print("printed by the user")
print("rich" in sys.modules)
"""


def run_script(stderr: int, **environment: str) -> str:
    # The terminal's colours and width are the test's, not those of whoever runs it.
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**clean, "TERM": "xterm", **environment},
        timeout=30,
        check=True,
    )
    return done.stdout.decode()


def read_terminal(parent: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode()


def on_terminal(**environment: str) -> tuple[str, str]:
    parent, child = pty.openpty()
    try:
        stdout = run_script(child, **environment)
        os.close(child)
        return stdout, read_terminal(parent)
    finally:
        os.close(parent)


def test_a_terminal_gets_one_live_line():
    stdout, screen = on_terminal(COLUMNS="120")
    rewritten = "\x1b[2K"  # the line is erased and drawn again
    assert rewritten in screen
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.split(rewritten)[-1]).strip()
    assert last.startswith("epoch 2/2  step 20/20  loss 0.25")
    assert last.endswith("test_accuracy 0.99")
    assert screen.count("loss: [cross_entropy] (inferred)") == 1
    assert screen.count("step 20/20") <= 4, "one line is drawn again, at most 4 times a second"
    assert stdout == "printed by the user\nTrue\n", "what the user prints goes where the user sent it"


def test_a_live_line_is_cut_to_the_width_of_the_terminal():
    _, screen = on_terminal(COLUMNS="40")
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part)) <= 40 for part in re.split(r"[\r\n]+", screen))


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    stdout, screen = on_terminal(TERM="dumb")
    assert "\x1b" not in screen
    assert stdout == "printed by the user\nFalse\n"


def test_a_pipe_gets_plain_lines_and_never_imports_rich():
    read_end, write_end = os.pipe()
    stdout = run_script(write_end)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    assert lines[:2] == ["loss: [cross_entropy] (inferred)", "starting the workers"]
    assert lines[-1].startswith("epoch 2/2  step 20/20  loss 0.25")
    assert stdout == "printed by the user\nFalse\n"
