"""The journal: every line once, in order, whatever kills its writers."""

import dataclasses
import enum
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_ray.journal
from lepton_ray.errors import LeptonError
from lepton_ray.journal import Journal, read
from lepton_ray.storage import Folder

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(params=["disk", "url"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield Folder(str(tmp_path / "run"))
        return
    made = Folder(f"memory://{uuid.uuid4().hex}/run")
    yield made
    made.delete_all()


def test_each_writer_has_its_segment_and_readers_see_one_account(folder):
    assert read(folder) == []
    told = []
    for life in range(3):
        journal = Journal(folder)
        told.append(journal.append("start", life=life))
        journal.append_many({"event": "step", "step": step, "t": 0.5} for step in range(3))
        told += [{"event": "step", "step": step, "t": 0.5} for step in range(3)]
        journal.close()
    assert read(folder) == told
    assert folder.names() == [f"journal-0000{n}.jsonl" for n in (1, 2, 3)]
    assert abs(told[0]["t"] - time.time()) < 60


def test_a_writer_that_says_nothing_leaves_nothing(folder):
    Journal(folder).close()
    assert folder.names() == []


def test_segments_rotate(folder, monkeypatch):
    monkeypatch.setattr(lepton_ray.journal, "SEGMENT_BYTES", 100)
    monkeypatch.setattr(lepton_ray.journal, "PUT_EVERY_S", 0)
    journal = Journal(folder)
    for n in range(20):
        journal.append("event", n=n)
    journal.close()
    journal = Journal(folder)
    journal.append("event", n=20)
    journal.close()
    assert [record["n"] for record in read(folder)] == list(range(21))
    assert len(folder.names()) > (5 if folder.is_local else 1)


def test_a_url_gets_lines_without_a_close(monkeypatch):
    monkeypatch.setattr(lepton_ray.journal, "PUT_EVERY_S", 0.01)
    folder = Folder(f"memory://{uuid.uuid4().hex}")
    was_put = threading.Event()
    put = Folder.write
    monkeypatch.setattr(Folder, "write", lambda *args: (put(*args), was_put.set()))
    journal = Journal(folder)
    journal.append("header")
    assert was_put.wait(10)
    assert [record["event"] for record in read(folder)] == ["header"]
    journal.close()
    folder.delete_all()


@settings(max_examples=30, deadline=None)
@given(fields=st.dictionaries(st.text().filter(lambda name: name not in ("t", "event")), trees))
def test_json_comes_back_as_it_was(tmp_path_factory, fields):
    folder = Folder(str(tmp_path_factory.mktemp("j")))
    journal = Journal(folder)
    record = journal.append("event", **fields)
    journal.close()
    assert read(folder) == [record]


def test_odd_values_are_written_too(tmp_path):
    class Colour(enum.Enum):
        RED = "red"

    @dataclasses.dataclass
    class Point:
        x: int

    folder = Folder(str(tmp_path))
    journal = Journal(folder)
    journal.append(
        "odd",
        nan=math.nan,
        inf=-math.inf,
        number=np.float32(1.5),
        count=np.int64(3),
        array=np.arange(2),
        path=pathlib.Path("/a"),
        colour=Colour.RED,
        point=Point(1),
        names={"a"},
        counts={np.int64(1): {(1, 2): 3}},
        error=ValueError("no"),
    )
    journal.close()
    (record,) = read(folder)
    assert math.isnan(record.pop("nan"))
    del record["t"]
    assert record == {
        "event": "odd",
        "inf": -math.inf,
        "number": 1.5,
        "count": 3,
        "array": [0, 1],
        "path": "/a",
        "colour": "red",
        "point": {"x": 1},
        "names": ["a"],
        "counts": {"1": {"(1, 2)": 3}},
        "error": "no",
    }


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 200), data=st.data())
def test_only_a_torn_last_line_is_left_out(tmp_path_factory, cut, data):
    folder = Folder(str(tmp_path_factory.mktemp("j")))
    lines = [json.dumps({"t": 0, "event": "e", "text": data.draw(st.text(max_size=5))}) for _ in range(4)]
    whole = "".join(line + "\n" for line in lines).encode()
    folder.write("journal-00001.jsonl", whole[:cut])
    complete = sum(len("\n".join(lines[: n + 1])) <= cut for n in range(4))
    assert read(folder) == [json.loads(line) for line in lines[:complete]]


def test_a_damaged_line_is_named(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write("journal-00001.jsonl", b'{"event":"a"}\n{"eve\n{"event":"b"}\n')
    with pytest.raises(LeptonError, match="journal-00001.jsonl, line 2"):
        read(folder)


def test_a_killed_writer_loses_no_line_that_it_reported(tmp_path):
    script = (
        "import sys; from lepton_ray.journal import Journal; from lepton_ray.storage import Folder\n"
        "j = Journal(Folder(sys.argv[1]))\n"
        "for n in range(10**9):\n    j.append('event', n=n); print(n, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    last = 0
    while last < 300:
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *map(int, writer.stdout.read().split("\n")[:-1])])
    writer.wait()
    numbers = [record["n"] for record in read(Folder(str(tmp_path)))]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= last + 1


def test_lines_wait_for_a_full_disk(tmp_path, caplog):
    folder = Folder(str(tmp_path))
    journal = Journal(folder)
    journal.append("event", n=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for n in range(1, 10):
            journal.append("event", n=n, text="x" * 90)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in caplog.text
    journal.append("event", n=10)
    journal.close()
    assert [record["n"] for record in read(folder)] == list(range(11))


def test_a_hundred_step_records_cost_little(tmp_path):
    journal = Journal(Folder(str(tmp_path)))
    records = [
        {"event": "step", "step": n, "loss": 0.123456789 * n, "samples": 64, "step_s": 0.0123} for n in range(100)
    ]
    journal.append_many(records)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        journal.append_many(records)
        seconds.append(time.perf_counter() - start)
    journal.close()
    assert min(seconds) < 5e-3  # loose, since the machine may be loaded
    assert os.listdir(tmp_path) == ["journal-00001.jsonl"]
