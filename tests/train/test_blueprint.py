import functools
import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lepton_ray.errors import ConfigError
from lepton_ray.train import blueprint

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.linear(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


def make_block():
    return Block()


def travel(model, seed=0):
    return blueprint.build(pickle.loads(pickle.dumps(blueprint.pack(model))), CPU, seed)


def test_module_arrives_with_its_weights_and_its_ties():
    model = Tied()
    arrived = travel(model)
    assert arrived.user_module.first.weight is arrived.user_module.second.weight
    assert torch.equal(arrived(torch.eye(4)), model(torch.eye(4)))


@pytest.mark.parametrize(
    "factory",
    [make_block, Block, functools.partial(Block, width=3), lambda: Block(3)],
    ids=["function", "class", "partial", "lambda"],
)
def test_factory_makes_the_same_model_in_every_worker(factory):
    packed = blueprint.pack(factory)
    torch.manual_seed(1)
    first = blueprint.build(packed, CPU, seed=7).state()
    torch.manual_seed(2)
    second = blueprint.build(packed, CPU, seed=7).state()
    other = blueprint.build(packed, CPU, seed=8).state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


@pytest.mark.slow
def test_classes_of_a_script_travel_by_value(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from lepton_ray.train import blueprint\n"
        "class Mine(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) + 1\n"
        "import pickle\n"
        "packed = [blueprint.pack(Mine(2, 2)), blueprint.pack(lambda: Mine(2, 2))]\n"
        "pickle.dump(packed, open(sys.argv[1], 'wb'))\n"
    )
    out = tmp_path / "packed.pickle"
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, script, out], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=100)
    for packed in pickle.loads(out.read_bytes()):
        model = blueprint.build(packed, CPU, seed=0)
        assert type(model.user_module).__name__ == "Mine"
        assert model(torch.ones(1, 2)).shape == (1, 2)


def with_attribute(name, value):
    model = nn.Sequential(nn.Linear(2, 2))
    model.encoder = Block()
    setattr(model.encoder, name, value)
    return model


def frozen():
    return nn.Linear(2, 2).requires_grad_(False)


def on_meta():
    with torch.device("meta"):
        return nn.Linear(2, 2)


def ddp():
    # Made without its __init__, which needs a process group.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(2, 2)
    return wrapper


def needs_arguments(depth, width, *more, bias=True, **options):
    raise AssertionError("never called")


class LegacyModel:
    def __call__(self, x):
        return x


LegacyModel.__module__ = "tf_keras.src.models"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_attribute("lock", threading.Lock()), r"encoder\.lock \(a _thread\.lock\).*without arguments"),
        (lambda: with_attribute("tools", {"next": (i for i in ())}), r"encoder\.tools\['next'\] \(a generator"),
        (lambda: nn.Sequential(nn.ReLU()), "Sequential has no parameters"),
        (frozen, "all parameters are frozen"),
        (on_meta, r"model\.weight is on the meta device"),
        (lambda: nn.LazyLinear(3), r"model\.weight has no shape yet"),
        pytest.param(
            lambda: with_attribute("inner", torch.compile(Block())),
            r"model\.encoder\.inner .* is the result of torch\.compile.*_orig_mod",
            marks=pytest.mark.slow,
        ),
        (ddp, r"already distributed.*\.module"),
        (lambda: needs_arguments, "needs_arguments needs depth, width; .*functools.partial"),
        (lambda: functools.partial(needs_arguments, 1), "needs_arguments needs width"),
        (lambda: 3, "model=int: expected a torch.nn.Module, a Keras model, or a function"),
        (LegacyModel, "Keras 2 model.*TF_USE_LEGACY_KERAS"),
    ],
)
def test_model_that_cannot_travel_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        blueprint.pack(make())


def test_factory_that_makes_no_model_is_named():
    packed = blueprint.pack(lambda: None)
    with pytest.raises(ConfigError, match=r"<lambda>\(\) returned NoneType; expected a torch.nn.Module"):
        blueprint.build(packed, CPU, seed=0)


def test_culprit_is_found_through_references_to_parents():
    model = with_attribute("lock", threading.Lock())
    model.encoder.parent = [model]
    with pytest.raises(ConfigError, match=r"model\.encoder\.lock"):
        blueprint.pack(model)


def test_trained_weights_come_back_into_the_same_object():
    model = Tied()
    weight = model.first.weight
    trained = travel(model)
    with torch.no_grad():
        for tensor in trained.state().values():
            tensor.mul_(3).add_(1)
    blueprint.restore_into(model, {name: tensor.clone() for name, tensor in trained.state().items()})
    assert model.first.weight is weight
    assert torch.equal(weight, trained.user_module.first.weight)
    assert model.scale == 4
    blueprint.restore_into(model, {name: tensor.numpy() * 0 for name, tensor in trained.state().items()})
    assert not weight.any()


def test_weights_of_another_model_are_refused():
    with pytest.raises(ConfigError, match=r"linear\.weight has shape \(4, 4\) there and \(3, 3\) in the model"):
        blueprint.restore_into(Block(3), travel(Block(4)).state())
    with pytest.raises(ConfigError, match="has shape none there"):
        blueprint.restore_into(Block(3), {})


def test_description_tells_structures_apart_and_not_weights():
    torch.manual_seed(0)
    first = blueprint.describe(Block(3))
    torch.manual_seed(1)
    assert blueprint.describe(Block(3)) == first == blueprint.describe(blueprint.pack(Block(3)))
    assert blueprint.describe(Block(4))["sha256"] != first["sha256"]
    assert blueprint.describe(Block(3).double())["sha256"] != first["sha256"]
    assert first["class"] == "Block"
    assert first["parameters"] == sum(p.numel() for p in Block(3).parameters())
    assert json.loads(json.dumps(first)) == first
    assert blueprint.describe(functools.partial(Block, 3)) == {"class": "Block", "parameters": None, "sha256": None}


def test_driver_needs_no_torch():
    code = "import sys, lepton_ray.train.blueprint; sys.exit('torch' in sys.modules or 'keras' in sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)


def test_numpy_generator_of_a_factory_is_seeded():
    def make():
        model = nn.Linear(2, 2)
        model.weight.data = torch.from_numpy(np.random.normal(size=(2, 2)).astype("float32"))
        return model

    first, second = (travel(make, seed=2**40 + 5).state()["weight"] for _ in range(2))
    assert torch.equal(first, second)
