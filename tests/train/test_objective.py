"""Losses: the sum over any cut of a batch, divided by its weight, is torch's mean over the whole of it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lepton_ray.errors import ConfigError
from lepton_ray.train.model import TorchModel
from lepton_ray.train.objective import call, make_objective
from lepton_ray.train.words import check_words, infer_loss, target_facts

N, D, C, T = 12, 5, 4, 3


def linear(columns=C, seed=0):
    torch.manual_seed(seed)
    return TorchModel(nn.Linear(D, columns, dtype=torch.float64), torch.device("cpu"))


def mean_over_pieces(objective, model, batch, cuts):
    """Return loss and gradient as a step over the pieces of `batch` makes them."""
    edges = [0, *sorted(cuts), N]
    pieces = [tuple(t[a:b] for t in batch) for a, b in zip(edges, edges[1:]) if a < b]
    model.module.zero_grad()
    outcomes = [objective(model, piece) for piece in pieces]
    for outcome in outcomes:
        outcome.loss_sum.backward()
    weight = sum(outcome.weight for outcome in outcomes)
    loss = sum(float(outcome.loss_sum.detach()) for outcome in outcomes) / weight
    return loss, {name: p.grad / weight for name, p in model.parameters().items()}


def assert_is_mean(objective, model, batch, whole, cuts):
    """whole: the plain torch loss of the whole batch, as a function of the module."""
    loss, grads = mean_over_pieces(objective, model, batch, cuts)
    model.module.zero_grad()
    expected = whole(model.module)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    for name, parameter in model.parameters().items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-12)


torch.manual_seed(1)
X = torch.randn(N, D, dtype=torch.float64)
X_T = torch.randn(N, T, D, dtype=torch.float64)
CLASSES = torch.randint(0, C, (N,))
TOKENS = torch.randint(0, C, (N, T)).masked_fill(torch.rand(N, T) < 0.4, -100)
FLOATS = torch.randn(N, C, dtype=torch.float64)
BITS = torch.randint(0, 2, (N,))
SHARES = torch.rand(N, C, dtype=torch.float64).softmax(1)
CLASS_WEIGHTS = torch.rand(C, dtype=torch.float64)
WEIGHTED = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2, label_smoothing=0.1)
WEIGHTED_SHARES = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)
WEIGHTED_NLL = nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=2)

CASES = {
    "class indices": ("cross_entropy", X, CLASSES, C, F.cross_entropy),
    "class indices in a column of int32": (
        "cross_entropy",
        X,
        CLASSES.int()[:, None],
        C,
        lambda o, t: F.cross_entropy(o, t[:, 0].long()),
    ),
    "whole-number one-hot": ("cross_entropy", X, F.one_hot(CLASSES, C), C, lambda o, t: F.cross_entropy(o, t.double())),
    "probabilities": ("cross_entropy", X, SHARES, C, F.cross_entropy),
    "sequence with ignored tokens": (
        "cross_entropy",
        X_T,
        TOKENS,
        C,
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
    ),
    "log-probabilities": (
        nn.NLLLoss(),
        X,
        CLASSES,
        C,
        F.nll_loss,
    ),
    "nll": ("nll", X, CLASSES, C, F.nll_loss),
    "bce of a column": ("bce", X, BITS, 1, lambda o, t: F.binary_cross_entropy_with_logits(o[:, 0], t.double())),
    "mse of a column": ("mse", X, FLOATS[:, 0], 1, lambda o, t: F.mse_loss(o[:, 0], t)),
    "mse": ("mse", X, FLOATS, C, F.mse_loss),
    "mae": ("mae", X, FLOATS, C, F.l1_loss),
    "l1": ("l1", X, FLOATS, C, F.l1_loss),
    "huber": ("huber", X, FLOATS, C, F.huber_loss),
    "module": (nn.SmoothL1Loss(), X, FLOATS, C, F.smooth_l1_loss),
    "module without reduction": (nn.MSELoss(reduction="none"), X, FLOATS, C, F.mse_loss),
    "weighted cross entropy": (WEIGHTED, X, CLASSES, C, WEIGHTED),
    "weighted cross entropy of probabilities": (WEIGHTED_SHARES, X, SHARES, C, WEIGHTED_SHARES),
    "weighted nll": (WEIGHTED_NLL, X, CLASSES, C, WEIGHTED_NLL),
    "function with a mean": (lambda o, t: ((o - t) ** 2).mean(), X, FLOATS, C, F.mse_loss),
    "function with a value per sample": (lambda o, t: ((o - t) ** 2).mean(1), X, FLOATS, C, F.mse_loss),
    "function with sum and weight": (
        lambda o, t: (F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction="sum"), (t != -100).sum()),
        X_T,
        TOKENS,
        C,
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
    ),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=4))
def test_any_cut_gives_the_mean_of_the_whole(case, cuts):
    loss, x, target, columns, whole = CASES[case]
    assert_is_mean(make_objective(loss), linear(columns), (x, target), lambda m: whole(m(x), target), cuts)


def outcome_of(loss, outputs, target):
    """Evaluate a loss on given outputs."""
    return make_objective(loss)(TorchModel(nn.Identity(), torch.device("cpu")), (outputs, target))


def test_images_have_their_classes_in_dim_1():
    outputs, target = torch.randn(2, C, 5, 5), torch.randint(0, C, (2, 5, 5))
    outcome = outcome_of("cross_entropy", outputs, target)
    assert outcome.weight == 50
    torch.testing.assert_close(outcome.loss_sum / 50, F.cross_entropy(outputs, target))


def test_a_square_output_is_a_sequence_in_three_dims_and_an_image_in_more():
    outputs, target = torch.randn(2, C, C), torch.randint(0, C, (2, C))
    as_sequence = F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="sum")
    assert float(outcome_of("cross_entropy", outputs, target).loss_sum) == pytest.approx(float(as_sequence))
    assert float(outcome_of(nn.CrossEntropyLoss(), outputs, target).loss_sum) == pytest.approx(
        float(F.cross_entropy(outputs, target, reduction="sum"))
    )
    outputs, target = torch.randn(2, C, C, C), torch.randint(0, C, (2, C, C))
    as_image = F.cross_entropy(outputs, target, reduction="sum")
    assert float(outcome_of("cross_entropy", outputs, target).loss_sum) == pytest.approx(float(as_image))


def test_a_piece_without_counted_tokens_weighs_nothing():
    outputs = torch.randn(2, T, C, requires_grad=True)
    outcome = outcome_of("cross_entropy", outputs, torch.full((2, T), -100))
    outcome.loss_sum.backward()
    assert (outcome.weight, outcome.loss_sum.item(), outputs.grad.abs().sum().item()) == (0, 0, 0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_sums_leave_half_precision(kind):
    outputs = torch.full((4096, 1), 8, dtype=kind)
    for loss in ("mse", lambda o, t: (o - t).square().mean(), lambda o, t: (o - t).square()):
        assert float(outcome_of(loss, outputs, torch.zeros(4096, 1, dtype=kind)).loss_sum) == 4096 * 64


# --- other ways to a loss --------------------------------------------------------------------------------------------


class Carrying(nn.Module):
    """Returns its loss, as models of HuggingFace do."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(D, C, dtype=torch.float64), wrap

    def forward(self, pixels, labels=None):
        logits = self.inner(pixels)
        return self.wrap(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


@pytest.mark.parametrize("wrap", [dict, SimpleNamespace])
def test_the_loss_of_the_model_is_taken_without_another(wrap):
    model = TorchModel(Carrying(wrap), torch.device("cpu"))
    outcome = make_objective(None)(model, {"pixels": X, "labels": CLASSES})
    whole = F.cross_entropy(model.module.inner(X), CLASSES)
    assert float(outcome.loss_sum.detach()) / outcome.weight == pytest.approx(float(whole.detach()))
    assert outcome.weight == N
    assert outcome.target is CLASSES
    with pytest.raises(ConfigError, match="carries none"):
        make_objective(None)(model, (X, CLASSES))


def test_words_look_at_the_logits_of_an_object():
    model = TorchModel(Carrying(SimpleNamespace), torch.device("cpu"))
    outcome = make_objective("cross_entropy")(model, (X, CLASSES))
    torch.testing.assert_close(outcome.loss_sum, F.cross_entropy(outcome.outputs.logits, CLASSES) * N)


def test_a_tuple_goes_by_position_and_a_dict_by_name():
    def difference(left, right):
        return left - right

    assert call(difference, (3, 1)) == call(difference, {"right": 1, "left": 3}) == 2
    assert call(abs, -3) == 3


def test_step_fn_gets_the_users_module_and_optimizers_and_gives_the_loss():
    model, given_optimizers = linear(), object()

    def step_fn(module, batch, optimizers):
        assert module is model.module
        assert optimizers is given_optimizers
        x, target = batch
        outputs = module(x)
        return {"loss": F.mse_loss(outputs, target), "largest": outputs.abs().max(), "half": 0.5}

    objective = make_objective(None, step_fn, given_optimizers)
    assert_is_mean(objective, model, (X, FLOATS), lambda m: F.mse_loss(m(X), FLOATS), [3, 4])
    outcome = objective(model, (X, FLOATS))
    assert {name: float(total) / weight for name, (total, weight) in outcome.extra.items()} == {
        "largest": float(model(X).detach().abs().max()),
        "half": 0.5,
    }
    assert not outcome.extra["largest"][0].requires_grad
    pair = make_objective(None, lambda module, batch, optimizers: (module(batch[0]).sum(), 7))(model, (X, FLOATS))
    assert pair.weight == 7


@pytest.mark.parametrize("returned", [None, {"accuracy": 1.0}])
def test_step_fn_without_a_loss_is_refused(returned):
    with pytest.raises(ConfigError, match='with "loss"'):
        make_objective(None, lambda module, batch, optimizers: returned)(linear(), (X, FLOATS))


# --- mistakes --------------------------------------------------------------------------------------------------------


class Trainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("crossentropy", "Did you mean 'cross_entropy'"),
        ("qqqq", r"not known\. Known: cross_entropy, bce"),
        (nn.CrossEntropyLoss, r"loss=CrossEntropyLoss\(\)"),
        (nn.MSELoss(reduction="sum"), "reduction"),
        (3, "callable"),
        (Trainable(), "trainable parameters"),
    ],
)
def test_losses_that_cannot_work_are_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(loss)


@pytest.mark.parametrize(
    ("loss", "outputs", "target", "message"),
    [
        ("mse", torch.zeros(4, 3), torch.zeros(4), "differ in shape"),
        ("mse", torch.zeros(4, 1), torch.zeros(3), "differ in shape"),
        ("mse", torch.zeros(4, 2), None, "the batch has none"),
        ("cross_entropy", torch.zeros(4, 3), torch.zeros(4), "torch.long"),
        ("cross_entropy", torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), "do not fit"),
        ("cross_entropy", torch.zeros(4), torch.zeros(4, dtype=torch.long), "do not fit"),
        ("nll", torch.zeros(4, 3), torch.zeros(4, 3), "class indices"),
        (lambda o, t: 1.0, torch.zeros(4), torch.zeros(4), "returned float"),
        ("mse", [torch.zeros(4)] * 2, torch.zeros(4), "returned list"),
    ],
)
def test_outputs_that_do_not_fit_are_named(loss, outputs, target, message):
    class Constant(nn.Module):
        def forward(self, x):
            return outputs

    model = TorchModel(Constant(), torch.device("cpu"))
    batch = torch.zeros(4) if target is None else (torch.zeros(4), target)
    if loss == "mse" and target is not None and len(target) != 4:
        batch = (torch.zeros(len(target)), target)
    with pytest.raises(ConfigError, match=message):
        make_objective(loss)(model, batch)


# --- words in the driver ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "outputs", "loss"),
    [
        (np.array([0, 3, 1]), None, "cross_entropy"),
        (np.array([0, 3, 1], np.uint8), (3, 4), "cross_entropy"),
        (np.array([[0, 3], [1, 1]]), (2, 2, 4), "cross_entropy"),
        (np.array([0, 1, 1]), (3, 1), "bce"),
        (np.array([False, True]), (2,), "bce"),
        (np.array([[0], [1]]), (2, 1), "bce"),
        (np.array([0, 1, 1]), (3, 2), "cross_entropy"),
        (np.array([0, 7, 1]), (3, 1), "mse"),
        (np.array([[0, 1, 1], [1, 0, 0]]), (2, 3), "bce"),
        (np.array([[0, 5, 1], [1, 0, 0]]), (2, 3), "mse"),
        (np.array([[0, 0, 1], [1, 0, 0]]), (2, 3), "cross_entropy"),
        (np.array([0.0, 1.0]), (2, 1), "mse"),
        (np.array([[0.0, 1.0]]), (1, 2), "cross_entropy"),
        (np.array([[0.0, 1.0]]), None, "cross_entropy"),
        (np.array([[0.5, 0.5]]), (1, 2), "mse"),
        (torch.tensor([0, 2]), None, "cross_entropy"),
    ],
)
def test_a_loss_follows_from_target_and_outputs(target, outputs, loss):
    found = infer_loss(target_facts(target), outputs)
    assert (found.loss, found.metrics) == (loss, ("mae",) if loss == "mse" else ("accuracy",))
    assert found.why


def test_inference_takes_a_carried_loss_and_refuses_to_guess():
    assert infer_loss(None, carries_loss=True).loss is None
    with pytest.raises(ConfigError, match="no target"):
        infer_loss(None)
    with pytest.raises(ConfigError, match="Encode labels"):
        infer_loss(target_facts(np.array(["cat", "dog"])))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("loss", "mes", "Did you mean 'mse'"),
        ("optimizer", "Adam", "Did you mean 'adam'"),
        ("optimizer", 0.1, "callable"),
        ("optimizer", torch.optim.SGD([nn.Parameter(torch.ones(1))]), r"functools.partial\(SGD"),
        ("metrics", ["acuracy"], "Did you mean 'accuracy'"),
        ("metrics", [lambda o, t: 0], "has no name"),
        ("metrics", ["mse", "mse"], "occurs twice"),
        ("metrics", [5], "neither a word"),
        ("metrics", {"mine": "mse"}, "expected a dict"),
        ("metrics", {"loss": abs}, "is taken"),
        ("metrics", {"rmse": abs}, "is taken"),
        ("scheduler", "cosine", "callable"),
        (
            "scheduler",
            torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 2),
            r"StepLR\(optimizer",
        ),
    ],
)
def test_words_are_checked_before_anything_starts(option, value, message):
    with pytest.raises(ConfigError, match=message):
        check_words(**{option: value})


def test_words_that_work_pass():
    check_words()
    check_words(
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD,
        metrics=["accuracy", abs],
        scheduler=torch.optim.lr_scheduler.LinearLR,
    )


def test_checking_words_does_not_import_torch():
    code = (
        "import sys; from lepton_ray.train.words import check_words; check_words('mse', 'adam', ['mae']); "
        "import lepton_ray.callbacks; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
