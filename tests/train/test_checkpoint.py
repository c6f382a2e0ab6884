"""Checkpoints: exact, never half, never unpickled, and no burden for the training."""

import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.errors import CheckpointError, WaitTimeout
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint import Checkpointer
from lepton_ray.train.checkpoint_format import DTYPES, load, newest
from lepton_ray.train.tree import flatten, unflatten


@pytest.fixture(params=["disk", "url"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield Folder(str(tmp_path / "checkpoints"))
        return
    made = Folder(f"memory://{uuid.uuid4().hex}/checkpoints")
    yield made
    made.delete_all()


def save(folder, *steps, keep=10, metrics=(), **options):
    """Save checkpoints whose content follows from the step; return the events."""
    events = []
    saver = Checkpointer(folder, keep=keep, on_event=lambda kind, **fields: events.append((kind, fields)), **options)
    for i, step in enumerate(steps):
        saver.save(
            step, tensors_of(step), {"step": step, "loop": {"measured": {"loss": metrics[i]} if metrics else {}}}
        )
    saver.close()
    return events


def tensors_of(step):
    return {"weight": torch.full((50, 7), float(step)), "count": torch.tensor(step)}


def assert_is(folder, step):
    tensors, state = load(folder, step)
    assert equal(tensors, tensors_of(step))
    assert state["step"] == step


def equal(a, b):
    """Compare trees bit for bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return (
            list(a) == list(b) and all(type(k) is type(j) for k, j in zip(a, b)) and all(equal(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --- exactness


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_tensors_of_every_type_and_shape_come_back(tmp_path_factory, data):
    folder = Folder(str(tmp_path_factory.mktemp("c")))
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    wanted = data.draw(
        st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(list(DTYPES.values())), shapes), max_size=6)
    )
    tensors = {}
    for name, (dtype, shape) in wanted.items():
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = bits.view(dtype).reshape(shape)
    saver = Checkpointer(folder, keep=1)
    saver.save(3, tensors, {"tensors": list(tensors.values())})
    saver.close()
    found, state = load(folder, 3)
    assert equal({name: found[name] for name in tensors}, tensors)
    assert len(found) == len(tensors)
    assert equal(state, {"tensors": list(tensors.values())})


def test_the_file_is_plain_safetensors(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    folder = Folder(str(tmp_path))
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in zip("abcd", (torch.int8, torch.bfloat16))
    }
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).t()
    saver = Checkpointer(folder, keep=1)
    saver.save(1, tensors, None)
    saver.close()
    found = safetensors_torch.load_file(tmp_path / "step-00000001" / "state-0.safetensors")
    assert equal({name: found[name] for name in tensors}, {name: value.contiguous() for name, value in tensors.items()})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
keys = st.text(max_size=3) | st.sampled_from(["$tensor", "$dict", "$tuple"]) | st.integers() | st.booleans()
trees = st.recursive(
    scalars | st.builds(lambda x: torch.tensor(x, dtype=torch.float64), st.floats()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(tree=trees)
def test_any_tree_comes_back_through_json(tree):
    tensors = {}
    told = json.loads(json.dumps(flatten(tree, "root", tensors)))
    assert equal(unflatten(told, tensors.__getitem__), tree)
    again = json.loads(json.dumps(flatten(told, "root", {})))
    assert equal(unflatten(again, None), told)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), amsgrad=True),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
        lambda p: torch.optim.Adam([{"params": p[:1], "betas": (0.8, 0.9)}, {"params": p[1:], "lr": math.inf}]),
    ],
)
def test_optimizers_come_back(make):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = make(parameters)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    before = optimizer.state_dict()
    tensors = {}
    told = flatten(before, "optimizer", tensors)
    after = unflatten(json.loads(json.dumps(told)), tensors.__getitem__)
    assert equal(after, before)
    make(parameters).load_state_dict(after)


def test_schedulers_come_back_with_their_counters():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    state = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict()
    back = unflatten(json.loads(json.dumps(flatten(state, "s", {}))), None)
    assert type(back["milestones"]) is Counter
    assert equal(back, state)


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"optimizer/state/0/hook is a .*function"):
        flatten({"state": {0: {"hook": lambda: 0}}}, "optimizer", {})
    saver = Checkpointer(Folder(str(tmp_path)), keep=1)
    with pytest.raises(CheckpointError, match=r"state/callbacks/0 is a builtins.set"):
        saver.save(1, {}, {"callbacks": [{1}]})
    with pytest.raises(CheckpointError, match=r"'w' \(torch.complex128"):
        saver.save(1, {"w": torch.zeros(1, dtype=torch.complex128)}, None)
    with pytest.raises(CheckpointError, match="sparse"):
        saver.save(1, {"w": torch.eye(2).to_sparse()}, None)
    saver.close()


# --- copy and write


def test_training_may_go_on_after_the_copy(folder):
    saver = Checkpointer(folder, keep=1)
    tensors, state = tensors_of(5), {"step": 5, "list": [1]}
    saver.prepare(tensors, state)
    assert saver.save(5, tensors, state, generation=2)
    for tensor in tensors.values():
        tensor.zero_()
    state["list"].append(2)
    saver.wait()
    assert_is(folder, 5)
    manifest, complaints = newest(folder)
    assert (manifest.step, manifest.generation, complaints) == (5, 2, [])
    assert manifest.state == {"step": 5, "list": [1]}
    saver.close()


def test_a_checkpoint_exists_when_what_goes_before_it_is_done(folder):
    save(folder, 1)
    may_go, events = threading.Event(), []
    saver = Checkpointer(folder, keep=5, on_event=lambda kind, **fields: events.append((kind, fields["step"])))
    written = threading.Event()

    def after():
        written.set()
        assert may_go.wait(20)

    saver.save(2, tensors_of(2), {"step": 2}, after=after)
    assert written.wait(20)
    assert newest(folder)[0].step == 1
    may_go.set()
    saver.wait()
    assert newest(folder)[0].step == 2
    saver.save(3, tensors_of(3), {"step": 3}, after=lambda: 1 / 0)
    saver.close()
    assert events == [("checkpoint_saved", 2), ("checkpoint_failed", 3)]
    for step in (1, 2):
        assert_is(folder, step)
        assert folder.sub(f"step-0000000{step}").names() == ["manifest.json", "state-0.safetensors"]
    assert folder.names() == ["step-00000001", "step-00000002"]


def test_the_buffer_is_kept(tmp_path):
    saver = Checkpointer(Folder(str(tmp_path)), keep=1)
    saver.prepare(tensors_of(0), {"step": 0})
    saver.wait()
    place = saver._buffer.data_ptr()
    for step in range(3):
        saver.save(step, tensors_of(step), {"step": step})
        assert saver._buffer.data_ptr() == place
    saver.save(3, {"more": torch.ones(1000)}, None)
    saver.close()
    assert load(Folder(str(tmp_path)), 3)[0]["more"].sum() == 1000


def test_a_step_may_be_saved_again(folder):
    save(folder, 1, 2)
    saver = Checkpointer(folder, keep=5)
    saver.save(2, tensors_of(7), {"step": 7}, after=lambda: assert_is(folder, 2))  # the old one stands until the end
    saver.close()
    assert load(folder, 2)[1] == {"step": 7}
    assert folder.sub("step-00000002").names() == ["manifest.json", "state-1.safetensors"]


class Gate(Folder):
    """A folder whose writes wait for the test."""

    __slots__ = ()
    entered, opened = threading.Event(), threading.Event()

    def open(self, name, mode):
        if mode == "wb":
            Gate.entered.set()
            assert Gate.opened.wait(20)
        return Folder(self.url).open(name, mode)

    def sub(self, *names):
        return Gate(Folder(self.url).sub(*names).url)


def test_a_save_waits_for_the_write_before_but_not_for_ever(tmp_path):
    Gate.entered.clear()
    Gate.opened.clear()
    events = []
    saver = Checkpointer(
        Gate(str(tmp_path)), keep=9, write_timeout_s=0.05, on_event=lambda kind, **fields: events.append((kind, fields))
    )
    saver.save(1, tensors_of(1), {"step": 1})
    assert Gate.entered.wait(20)
    assert not saver.save(2, tensors_of(2), {"step": 2})
    with pytest.raises(WaitTimeout, match="0.05 s for checkpoints"):
        saver.wait()
    saver.write_timeout_s = 20
    threading.Timer(0.05, Gate.opened.set).start()
    saver.save(3, tensors_of(3), {"step": 3})
    saver.close()
    assert [(kind, fields["step"]) for kind, fields in events] == [
        ("checkpoint_saved", 1),
        ("checkpoint_failed", 2),
        ("checkpoint_saved", 3),
    ]
    assert events[2][1]["waited_s"] > 0
    assert_is(Folder(str(tmp_path)), 1)
    assert_is(Folder(str(tmp_path)), 3)


def test_an_event_tells_what_was_saved(tmp_path):
    ((kind, fields),) = save(Folder(str(tmp_path)), 4)
    assert kind == "checkpoint_saved"
    assert fields["path"] == str(tmp_path / "step-00000004")
    assert fields["size_bytes"] == (tmp_path / "step-00000004" / "state-0.safetensors").stat().st_size
    assert fields["duration_s"] >= fields["blocked_s"] >= fields["waited_s"] >= 0


# --- retention


def test_the_newest_and_the_best_are_kept(folder):
    save(folder, 1, 2, 3, 4, 5, 6, keep=2, best="loss", metrics=[3.0, 1.0, 2.0, math.nan, 1.0, 4.0])
    assert folder.names() == ["step-00000002", "step-00000005", "step-00000006"]
    save(folder, 7, keep=2, best="loss", metrics=[0.5])  # a resume knows what is there
    assert folder.names() == ["step-00000006", "step-00000007"]
    save(folder, 8, keep=1, best="loss", best_mode="max", metrics=[9.0])
    assert folder.names() == ["step-00000008"]


def test_larger_is_better_for_accuracy(tmp_path):
    assert Checkpointer(Folder(str(tmp_path)), keep=1, best="test_accuracy").is_max_best
    assert not Checkpointer(Folder(str(tmp_path)), keep=1, best="test_loss").is_max_best
    assert not Checkpointer(Folder(str(tmp_path)), keep=1, best="accuracy", best_mode="min").is_max_best


def test_what_another_life_left_goes_but_foreign_ones_stay(folder):
    save(folder, 1, 2, 8)
    folder.sub("step-00000005").write("state-0.safetensors", b"half")
    folder.sub("step-00000007").write("manifest.json", b"{}")
    folder.sub("mine").write("notes", b"")
    folder.sub("step-00000008").write("manifest.json", b"")
    save(folder, 3, keep=2)
    assert folder.names() == ["mine", "step-00000002", "step-00000003", "step-00000007"]


# --- damage


def damaged(tmp_path, harm):
    """Save steps 1 and 2, do harm to step 2; return the one complaint."""
    folder = Folder(str(tmp_path))
    save(folder, 1, 2)
    harm(tmp_path / "step-00000002")
    manifest, complaints = newest(folder)
    assert manifest.step == 1
    assert_is(folder, 1)
    with pytest.raises(CheckpointError) as error:
        load(folder, 2)
    (complaint,) = complaints
    assert str(error.value) == complaint
    return complaint


def rewrite(path, **fields):
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **fields}))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda at: flip(at / "state-0.safetensors", -1), "state-0.safetensors was altered: its SHA-256"),
        (lambda at: flip(at / "state-0.safetensors", 0), "state-0.safetensors was altered: its SHA-256"),
        (lambda at: os.truncate(at / "state-0.safetensors", 20), "state-0.safetensors has 20 bytes; its manifest says"),
        (lambda at: os.truncate(at / "state-0.safetensors", 0), "state-0.safetensors has 0 bytes"),
        (lambda at: os.remove(at / "state-0.safetensors"), "state-0.safetensors is missing"),
        (lambda at: os.truncate(at / "manifest.json", 0), r"manifest.json \(0 bytes\) is damaged"),
        (lambda at: os.truncate(at / "manifest.json", 50), r"manifest.json \(50 bytes\) is damaged"),
        (lambda at: (at / "manifest.json").write_text("[]"), "manifest.json .*is damaged: .*holds a list"),
        (lambda at: (at / "manifest.json").write_bytes(pickle.dumps({})), "manifest.json .*is damaged"),
        (lambda at: rewrite(at, state={"step": 3}), "manifest.json is damaged: its content"),
        (lambda at: rewrite(at, step="two"), "manifest.json is damaged: ValueError"),
        (lambda at: rewrite(at, version=2), "was written as 'lepton_ray checkpoint' version 2; this release reads"),
        (lambda at: rewrite(at, format="other"), "was written as 'other' version 1"),
        (lambda at: (at / "manifest.json").write_text("{}"), "was written as None"),
        (
            lambda at: (at / "manifest.json").write_text((at.parent / "step-00000001" / "manifest.json").read_text()),
            "is of step 1, but lies in the folder of step 2",
        ),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, harm, complaint):
    assert re.search(complaint, damaged(tmp_path, harm))


@settings(max_examples=20, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["state-0.safetensors", "manifest.json"]))
def test_no_flipped_bit_goes_unseen(tmp_path_factory, place, name):
    def harm(at):
        flip(at / name, int(place * (at / name).stat().st_size))

    damaged(tmp_path_factory.mktemp("c"), harm)


def test_a_missing_manifest_is_an_unfinished_save(folder):
    assert newest(folder) == (None, [])
    save(folder, 1, 2)
    folder.sub("step-00000002").delete("manifest.json")
    manifest, complaints = newest(folder)
    assert (manifest.step, complaints) == (1, [])
    with pytest.raises(CheckpointError, match="manifest.json is missing: step 2 has no finished"):
        load(folder, 2)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_is_never_executed(tmp_path):
    bomb = Bomb()
    bomb.target = str(tmp_path / "exploded")
    folder = Folder(str(tmp_path / "checkpoints"))
    save(folder, 1, 2)
    at = tmp_path / "checkpoints" / "step-00000002"
    for name in (".metadata", "state.pt", "state-1.safetensors", "manifest.json", "state-0.safetensors"):
        (at / name).write_bytes(pickle.dumps(bomb))
    manifest, complaints = newest(folder)
    assert manifest.step == 1
    assert len(complaints) == 1
    with pytest.raises(CheckpointError):
        load(folder, 2)
    assert not os.path.exists(bomb.target)


# --- crashes and full disks

SAVE_FOR_EVER = """
import sys, torch
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint import Checkpointer
from lepton_ray.train.checkpoint_format import newest
folder = Folder(sys.argv[1])
last, complaints = newest(folder)
assert not complaints, complaints
step = last.step + 1 if last else 1
saver = Checkpointer(folder, keep=2)
print("ready", flush=True)
while True:
    saver.save(step, {"weight": torch.full((300, 1000), float(step)), "count": torch.tensor(step)}, {"step": step})
    step += 1
"""


def test_a_kill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path):
    folder, seen = Folder(str(tmp_path)), 0
    luck = random.Random(1)
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while (found := newest(folder)[0]) is None or found.step <= seen:
            assert time.monotonic() < deadline
        time.sleep(luck.random() * 0.1)  # the moment is the point of the test
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        manifest, complaints = newest(folder)
        assert complaints == []
        assert manifest.step > seen
        seen = manifest.step
        tensors, state = load(folder, seen)
        assert (tensors["weight"] == seen).all()
        assert tensors["count"] == state["step"] == seen
    save(folder, seen + 1, keep=1)
    assert folder.names() == [f"step-{seen + 1:08d}"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, caplog):
    folder, events = Folder(str(tmp_path)), []
    saver = Checkpointer(folder, keep=1, on_event=lambda kind, **fields: events.append((kind, fields)))
    saver.save(1, tensors_of(1), {"step": 1})
    saver.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limit in ((2, 1000), (3, 2000)):  # too small for the tensors; for the manifest with its long state
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            saver.save(step, tensors_of(2) if step == 2 else {}, {"step": step, "long": "x" * 3000})
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert newest(folder)[0].step == 1
        assert folder.names() == ["step-00000001"]
    assert caplog.text.count("older ones are kept") == 2
    saver.save(4, tensors_of(4), {"step": 4})
    saver.close()
    assert_is(folder, 4)
    assert [(kind, fields["step"]) for kind, fields in events] == [
        ("checkpoint_saved", 1),
        ("checkpoint_failed", 2),
        ("checkpoint_failed", 3),
        ("checkpoint_saved", 4),
    ]
    assert "File too large" in events[1][1]["error"]


def test_a_failing_listener_does_not_stop_the_next_checkpoint(tmp_path, caplog):
    def fail(kind, **fields):
        raise RuntimeError("listener")

    saver = Checkpointer(Folder(str(tmp_path)), keep=5, on_event=fail)
    for step in (1, 2):
        saver.save(step, tensors_of(step), {"step": step})
    saver.close()
    assert_is(Folder(str(tmp_path)), 2)
    assert "listener" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_copied_behind_the_training(tmp_path):
    saver = Checkpointer(Folder(str(tmp_path)), keep=5)
    weight = torch.zeros(4_000_000, device="cuda")
    for step in range(3):
        weight.fill_(step)
        saver.save(step, {"weight": weight}, {"moment": weight[:3].double()})
        weight.fill_(-1)
    saver.close()
    for step in range(3):
        tensors, state = load(Folder(str(tmp_path)), step)
        assert (tensors["weight"] == step).all()
        assert equal(state["moment"], torch.full((3,), step, dtype=torch.float64))
