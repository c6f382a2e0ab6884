"""Metrics: sums over any pieces give the value over the whole."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lepton_ray.errors import ConfigError
from lepton_ray.train.metrics import finish, make_metrics

N, C, T = 30, 7, 4
torch.manual_seed(0)
SCORES = torch.randn(N, C)
CLASSES = torch.randint(0, C, (N,))
SCORES_T = torch.randn(N, T, C)
TOKENS = torch.randint(0, C, (N, T)).masked_fill(torch.rand(N, T) < 0.4, -100)
VALUES = torch.randn(N, C)
COUNTED = TOKENS != -100
HITS = (SCORES.argmax(1) == CLASSES).double().mean()
DIFFERENCE = (SCORES.double() - VALUES.double()).flatten()

CASES = {
    "class indices": ("accuracy", SCORES, CLASSES, HITS),
    "one-hot": ("accuracy", SCORES, F.one_hot(CLASSES, C).float(), HITS),
    "tokens": ("accuracy", SCORES_T, TOKENS, (SCORES_T.argmax(-1) == TOKENS)[COUNTED].double().mean()),
    "images": ("accuracy", SCORES_T.movedim(-1, 1)[..., None], TOKENS[..., None], None),
    "binary": ("accuracy", SCORES[:, :1], CLASSES > 3, ((SCORES[:, 0] > 0) == (CLASSES > 3)).double().mean()),
    "top5": ("top5", SCORES, CLASSES, (SCORES.topk(5).indices == CLASSES[:, None]).any(1).double().mean()),
    "mae": ("mae", SCORES, VALUES, DIFFERENCE.abs().mean()),
    "mse": ("mse", SCORES, VALUES, DIFFERENCE.square().mean()),
    "rmse": ("rmse", SCORES, VALUES, DIFFERENCE.square().mean().sqrt()),
    "perplexity": (
        "perplexity",
        SCORES_T,
        TOKENS,
        F.cross_entropy(SCORES_T.double().flatten(0, 1), TOKENS.flatten()).exp(),
    ),
}
CASES["images"] = (*CASES["images"][:3], CASES["tokens"][3])


def value_over(metric, name, outputs, target, cuts):
    edges = [0, *sorted(cuts), len(target)]
    sums = [metric(outputs[a:b], target[a:b]) for a, b in zip(edges, edges[1:]) if a < b]
    assert all(total.dtype == torch.float64 for total, _ in sums)
    return finish({name: (float(sum(total for total, _ in sums)), sum(weight for _, weight in sums))})[name]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=4))
def test_pieces_give_the_value_of_the_whole(case, cuts):
    name, outputs, target, expected = CASES[case]
    metric = make_metrics(name)[name]
    assert value_over(metric, name, outputs, target, cuts) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("loss", "border"), [("bce", 0.0), (nn.BCEWithLogitsLoss(), 0.0), (nn.BCELoss(), 0.5)])
def test_a_binary_loss_makes_accuracy_count_each_output(loss, border):
    target = F.one_hot(CLASSES, C)
    expected = (SCORES.gt(border) == target.bool()).double().mean()
    metric = make_metrics("accuracy", loss)["accuracy"]
    assert value_over(metric, "accuracy", SCORES, target, [3]) == pytest.approx(float(expected))


def mean_error(outputs, target):
    return (outputs - target).abs().mean()


@pytest.mark.parametrize(
    "metric",
    [
        mean_error,
        lambda o, t: float((o - t).abs().mean()),
        lambda o, t: (o - t).abs().mean(1),
        lambda o, t: ((o - t).abs().sum(), o.numel()),
        lambda o, t: ((o - t).abs().sum(), torch.tensor(o.numel())),
    ],
)
def test_callables_may_return_a_mean_values_or_a_pair(metric):
    (made,) = make_metrics({"mine": metric}).values()
    found = value_over(made, "mine", SCORES, VALUES, [1, 10])
    assert found == pytest.approx(float((SCORES - VALUES).abs().mean()), rel=1e-6)


def test_names_are_words_function_names_or_keys():
    assert list(make_metrics(["accuracy", mean_error])) == ["accuracy", "mean_error"]
    assert list(make_metrics({"a": mean_error, "b": mean_error})) == ["a", "b"]
    assert list(make_metrics(mean_error)) == ["mean_error"]
    assert make_metrics(None) == {}


def test_logits_of_an_object_are_looked_at():
    total, weight = make_metrics("accuracy")["accuracy"](SimpleNamespace(logits=SCORES), CLASSES)
    assert float(total) / weight == pytest.approx(float(HITS))


def test_nothing_counted_is_not_a_number_and_a_huge_loss_is_an_infinite_perplexity():
    assert math.isnan(finish({"accuracy": (0.0, 0.0)})["accuracy"])
    assert finish({"perplexity": (5000.0, 1.0)}) == {"perplexity": math.inf}
    assert math.isnan(finish({"rmse": (math.nan, 1.0)})["rmse"])


def test_a_metric_keeps_no_graph():
    outputs = SCORES.clone().requires_grad_()
    for metric in make_metrics({"mine": mean_error, "other": lambda o, t: ((o - t).sum(), 3)}).values():
        assert not metric(outputs, VALUES)[0].requires_grad
    assert not make_metrics("mse")["mse"](outputs, VALUES)[0].requires_grad


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'top5'"):
        make_metrics(["top-5"])
    with pytest.raises(ConfigError, match="the batch has none"):
        make_metrics("mse")["mse"](SCORES, None)
    with pytest.raises(ConfigError, match="returned NoneType"):
        make_metrics({"mine": lambda o, t: None})["mine"](SCORES, CLASSES)
