from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from common.arrays import packed, unpacked

VALUES = np.array([0.5, -1.0, 2.0], np.float32)
LIES: dict[str, dict[str, Any]] = {
    "other coding": {"stype": "pickle"},
    "numpy's coding": {"stype": "numpy.ndarray"},
    "two names": {"dtype": "float"},
    "other byte order": {"dtype": ">f4"},
    "no dtype": {"dtype": "no dtype"},
    "objects": {"dtype": "O"},
    "records": {"dtype": "f4,f4"},
    "text that numpy evaluates": {"dtype": "1" * 5000 + "f4"},
    "brackets": {"dtype": "(1," * 50 + "f4"},
    "no bytes each": {"dtype": "V0"},
    "terabytes": {"shape": (10**13,)},
    "negative": {"shape": (-3,)},
    "twice negative": {"shape": (-1, -3)},
}


def lying(array: Array, **fields: Any) -> Array:
    """An array whose declared shape or dtype is not that of its bytes."""
    given = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return Array(**(given | fields))


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_array_whose_fields_do_not_fit_its_bytes_is_not_read(lie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpacked(lying(packed(VALUES), **lie))


@given(
    arrays(
        st.sampled_from(["<f4", ">f4", "f8", "f2", "i8", "u2", "i1"]), array_shapes(min_dims=0, min_side=0)
    )
)
def test_packed_arrays_come_out_as_they_were(values: np.ndarray[Any, Any]) -> None:
    for one in (values, values.T):
        found = unpacked(packed(one))
        np.testing.assert_array_equal(found, one)
        assert found.dtype.name == one.dtype.name
        assert len(packed(one).data) == one.nbytes, "nothing but the numbers travels"
