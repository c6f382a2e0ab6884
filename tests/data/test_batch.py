"""Batches are taken apart without loss, whatever their structure."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from lepton_ray.data.batch import TARGET_KEYS, samples, split_target, to_device, tree_map
from lepton_ray.errors import ConfigError

A, B, C = torch.zeros(3, 2), torch.ones(3), torch.full((3, 1), 2.0)
Pair = namedtuple("Pair", "first second")


def test_structure_is_kept() -> None:
    batch = {"a": (A, [B, "id"]), "p": Pair(A, B)}
    names = tree_map(lambda leaf: type(leaf).__name__, batch)
    assert names == {"a": ("Tensor", ["Tensor", "str"]), "p": Pair("Tensor", "Tensor")}
    assert isinstance(names["p"], Pair)
    assert samples(batch) == 3


@pytest.mark.parametrize("batch", [(A, torch.zeros(2)), {"a": "text"}, torch.tensor(1.0), ()])
def test_samples_need_one_first_dim(batch: Any) -> None:
    with pytest.raises(ConfigError, match="one sample per row"):
        samples(batch)


def test_to_device_moves_tensors_and_carries_the_rest() -> None:
    moved = to_device((A, ["id"]), "meta")
    assert moved[0].device.type == "meta"
    assert moved[1] == ["id"]
    assert to_device(A, "cpu") is A


@pytest.mark.parametrize(
    ("batch", "inputs", "target"),
    [
        ((A, B), A, B),
        ([A, B], A, B),
        ((A, B, C), (A, B), C),
        ((A,), A, None),
        (A, A, None),
        ({"image": A, "label": B}, A, B),
        ({"a": A, "b": C, "targets": B}, {"a": A, "b": C}, B),
        ({"label": C, "y": B, "a": A}, {"label": C, "a": A}, B),
    ],
)
def test_target_is_found(batch: Any, inputs: Any, target: Any) -> None:
    found_inputs, found_target = split_target(batch)
    assert found_target is target
    if isinstance(inputs, torch.Tensor):
        assert found_inputs is inputs
    else:
        assert tree_map(id, found_inputs) == tree_map(id, inputs)


@pytest.mark.parametrize("batch", [{"a": A, "b": B}, {"y": B}, {}])
def test_dict_without_target_names_the_keys(batch: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        split_target(batch)
    assert all(key in str(raised.value) for key in (*TARGET_KEYS, *batch))
