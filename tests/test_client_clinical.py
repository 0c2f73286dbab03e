from __future__ import annotations

import numpy as np
import pytest

from client import clinical
from common.asked import Category, Number
from common.errors import UnusableCase

AGE = Number(name="age", kind="number", mean=50, std=20)
SEX = Category(name="sex", kind="category", values=("f", "m"))


def test_numbers_are_scaled_and_words_are_one_hot() -> None:
    assert clinical.features({"age": "70", "sex": "m"}, (AGE, SEX)) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_what_is_missing_is_told_as_missing_and_nothing_else() -> None:
    assert clinical.features({"age": "", "sex": ""}, (SEX, AGE)) == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_a_wrong_unit_does_not_drown_the_image() -> None:
    assert clinical.features({"age": "1e9"}, (AGE,)) == [clinical.LIMIT, 0.0]
    assert clinical.features({"age": "-1e9"}, (AGE,)) == [-clinical.LIMIT, 0.0]


@pytest.mark.parametrize(("name", "text"), [("age", "old"), ("age", "nan"), ("age", "inf"), ("sex", "F")])
def test_text_that_is_no_value_is_refused_without_being_quoted(name: str, text: str) -> None:
    with pytest.raises(UnusableCase) as caught:
        clinical.features({"age": "1", "sex": "f"} | {name: text}, (AGE, SEX))
    assert caught.value.code == "bad_value" and text not in str(caught.value).split()


def test_cases_without_clinical_values_have_rows_of_none() -> None:
    assert clinical.none(3).shape == (3, 0) and clinical.none(0).shape == (0, 0)
    rows = clinical.array([[1.0, 0.0]], num_features=2)
    assert rows.dtype == np.float32 and not rows.flags.writeable
