"""Weights: a plain safetensors file of whatever a model holds, written without a copy of it."""

import uuid

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lepton_ray.errors import CheckpointError
from lepton_ray.storage import Folder
from lepton_ray.train.checkpoint_format import CHUNK_BYTES, file_pieces, plan_file
from lepton_ray.train.weights import read_weights, write_weights


def awkward():
    """Return tensors that a model may hold and that no plain writer takes."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": torch.nn.Parameter(whole),
        "part of whole": whole[1:3],
        "turned": whole.t(),
        "every other": whole[:, ::2],
        "flat every other": torch.arange(9, dtype=torch.int16)[::2],
        "spread": torch.tensor([1.5], dtype=torch.bfloat16).expand(3),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 3),
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_any_tool_reads_what_was_written(tmp_path):
    folder = Folder(str(tmp_path))
    write_weights(folder, awkward())
    assert folder.names() == ["model.safetensors"]
    assert_equal(load_file(tmp_path / "model.safetensors"), awkward())
    assert_equal(read_weights(folder), awkward())


def test_weights_come_back_from_a_url():
    folder = Folder(f"memory://{uuid.uuid4().hex}")
    write_weights(folder, awkward())
    assert_equal(read_weights(folder), awkward())
    folder.delete_all()


def test_a_model_without_tensors_is_a_file_too(tmp_path):
    write_weights(Folder(str(tmp_path)), {})
    assert read_weights(Folder(str(tmp_path))) == {}


def test_what_the_format_does_not_have_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"'w' \(torch.complex128"):
        write_weights(Folder(str(tmp_path)), {"w": torch.zeros(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_writing_takes_no_copy_of_the_model():
    state = {"weight": torch.ones(3, CHUNK_BYTES), "bias": torch.ones(5)}
    plan = plan_file(state)
    head, *pieces = file_pieces(plan.head, state.values())
    assert head == plan.head
    assert sum(map(len, pieces)) == plan.size_bytes
    assert max(map(len, pieces)) == CHUNK_BYTES
    memory = [tensor.numpy() for tensor in state.values()]
    assert all(any(np.shares_memory(np.asarray(piece), own) for own in memory) for piece in pieces)
