"""Callbacks: the names of the hooks, early stopping, TensorBoard files."""

from __future__ import annotations

import json
import math
import pickle

import pytest

from lepton_ray.callbacks import Callback, EarlyStopping, RunView, TensorBoard
from lepton_ray.errors import ConfigError


@pytest.fixture
def reasons():
    return []


@pytest.fixture
def run(tmp_path, reasons):
    return RunView(name="digits", path=str(tmp_path), stop=reasons.append)


def test_hook_names_are_public():
    public = {name for name in vars(Callback) if not name.startswith("_")}
    assert public == {"on_step", "on_epoch", "on_checkpoint", "on_end", "state_dict", "load_state_dict"}


def test_a_bare_callback_does_nothing(run):
    callback = Callback()
    for hook in (callback.on_step, callback.on_epoch, callback.on_checkpoint, callback.on_end):
        hook(run, {"step": 1, "epoch": 0})
    callback.load_state_dict(callback.state_dict())


def epochs_until_stop(stopper, run, reasons, values):
    for epoch, value in enumerate(values):
        stopper.on_epoch(run, {"epoch": epoch, stopper.metric: value})
        if reasons:
            return epoch
    return None


@pytest.mark.parametrize(
    ("options", "values", "stop"),
    [
        ({"patience": 2}, [3, 2, 2.5, 1, 1, 1], 5),
        ({"patience": 2}, [3, 2, 1, 0], None),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.9], 1),
        ({"patience": 1, "metric": "test_accuracy"}, [0.1, 0.5, 0.9, 0.8], 3),
        ({"patience": 1, "mode": "max"}, [1, 2, 1], 2),
        ({"patience": 2}, [math.nan, math.nan, 1], 1),
        ({"patience": 2}, [math.nan, 2, math.nan, 1, 3, 3], 5),
        ({"patience": 1}, [math.inf, math.inf], 1),
    ],
)
def test_a_run_stops_when_its_metric_stays(run, reasons, options, values, stop):
    assert epochs_until_stop(EarlyStopping(**options), run, reasons, values) == stop


def test_early_stopping_goes_on_from_its_saved_state(run, reasons):
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    epochs_until_stop(first, run, reasons, [1, 2, 2])
    assert reasons == []
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.on_epoch(run, {"test_loss": 1.5})
    assert reasons == ["test_loss has not improved on 1 for 3 epochs"]


def test_epochs_without_the_metric_do_not_count_and_its_absence_is_told(run, reasons, caplog):
    stopper = EarlyStopping(patience=1)
    for _ in range(3):
        stopper.on_epoch(run, {"train_loss": 1.0})
    assert reasons == []
    stopper.on_end(run, {"train_loss": 1.0})
    assert "saw no 'test_loss'; the last record has train_loss" in caplog.text


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1.5}, {"min_delta": -1}, {"mode": "up"}])
def test_options_of_early_stopping_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping(**options)


def scalars(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_steps_and_epochs(run, tmp_path):
    board = pickle.loads(pickle.dumps(TensorBoard()))
    for step in (1, 2):
        board.on_step(run, {"step": step, "epoch": 0, "train_loss": 1 / step, "lr": 0.5, "note": "text"})
    board.on_epoch(run, {"step": 2, "epoch": 1, "train_loss": 0.75, "test_accuracy": 0.25})
    board.on_end(run, {"step": 2, "epoch": 1})
    assert scalars(tmp_path / "tensorboard") == {
        "step/train_loss": [(1, 1.0), (2, 0.5)],
        "step/lr": [(1, 0.5), (2, 0.5)],
        "epoch/train_loss": [(2, 0.75)],
        "epoch/test_accuracy": [(2, 0.25)],
    }


def test_tensorboard_hides_what_a_resumed_run_does_again(run, tmp_path):
    folder = tmp_path / "elsewhere"
    for life, steps in enumerate([(1, 2, 3, 4), (3, 4, 5)]):
        board = TensorBoard(str(folder))
        for step in steps:
            board.on_step(run, {"step": step, "epoch": 0, "life": life})
        board.on_end(run, {"step": step})
    assert scalars(folder) == {"step/life": [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]}


def test_tensorboard_is_not_opened_by_a_run_without_steps(run, tmp_path):
    TensorBoard().on_end(run, {"step": 0})
    assert list(tmp_path.iterdir()) == []
