"""Every source gives what the user's data holds; every input that cannot be trained on is refused in words."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lepton_ray.data.arrays import ArraySource
from lepton_ray.data.batch import tree_map
from lepton_ray.data.sources import Source, Stream, describe, label_range, make_source
from lepton_ray.errors import ConfigError

X = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
Y = np.arange(10) % 4
SOME = np.array([7, 0, 7, 3])


class Squares(Dataset):
    """Samples (i, i * i)."""

    def __init__(self, samples: int = 10) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[float, int]:
        return float(index), index * index


class Batched(Squares):
    """Squares that answers for a batch at once only."""

    def __getitems__(self, indices: list[int]) -> list[tuple[float, int]]:
        return [(float(index), -index) for index in indices]


class Unsized(Dataset):
    """A map-style dataset that forgot its length."""

    def __getitem__(self, index: int) -> int:
        return index


class Counter(IterableDataset):
    """Samples 0..samples-1."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Own:
    """A source that a user wrote."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def fetch(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices * 2)


def double(batch: Any) -> Any:
    """Double every tensor."""
    return tree_map(lambda tensor: tensor * 2, batch)


def source_of(data: Any, **options: Any) -> Source:
    made = make_source(data, **options)
    assert isinstance(made, Source)
    return made


def same(found: Any, expected: Any) -> None:
    """Compare structure, dtype and values; strided as well as fresh memory of the caller's own."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = tuple(found.values()), tuple(expected.values())
    if isinstance(expected, tuple):
        assert type(found) in (tuple, list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
        return
    expected = torch.as_tensor(expected)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"])
def test_arrays_are_gathered_with_their_dtype(dtype: str) -> None:
    x = X.astype(dtype)
    same(source_of((x, Y)).fetch(SOME), (x[SOME], Y[SOME]))
    same(source_of(torch.from_numpy(x)).fetch(SOME), x[SOME])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_torch_dtypes_that_numpy_lacks_survive(dtype: torch.dtype) -> None:
    x = torch.from_numpy(X).to(dtype)
    source = pickle.loads(pickle.dumps(source_of((x, Y))))
    found, _ = source.fetch(SOME)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), x[torch.from_numpy(SOME)].view(torch.uint8))
    assert describe(source)["columns"]["x"]["dtype"] == str(dtype).removeprefix("torch.")


def test_nested_arrays_keep_their_structure() -> None:
    same(source_of({"a": X, "b": Y}).fetch(SOME), {"a": X[SOME], "b": Y[SOME]})
    same(source_of(([X, {"k": Y}], Y)).fetch(SOME), ((X[SOME], {"k": Y[SOME]}), Y[SOME]))


@pytest.mark.parametrize(
    "x", [X[::-1], X.T.copy().T, X[:, :, ::2], X.astype(">f4"), torch.from_numpy(X).transpose(1, 2), X[:, 0, 0]]
)
def test_any_memory_layout_is_served(x: Any) -> None:
    expected = x[torch.from_numpy(SOME)] if isinstance(x, torch.Tensor) else x.astype(np.float32)[SOME]
    same(source_of(x).fetch(SOME), expected)


def test_a_batch_is_the_callers_own_and_the_arrays_are_not_copied() -> None:
    source = source_of((X, Y))
    assert isinstance(source, ArraySource)
    assert np.shares_memory(source.columns[0].array, X)
    x, _ = source.fetch(np.arange(10))
    x.zero_()
    assert X.any()


@pytest.mark.filterwarnings("error")
def test_pickling_leaves_the_buffers_out_of_band() -> None:
    big = np.zeros((1000, 100), np.float32)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(source_of((big, big)), protocol=5, buffer_callback=buffers.append)
    assert len(head) < 2000
    # Read-only buffers, as those that Ray maps: served without torch's warning and without a copy.
    read_only = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    source = pickle.loads(head, buffers=read_only)
    array = source.columns[0].array
    assert not array.flags.owndata
    assert not array.flags.writeable
    source.fetch(SOME)[0].zero_()


def test_pandas_and_tensor_datasets_are_arrays() -> None:
    frame = pandas.DataFrame({"a": X[:, 0, 0], "y": Y})
    same(source_of(frame).fetch(SOME), {"a": X[SOME, 0, 0], "y": Y[SOME]})
    same(source_of((X, frame["y"])).fetch(SOME), (X[SOME], Y[SOME]))
    tensors = source_of(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)))
    assert isinstance(tensors, ArraySource)
    same(tensors.fetch(SOME), (X[SOME], Y[SOME]))


def test_datasets_are_collated() -> None:
    indices = np.array([3, 1])
    same(source_of(Squares()).fetch(indices), (torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([9, 1])))
    same(source_of(Batched()).fetch(indices)[1], torch.tensor([-3, -1]))
    same(source_of(Squares(), collate=lambda rows: torch.tensor(rows)).fetch(indices), torch.tensor([[3.0, 9], [1, 1]]))
    restored = pickle.loads(pickle.dumps(source_of(Squares())))
    assert len(restored) == 10
    assert restored.fetch(indices)[1].tolist() == [9, 1]


def test_own_sources_are_taken_as_they_are() -> None:
    assert source_of(Own(3)).fetch(SOME).tolist() == [14, 0, 14, 6]
    assert describe(source_of(Own(3)))["samples"] == 3


def test_transform_runs_after_the_fetch() -> None:
    same(source_of((X, Y), transform=double).fetch(SOME), (X[SOME] * 2, Y[SOME] * 2))
    stream = make_source(Counter(), transform=double)
    assert isinstance(stream, Stream)
    assert stream.collate(list(stream)).tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(ConfigError, match="returned None"):
        source_of(X, transform=lambda batch: None).fetch(SOME)


def test_label_range_of_integer_targets_only() -> None:
    assert label_range(make_source((X, Y - 1))) == (-1, 2)
    assert label_range(make_source({"a": X, "label": Y.astype(np.uint8)})) == (0, 3)
    for data in ((X, X), X, {"a": X}, (X, {"a": Y}), (X, torch.from_numpy(Y).to(torch.bfloat16)), Squares()):
        assert label_range(make_source(data)) is None
    assert label_range(make_source((X, Y), transform=double)) is None


def test_description_tells_data_apart() -> None:
    changed = X.copy()
    changed[-1, -1, -1] += 1
    wide = np.zeros((2, 1 << 19))
    datas = [
        (X, Y),
        (changed, Y),
        (X.astype(np.float64), Y),
        (X[:9], Y[:9]),
        {"a": X, "b": Y},
        Squares(),
        Counter(),
        wide,
    ]
    described = [json.dumps(describe(make_source(data))) for data in datas]
    described.append(json.dumps(describe(make_source((X, Y), transform=double))))
    assert len(set(described)) == len(described)
    assert described[0] == json.dumps(describe(make_source((torch.from_numpy(X), Y.copy()))))


def write(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_is_a_dict_of_arrays(tmp_path: Path) -> None:
    lists = pyarrow.array(X.reshape(10, 6)[:6].tolist(), pyarrow.list_(pyarrow.float32()))
    fixed = pyarrow.array(X.reshape(10, 6)[6:].tolist(), pyarrow.list_(pyarrow.float32()))
    cube = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(X)
    write(tmp_path / "b.parquet", x=fixed, y=Y[6:], cube=cube[6:], deep=pyarrow.array(X[6:].tolist()))
    write(tmp_path / "a.parquet", x=lists, y=Y[:6], cube=cube[:6], deep=pyarrow.array(X[:6].tolist()))
    flat = X.reshape(10, 6)
    expected = {"x": flat[SOME], "y": Y[SOME], "cube": X[SOME], "deep": X[SOME].astype(np.float64)}
    for path in (tmp_path, tmp_path / "*.parquet", str(tmp_path / "[ab].parquet")):
        same(source_of(path).fetch(SOME), expected)
    same(source_of(str(tmp_path / "b.parquet")).fetch(np.array([0]))["y"], Y[6:7])
    pairs = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(range(20)), 2)[4:]
    same(source_of(write(tmp_path / "p", x=pairs)).fetch(np.array([0]))["x"], np.array([[8, 9]]))
    write(tmp_path / "r.parquet", x=pyarrow.array([True, False]))
    same(source_of(tmp_path / "r.parquet").fetch(np.array([1, 0]))["x"], np.array([False, True]))


def bad_parquet(tmp_path: Path) -> dict[str, tuple[Any, list[str]]]:
    """Return data and the words that its error must hold, by case."""
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "mix1", x=[1])
    write(tmp_path / "mix2", z=[1])
    write(tmp_path / "wide1", x=[1])
    write(tmp_path / "wide2", x=[[1, 2]])
    field = pyarrow.field("x", pyarrow.list_(pyarrow.int64()), metadata={"ARROW:extension:name": "ray.data.tensor"})
    table = pyarrow.table([pyarrow.array([[1]])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "extension")
    return {
        "missing": (tmp_path / "none.parquet", ["none.parquet", "no such file"]),
        "no match": (str(tmp_path / "q*.parquet"), ["q*.parquet", "matches"]),
        "empty folder": (tmp_path / "folder", ["folder", ".parquet"]),
        "url": ("s3://bucket/a.parquet", ["ray.data.read_parquet"]),
        "corrupt": (tmp_path / "corrupt.parquet", ["corrupt.parquet", "cannot be read"]),
        "zero bytes": (tmp_path / "zero.parquet", ["zero.parquet", "cannot be read"]),
        "no rows": (write(tmp_path / "rows", x=pyarrow.array([], pyarrow.int64())), ["no rows"]),
        "strings": (write(tmp_path / "s", ok=[1], name=["a"]), ["'name'", "string", "ray.data"]),
        "nulls": (write(tmp_path / "n", x=[1, None, 3]), ["'x'", "1 missing"]),
        "nested nulls": (write(tmp_path / "nn", x=[[1], [None]]), ["'x'", "missing"]),
        "unequal lists": (write(tmp_path / "u", x=[[1], [1, 2]]), ["'x'", "1 to 2"]),
        "other columns": (str(tmp_path / "mix?"), ["mix1", "mix2"]),
        "other shape": (str(tmp_path / "wide?"), ["wide2", "(2,)"]),
        "extension": (tmp_path / "extension", ["'x'", "extension"]),
    }


PARQUET_CASES = ["missing", "no match", "empty folder", "url", "corrupt", "zero bytes", "no rows", "strings", "nulls"]
PARQUET_CASES += ["nested nulls", "unequal lists", "other columns", "other shape", "extension"]


@pytest.mark.parametrize("case", PARQUET_CASES)
def test_bad_parquet_is_named(case: str, tmp_path: Path) -> None:
    path, words = bad_parquet(tmp_path)[case]
    with pytest.raises(ConfigError) as raised:
        make_source(path)
    assert all(word in str(raised.value) for word in ["train_data", *words]), str(raised.value)


BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "none": (lambda: None, ["None", "Parquet"]),
    "unknown type": (lambda: object(), ["object", "ray.data"]),
    "class": (lambda: Squares, ["class Squares"]),
    "number": (lambda: 3, ["int"]),
    "lengths differ": (lambda: (X, Y[:9]), ["x has 10", "y has 9"]),
    "dict lengths differ": (lambda: {"a": X, "b": Y[:1]}, ["a has 10", "b has 1"]),
    "empty arrays": (lambda: (X[:0], Y[:0]), ["empty"]),
    "empty tuple": (lambda: (), ["empty tuple"]),
    "empty dict": (dict, ["empty dict"]),
    "scalar": (lambda: (np.float32(1), Y), ["single number"]),
    "0-dim tensor": (lambda: torch.tensor(1.0), ["single number"]),
    "y is None": (lambda: (X, None), ["None"]),
    "value is None": (lambda: {"a": X, "b": None}, ["'b'", "None"]),
    "list of numbers": (lambda: (X, [1, 2]), ["list", "int", "numpy.asarray"]),
    "list of lists": (lambda: [[1, 2], [3, 4]], ["list", "int", "numpy.asarray"]),
    "list of samples": (lambda: ([X[0], X[1], X[2]], Y), ["x.0 has 2", "y has 10", "numpy.stack"]),
    "object dtype": (lambda: (np.array([[1], [1, 2]], dtype=object), Y[:2]), ["object", "pad"]),
    "strings": (lambda: (X, np.array(["a"] * 10)), ["<U1", "Encode"]),
    "dates": (lambda: np.array(["2020-01-01"], dtype="datetime64[D]"), ["datetime64", "Encode"]),
    "long double": (lambda: X.astype(np.longdouble), ["float128", "torch"]),
    "masked": (lambda: np.ma.masked_array(Y, Y > 1), ["masked", "filled"]),
    "sparse tensor": (lambda: torch.eye(3).to_sparse(), ["plain array"]),
    "dataframe in tuple": (lambda: (pandas.DataFrame({"a": [1]}), Y), ["DataFrame", ".to_numpy()"]),
    "dataframe of text": (lambda: pandas.DataFrame({"a": ["x"]}, dtype=object), ["'a'", "object"]),
    "dataframe twice": (lambda: pandas.DataFrame([[1, 2]], columns=["a", "a"]), ["differ"]),
    "loader": (lambda: DataLoader(Squares()), ["DataLoader", "dataset"]),
    "generator": (lambda: (i for i in range(3)), ["generator", "IterableDataset"]),
    "iterator": (lambda: iter([1]), ["list_iterator", "once"]),
    "dataset without length": (lambda: Unsized(), ["Unsized", "__len__"]),
    "empty dataset": (lambda: Squares(0), ["Squares", "length 0"]),
    "empty own source": (lambda: Own(0), ["empty"]),
    "dataset in tuple": (lambda: (Squares(), Y), ["Squares"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_words(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(ConfigError) as raised:
        make_source(make(), name="test_data")
    assert all(word in str(raised.value) for word in ["test_data", *words]), str(raised.value)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="transform="):
        make_source(X, transform=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="collate= is for a Dataset"):
        make_source((X, Y), collate=list)


def test_arrays_are_described_without_loading_libraries() -> None:
    script = (
        "import sys, numpy, lepton_ray.data.feed; from lepton_ray.data.sources import describe, make_source\n"
        "describe(make_source((numpy.zeros((3, 2)), numpy.arange(3))))\n"
        "try: make_source(object())\n"
        "except ValueError: print(sorted({'torch', 'pandas', 'ray', 'pyarrow', 'keras'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
