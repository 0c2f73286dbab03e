from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.quantisation import (
    BLOCK,
    DTYPES,
    Form,
    carried,
    largest_gain,
    num_scales,
    quantised,
    restored,
)

FORMS = tuple(DTYPES)
SHORTENED = tuple(BLOCK)
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
VALUES = st.integers(0, 700).flatmap(lambda size: arrays.arrays(np.float32, size, elements=FLOATS))


def draws(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(VALUES, st.sampled_from(FORMS))
def test_what_was_quantised_once_comes_out_of_a_second_time_bit_for_bit(values: Any, form: Form) -> None:
    once = carried(values, form=form)
    assert once.dtype == np.float32 and once.shape == values.shape and np.isfinite(once).all()
    assert carried(once, form=form).tobytes() == once.tobytes()


@given(VALUES)
def test_int8_is_off_by_half_a_level_of_its_block(values: Any) -> None:
    found = carried(values, form="int8")
    for begin in range(0, len(values), BLOCK["int8"]):
        block = values[begin : begin + BLOCK["int8"]].astype(np.float64)
        off = np.abs(found[begin : begin + BLOCK["int8"]] - block).max()
        assert off <= np.abs(block).max() / 127 / 2 * (1 + 2**-11) + 2.0**-100


@given(VALUES)
def test_fp16_keeps_eleven_bits_of_what_is_not_tiny_in_its_block(values: Any) -> None:
    found = carried(values, form="fp16").astype(np.float64)
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(initial=0.0)
    assert (np.abs(found - exact) <= np.abs(exact) * 2.0**-11 + largest * 2.0**-38 + 2.0**-100).all()


def test_small_updates_survive_fp16() -> None:
    """As plain float16 they would all be zero, or have a bit or two."""
    values = draws(1000) * np.float32(1e-9)
    assert np.abs(carried(values, form="fp16") / values - 1).max() < 2**-10


@pytest.mark.parametrize(("form", "most"), [("fp16", 0.51), ("int8", 0.27)])
def test_forms_take_a_half_and_a_quarter_of_the_bytes(form: Form, most: float) -> None:
    values = draws(20_000)
    sent = sum(array.nbytes for array in quantised(values, form=form).values())
    assert sent <= most * values.nbytes


def test_fp32_is_sent_as_it_is() -> None:
    values = draws(10)
    assert quantised(values, form="fp32") == {"values": values}
    assert restored({"values": values}) is values


@pytest.mark.parametrize("form", SHORTENED)
def test_zeros_and_nothing_stay_what_they_are(form: Form) -> None:
    for size in (0, 1, BLOCK[form], BLOCK[form] + 1):
        sent = quantised(np.zeros(size, np.float32), form=form)
        assert len(sent["scales"]) == num_scales(size, form=form)
        assert restored(sent).tolist() == [0.0] * size


def test_a_large_value_leaves_other_blocks_alone() -> None:
    values = draws(3 * BLOCK["int8"])
    values[0] = 1e6
    assert np.abs(carried(values, form="int8") - values)[BLOCK["int8"] :].max() < 0.02


@pytest.mark.parametrize("form", SHORTENED)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda sent: sent | {"scales": sent["scales"][:-1]},
        lambda sent: sent | {"scales": sent["scales"].astype(np.float64)},
        lambda sent: sent | {"scales": -1 - sent["scales"]},
        lambda sent: sent | {"scales": sent["scales"] * np.float32(np.nan)},
        lambda sent: sent | {"scales": sent["scales"] + np.float32(np.inf)},
        lambda sent: sent | {"values": sent["values"].astype(np.int16)},
        lambda sent: sent | {"values": sent["values"].reshape(1, -1)},
        lambda sent: sent | {"values": np.concatenate([sent["values"]] * 5000)},
    ],
)
def test_what_is_of_no_form_is_refused(form: Form, spoil: Any) -> None:
    sent = quantised(draws(300), form=form)
    with pytest.raises(ValueError, match="expected"):
        restored(spoil(sent))


def test_scales_beside_fp32_are_refused() -> None:
    with pytest.raises(ValueError, match="no scales"):
        restored({"values": draws(3), "scales": draws(1)})


@given(
    st.sampled_from(FORMS),
    st.lists(arrays.arrays(np.float32, 300, elements=st.floats(-1, 1, width=32)), min_size=1, max_size=8),
)
def test_with_error_feedback_no_update_is_longer_than_the_gain_allows(form: Form, updates: Any) -> None:
    longest = max(float(np.linalg.norm(update.astype(np.float64))) for update in updates)
    left = np.zeros(300, np.float32)
    for update in updates:
        sent = carried(update + left, form=form)
        left = update + left - sent
        assert np.linalg.norm(sent.astype(np.float64)) <= longest * largest_gain(form) * (1 + 1e-6) + 1e-25
