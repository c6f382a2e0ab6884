from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_ray.collective.wire import BLOCK, CODECS, Bf16, Codec, Feedback, Floats, Int8
from lepton_ray.errors import ConfigError
from lepton_ray.plan.transport import SHARE, Wire

sizes = st.integers(0, 3) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(0, 1200)
# The largest numbers of all may become inf: a scale is rounded up.
finite = st.floats(-(2.0**127), 2.0**127, width=32)


def arrays(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Floats]:
    return hnp.arrays(np.float32, sizes, elements=elements, fill=elements)


def through(codec: Codec, values: Floats) -> tuple[bytes, Floats]:
    data, out = np.empty(codec.size(values.size), np.uint8), np.empty_like(values)
    codec.encode(values, data)
    codec.decode(data, out)
    return data.tobytes(), out


@pytest.fixture(scope="module", params=list(CODECS), ids=lambda wire: wire.value)
def wire(request: pytest.FixtureRequest) -> Wire:
    found: Wire = request.param
    return found


@given(values=arrays(st.floats(width=32)))
def test_bf16_is_the_bfloat16_of_torch(values: Floats) -> None:
    data, out = through(Bf16(), values)
    expected = torch.from_numpy(values).bfloat16()
    is_nan = np.isnan(values)
    assert np.array_equal(np.isnan(out), is_nan)
    assert out[~is_nan].tobytes() == expected.float().numpy()[~is_nan].tobytes()
    assert len(data) == 2 * values.size


@given(values=arrays(finite))
def test_int8_is_off_by_half_a_step_of_its_block_at_most(values: Floats) -> None:
    _, out = through(Int8(), values)
    for start in range(0, values.size, BLOCK):
        block, found = values[start : start + BLOCK], out[start : start + BLOCK]
        largest = np.abs(block).max()
        assert np.abs(block.astype(float) - found).max() <= max(largest / 253, 2.0**-126)
        assert np.abs(found).max() <= largest * (1 + 2.0**-15) or largest < 2.0**-119


@given(data=st.data())
def test_what_was_decoded_stays_what_it_is(wire: Wire, data: st.DataObject) -> None:
    codec = CODECS[wire]()
    first, decoded = through(codec, data.draw(arrays(finite)))
    second, again = through(codec, decoded)
    assert first == second
    assert decoded.tobytes() == again.tobytes()


@given(values=arrays(st.floats(width=32)), bad=st.sampled_from([np.inf, -np.inf, np.nan]), at=st.integers(0, 1199))
def test_inf_and_nan_stay_in_their_block_and_are_not_hidden(values: Floats, bad: float, at: int) -> None:
    values = np.nan_to_num(values, nan=1, posinf=1, neginf=1) % 1000
    if values.size:
        values[at % values.size] = bad
    _, out = through(Int8(), values)
    for start in range(0, values.size, BLOCK):
        block, found = values[start : start + BLOCK], out[start : start + BLOCK]
        assert np.isnan(found).all() if not np.isfinite(block).all() else np.isfinite(found).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, 2.0**-126])
def test_next_to_nothing_is_no_trouble(wire: Wire, value: float) -> None:
    values = np.full(300, value, np.float32)
    _, out = through(CODECS[wire](), values)
    assert np.abs(out - values).max() <= 2.0**-126


def test_sizes_are_what_the_model_counts_with(wire: Wire) -> None:
    codec = CODECS[wire]()
    assert codec.size(1 << 20) == SHARE[wire] * (4 << 20)
    assert codec.size(0) == 0


def test_a_feedback_is_for_one_buffer() -> None:
    feedback = Feedback()
    assert feedback.of(10) is feedback.of(10)
    with pytest.raises(ConfigError, match="buffer of 10 numbers came with one of 11"):
        feedback.of(11)
