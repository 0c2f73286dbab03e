from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.strategy import FixedPointSum


def test_the_mean_of_two_known_arrays_is_weighted() -> None:
    total = FixedPointSum(3, bound=16.0)
    total.add(np.array([1.0, 2.0, -4.0], dtype=np.float32), weight=1)
    total.add(np.array([3.0, 0.0, 8.0], dtype=np.float32), weight=3)
    np.testing.assert_allclose(total.mean(), [2.5, 0.5, 5.0], atol=1e-8)


def test_the_mean_of_nothing_is_zero() -> None:
    assert FixedPointSum(2, bound=1.0).mean().tolist() == [0.0, 0.0]


@given(st.integers(0, 2**32 - 1), st.permutations(range(7)))
def test_any_order_of_arrival_gives_the_same_bits(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    updates = [
        (rng.normal(size=50).astype(np.float32), int(weight)) for weight in rng.integers(1, 10**6, size=7)
    ]
    one, other = FixedPointSum(50, bound=16.0), FixedPointSum(50, bound=16.0)
    for values, weight in updates:
        one.add(values, weight=weight)
    for position in order:
        other.add(updates[position][0], weight=updates[position][1])
    assert one.mean().tobytes() == other.mean().tobytes()


@given(st.integers(0, 2**32 - 1))
def test_the_mean_is_that_of_float64_within_the_resolution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 1000, size=5)
    updates = rng.normal(size=(5, 20)).astype(np.float32)
    total = FixedPointSum(20, bound=16.0)
    for values, weight in zip(updates, weights, strict=True):
        total.add(values, weight=int(weight))
    np.testing.assert_allclose(
        total.mean(), np.average(updates.astype(np.float64), axis=0, weights=weights), atol=2e-7
    )


def test_values_beyond_the_bound_count_as_the_bound() -> None:
    total = FixedPointSum(2, bound=4.0)
    total.add(np.array([100.0, -100.0], dtype=np.float32), weight=1)
    assert total.mean().tolist() == [4.0, -4.0]


def test_the_largest_sum_does_not_overflow() -> None:
    total = FixedPointSum(1, bound=1024.0)
    for _ in range(26):
        total.add(np.array([1024.0], dtype=np.float32), weight=10**7)
    assert total.mean().tolist() == [1024.0]


def test_weights_that_would_overflow_are_refused() -> None:
    total = FixedPointSum(1, bound=1.0)
    with pytest.raises(OverflowError):
        total.add(np.zeros(1, dtype=np.float32), weight=2**28)
