"""Optimizers and schedules: what words make, steps that keep torch._dynamo out, states that resume exactly."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook

from lepton_ray.errors import ConfigError
from lepton_ray.train import optimizers
from lepton_ray.train.model import TorchModel
from lepton_ray.train.optimizers import PerEpoch, make_optimizer, make_scheduler
from lepton_ray.train.tree import flatten, unflatten
from lepton_ray.train.words import OPTIMIZERS

STOCK = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "fused adam": functools.partial(torch.optim.Adam, fused=True),
    "adafactor": torch.optim.Adafactor,
}


def a_model(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return TorchModel(module, torch.device("cpu"))


def fill_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters().values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- what is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", OPTIMIZERS)
def test_a_word_is_torchs_class_with_torchs_defaults(word):
    model = a_model()
    (made,) = make_optimizer(word, model).named.values()
    plain = getattr(torch.optim, OPTIMIZERS[word])(list(model.parameters().values()))
    assert type(made) is type(plain)
    assert made.defaults == plain.defaults
    assert [id(p) for p in made.param_groups[0]["params"]] == [id(p) for p in plain.param_groups[0]["params"]]


def test_a_class_or_a_partial_gets_the_trainable_parameters():
    model = a_model()
    model.module[0].weight.requires_grad_(False)
    for spec in (torch.optim.SGD, functools.partial(torch.optim.SGD, lr=0.5)):
        made = make_optimizer(spec, model).named["optimizer"]
        assert len(made.param_groups[0]["params"]) == 3
    assert made.param_groups[0]["lr"] == 0.5


def test_a_callable_gets_the_module_and_may_return_one_a_list_or_a_dict():
    model = a_model()

    def first(module):
        groups = [{"params": module[0].parameters(), "lr": 1.0}, {"params": module[2].parameters()}]
        return torch.optim.SGD(groups, lr=0.1)

    def half(module):
        return torch.optim.SGD(module[0].parameters())

    one = make_optimizer(first, model)
    assert [group["lr"] for group in one.named["optimizer"].param_groups] == [1.0, 0.1]
    assert one.shape(one.named) is one.named["optimizer"]
    several = make_optimizer(lambda module: [half(module), first(module)], model)
    assert list(several.named) == ["0", "1"]
    assert several.shape(several.named) == list(several.named.values())
    named = make_optimizer(lambda module: {"critic": half(module)}, model)
    assert named.shape({"critic": 5}) == {"critic": 5}


OUTSIDE = a_model(seed=5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "no optimizer"),
        ("sdg", "Did you mean 'sgd'"),
        (torch.optim.SGD(OUTSIDE.module.parameters()), "holds the parameters of this process"),
        (lambda module: None, "returned NoneType"),
        (lambda module: [], "returned none"),
        (lambda module: torch.optim.LBFGS(module.parameters()), "LBFGS"),
        (lambda module: torch.optim.SGD(OUTSIDE.module.parameters()), "4 of its 4 parameters are not the model's"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(spec, a_model())


def test_a_frozen_model_is_refused():
    model = a_model()
    model.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        make_optimizer("adam", model)


# --- steps -----------------------------------------------------------------------------------------------------------

QUIET = """
import functools, importlib.util, os, sys, warnings
import torch
from torch import nn
from torch.optim import lr_scheduler
from lepton_ray.train import optimizers
from lepton_ray.train.model import TorchModel

warnings.simplefilter("error")  # such as that of a scheduler which believes that its optimizer was not stepped
specs = {"sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
         "adam": "adam", "adamw": "adamw", "rmsprop": "rmsprop", "adagrad": "adagrad"}
built, ordinary = {}, {}
def a_model():
    torch.manual_seed(0)
    return TorchModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.device("cpu"))
def run(model, steps):
    made = optimizers.make_optimizer(spec, model)
    schedule = optimizers.make_scheduler(lambda o: lr_scheduler.StepLR(o, 2, 0.5), made)
    (optimizer,) = made.named.values()
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        for parameter in model.parameters().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        step(optimizer)
        schedule.after_step()
    return [*model.state().values()], optimizer.state_dict()

step = optimizers.step
for name, spec in specs.items():
    built[name] = run(a_model(), 5)
    optimizer = next(iter(optimizers.make_optimizer(spec, a_model()).named.values()))
    optimizer.load_state_dict(built[name][1])
def draw():
    "Use what Keras keeps from being compiled."
    return keras.random.normal((3,), seed=1) if has_keras else torch.zeros(3)
has_keras = importlib.util.find_spec("keras") is not None
if has_keras:
    os.environ["KERAS_BACKEND"] = "torch"
    from lepton_ray.train.keras import keras
quiet_draw = draw()
assert "torch._dynamo" not in sys.modules, "torch._dynamo was imported"
assert "sklearn" not in sys.modules, "scikit-learn was imported"

step = lambda optimizer: optimizer.step()
for name, spec in specs.items():
    ordinary[name] = run(a_model(), 5)
assert "torch._dynamo" in sys.modules
assert torch.equal(draw(), quiet_draw)
assert torch._dynamo.is_compiling() is False  # the real one
for name in specs:
    (ours, our_state), (theirs, their_state) = built[name], ordinary[name]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), name
    assert our_state["param_groups"] == their_state["param_groups"], name
    for index, state in our_state["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(their_state["state"][index][key])), (name, key)
assert not hasattr(torch.optim.Optimizer.state_dict.__wrapped__, "__dynamo_disable") or (
    torch.optim.Optimizer.state_dict.__wrapped__.__dynamo_disable.__module__.startswith("torch"))
"""


@pytest.mark.slow
def test_steps_and_keras_leave_dynamo_out_and_equal_the_ordinary_ones_bit_for_bit():
    """In a process of its own, since the ordinary step imports torch._dynamo for good."""
    subprocess.run([sys.executable, "-c", QUIET], check=True, timeout=100)


READY = """
import sys, torch
from lepton_ray.train import optimizers

class Own(torch.optim.SGD):
    pass

optimizers.quiet_construction()
for kind, is_needed in ((torch.optim.SGD, False), (Own, True)):
    optimizers.prepare_step(kind([torch.zeros(1, requires_grad=True)], lr=0.1))
    assert ("torch._dynamo" in sys.modules) == is_needed, kind
"""


@pytest.mark.slow
def test_what_the_first_step_of_ones_own_optimizer_imports_is_there_before_it():
    """Nobody trains yet while a worker is built, but all wait for a newcomer's first step."""
    subprocess.run([sys.executable, "-c", READY], check=True, timeout=100)


def test_the_undecorated_step_is_found_on_this_torch():
    """A torch that wraps `step` in another way costs 2 s per worker: have a look at `_bare_step` then."""
    for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad", "fused adam"):
        optimizer = STOCK[name](list(a_model().parameters().values()))
        bare = optimizers._bare_step(optimizer)
        assert bare is not None, name
        assert bare.__qualname__.endswith(".step")
        schedules.StepLR(optimizer, 2)
        assert optimizers._bare_step(optimizer) is bare


class OwnSGD(torch.optim.SGD):
    """A user's optimizer."""


def test_anything_unusual_takes_the_ordinary_way():
    def stock(**options):
        return torch.optim.SGD(list(a_model().parameters().values()), **options)

    patched = stock()
    patched.step = lambda: None
    patched_and_scheduled = stock()
    patched_and_scheduled.step = functools.wraps(torch.optim.SGD.step)(lambda self: None).__get__(patched_and_scheduled)
    schedules.StepLR(patched_and_scheduled, 2)
    hooked = stock()
    hooked.register_step_post_hook(lambda *args: None)
    unusual = [
        patched,
        patched_and_scheduled,
        hooked,
        stock(differentiable=True),
        OwnSGD(list(a_model().parameters().values())),
        STOCK["adafactor"](list(a_model().parameters().values())),
    ]
    assert [optimizers._bare_step(optimizer) for optimizer in unusual] == [None] * len(unusual)


def test_hooks_run():
    model, calls = a_model(), []
    (optimizer,) = make_optimizer("sgd", model).named.values()
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    handle = register_optimizer_step_post_hook(lambda *args: calls.append("after"))
    try:
        fill_gradients(model, 0)
        before = model.module[0].weight.detach().clone()
        optimizers.step(optimizer)
    finally:
        handle.remove()
    assert calls == ["before", "after"]
    assert not torch.equal(before, model.module[0].weight)


# --- schedules -------------------------------------------------------------------------------------------------------


class Warmup:
    """A callable with state, as LambdaLR accepts."""

    def __init__(self):
        self.slope = 0.1

    def __call__(self, epoch):
        return min(1.0, self.slope * (epoch + 1))


SCHEDULES = {
    "step": lambda o: schedules.StepLR(o, 2, 0.5),
    "several steps": lambda o: schedules.MultiStepLR(o, [2, 5, 5, 9], 0.3),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 12),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "callable object": lambda o: schedules.LambdaLR(o, Warmup()),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "chain": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)]),
    "nested sequence": lambda o: schedules.SequentialLR(
        o,
        [
            schedules.SequentialLR(o, [schedules.LinearLR(o, total_iters=3), schedules.StepLR(o, 2)], [3]),
            schedules.ExponentialLR(o, 0.5),
        ],
        [7],
    ),
    "two": lambda o: [schedules.ConstantLR(o, 0.5, 4), schedules.ReduceLROnPlateau(o, patience=0)],
}


def through_a_checkpoint(state):
    """Do what saving and loading do to a state."""
    tensors = {}
    told = json.loads(json.dumps(flatten(state, "schedulers", tensors)))
    return unflatten(told, tensors.__getitem__)


def build(spec, model):
    made = make_optimizer(STOCK["sgd"], model)
    return made.named["optimizer"], make_scheduler(spec, made)


def advance(model, optimizer, scheduler, numbers):
    """Train over step numbers, with an epoch of two steps; return the rates."""
    rates = []
    for number in numbers:
        fill_gradients(model, number)
        optimizers.step(optimizer)
        scheduler.after_step()
        if number % 2:
            scheduler.after_epoch(max(3.0, 5.0 - number))
        rates.append([scheduler.rate(), optimizer.param_groups[0]["momentum"]])
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")  # torch, building a nested one
@pytest.mark.parametrize("per_epoch", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_exactly_from_its_saved_state(name, per_epoch):
    spec = PerEpoch(SCHEDULES[name]) if per_epoch else SCHEDULES[name]
    model = a_model()
    whole = advance(model, *build(spec, model), range(16))
    for cut in (0, 1, 4, 9):
        first, second = a_model(), a_model(seed=1)
        optimizer, scheduler = build(spec, first)
        rates = advance(first, optimizer, scheduler, range(cut))
        saved = through_a_checkpoint(scheduler.state_dict())
        optimizer_state = optimizer.state_dict()
        second.module.load_state_dict(first.module.state_dict())
        optimizer, scheduler = build(spec, second)
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(saved)
        assert rates + advance(second, optimizer, scheduler, range(cut, 16)) == whole
        for ours, expected in zip(second.state().values(), model.state().values()):
            assert torch.equal(ours, expected)


def test_rates_follow_steps_or_epochs():
    def decays(o):
        return schedules.ExponentialLR(o, 0.5)

    model = a_model()
    per_step = [rate for rate, _ in advance(model, *build(decays, model), range(4))]
    assert per_step == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    model = a_model()
    per_epoch = [rate for rate, _ in advance(model, *build(PerEpoch(decays), model), range(4))]
    assert per_epoch == pytest.approx([0.1, 0.05, 0.05, 0.025])
    model = a_model()
    assert [rate for rate, _ in advance(model, *build(None, model), range(2))] == [0.1, 0.1]


def test_a_plateau_looks_at_the_test_loss_first():
    def plateau(o):
        return schedules.ReduceLROnPlateau(o, patience=0, factor=0.5)

    _, scheduler = build(plateau, a_model())
    for loss in (3.0, 2.0, None, 1.0, None):
        scheduler.after_epoch(loss)
    assert scheduler.rate() == 0.1
    scheduler.after_epoch(9.0)
    assert scheduler.rate() == 0.05


def test_a_schedule_gets_what_the_optimizer_callable_returned():
    model = a_model()
    made = make_optimizer(lambda m: {"a": torch.optim.SGD(m.parameters(), lr=1.0)}, model)
    scheduler = make_scheduler(lambda o: {"a": schedules.ConstantLR(o["a"], 0.5)}, made)
    assert scheduler.rate() == 0.5


class Odd(schedules.LambdaLR):
    """A schedule that keeps what JSON has no word for."""

    def __init__(self, optimizer, kept):
        self.kept = kept
        super().__init__(optimizer, lambda step: 1.0)


def test_state_keeps_its_types_and_refuses_what_it_cannot():
    kept = {"pair": (1, (2.5, None)), "counts": Counter({3: 2}), "by": {1: "a"}, "rate": torch.tensor([0.1, 0.2])}
    _, scheduler = build(lambda o: Odd(o, kept), a_model())
    saved = through_a_checkpoint(scheduler.state_dict())
    _, other = build(lambda o: Odd(o, None), a_model())
    other.load_state_dict(saved)
    found = other._all[0].kept
    rates = found.pop("rate"), kept.pop("rate")
    assert torch.equal(*rates)
    assert found == kept
    assert type(found["counts"]) is Counter
    with pytest.raises(ConfigError, match=r"Odd/kept is a builtins\.object"):
        build(lambda o: Odd(o, object()), a_model())


@pytest.mark.parametrize(("spec", "message"), [("cosine", "callable"), (lambda o: None, "returned NoneType")])
def test_schedules_that_cannot_work_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build(spec, a_model())
