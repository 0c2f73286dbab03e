"""The numbers are normal, independent, decided by the key, and never drawn twice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from client import gaussian
from client.gaussian import CHUNK, Gaussian, _Words

KEY = bytes(range(32))
DTYPES = [np.float32, np.float64]


def drawn(number: int, *, dtype: Any = np.float32, key: bytes = KEY) -> np.ndarray[Any, Any]:
    return np.asarray(Gaussian(key).standard_normal((number,), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_standard_normal(dtype: Any) -> None:
    values = drawn(1_000_000, dtype=dtype)
    assert values.dtype == dtype
    assert stats.kstest(values.astype(np.float64), "norm").pvalue > 1e-3
    assert stats.kstest(values.astype(np.float64) * 1.01, "norm").pvalue < 1e-3, "the test would notice"


@pytest.mark.parametrize("beyond", [3.0, 4.0, 4.5])
def test_tails_are_as_heavy_as_they_should_be(beyond: float) -> None:
    number = 8_000_000
    expected = number * 2 * stats.norm.sf(beyond)
    found = int((np.abs(drawn(number)) > beyond).sum())
    assert abs(found - expected) < 4.5 * math.sqrt(expected)


def test_squares_and_neighbours_and_pairs_are_independent() -> None:
    """Both numbers of a pair share their radius: they stand half a chunk apart."""
    number = CHUNK * 3
    values = drawn(number).astype(np.float64).reshape(3, 2, CHUNK // 2)
    first, second = values[:, 0].ravel(), values[:, 1].ravel()
    bound = 4.5 / math.sqrt(number / 2)
    for one, other in (
        (first, second),
        (first**2, second**2),
        (np.abs(first), second),
        (first[1:], first[:-1]),
        (first[1:] ** 2, first[:-1] ** 2),
        (first[CHUNK // 2 :], first[: -CHUNK // 2]),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (CHUNK + 1,), (0,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_is_filled(shape: tuple[int, ...], dtype: Any) -> None:
    values = np.asarray(Gaussian(KEY).standard_normal(shape, dtype=dtype))
    assert values.shape == shape and np.isfinite(values).all()
    assert len(np.unique(values)) >= 0.99 * values.size


def test_a_key_decides_the_numbers_and_none_comes_twice() -> None:
    stream, again = Gaussian(KEY), Gaussian(KEY)
    one, two = stream.standard_normal((1000,)), stream.standard_normal((1000,))
    np.testing.assert_array_equal(one, again.standard_normal((1000,)))
    assert not np.isin(two, one).any()
    assert not np.isin(drawn(1000, dtype=np.float64, key=bytes(32)), one).any()


SIZES = [3, CHUNK // 2, 5, 0, 2 * CHUNK + 1, 7]
"""Arrays that end within a chunk, and one that needs several."""


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_what_is_added_to_arrays_is_one_draw_however_many_threads_share_the_work(
    std: float, threads: int
) -> None:
    """Bit for bit where the deviation is one; else it is multiplied before the last roundings, not after."""
    arrays = [np.zeros(size, dtype=np.float32) for size in SIZES]
    Gaussian(KEY).add_to(arrays, std=std, threads=threads)
    expected = std * drawn(sum(SIZES))
    np.testing.assert_allclose(np.concatenate(arrays), expected, rtol=0.0 if std == 1.0 else 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_noise_is_added_to_what_was_there(threads: int) -> None:
    alone, arrays = (
        [np.full(size, start * place, dtype=np.float32) for place, size in enumerate(SIZES)]
        for start in (0.0, 1.0)
    )
    for one in (alone, arrays):
        Gaussian(KEY).add_to(one, std=0.5, threads=threads)
    for place, (noise, noised) in enumerate(zip(alone, arrays, strict=True)):
        np.testing.assert_array_equal(noised, noise + np.float32(place))


def test_words_are_aes_in_counter_mode_with_a_nonce_a_chunk() -> None:
    """As SP 800-38D says: the first block of a text is under the counter 2."""
    cipher = algorithms.AES256(KEY)
    for chunk in (1, 7):
        counter = chunk.to_bytes(12, "big") + (2).to_bytes(4, "big")
        expected = Cipher(cipher, modes.CTR(counter)).encryptor().update(bytes(4 * 100))
        words = _Words(cipher, chunk)
        found = np.concatenate([words._draw(number, np.empty(number + 4, "<u4")) for number in (1, 0, 6, 93)])
        assert found.astype("<u4").tobytes() == expected


def test_steps_that_share_a_stream_share_no_numbers() -> None:
    stream = Gaussian(KEY)
    first, second = np.zeros(CHUNK + 7, dtype=np.float32), np.zeros(CHUNK + 7, dtype=np.float32)
    for array in (first, second):
        stream.add_to([array], std=1.0, threads=2)
    whole = np.concatenate([first, second]).astype(np.float64)
    halves = whole.reshape(2, -1)
    assert len(np.unique(whole)) > 0.9 * len(whole), "in float32 few are alike by chance"
    assert abs(np.corrcoef(halves)[0, 1]) < 4.5 / math.sqrt(halves.shape[1])
    assert stats.kstest(whole, "norm").pvalue > 1e-3


def test_a_thread_that_fails_is_heard() -> None:
    arrays = [np.zeros(2 * CHUNK, dtype=np.float32)]
    arrays[0].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        Gaussian(KEY).add_to(arrays, std=1.0, threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_reach_as_far_as_their_bits_allow(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least radius bits give the largest number: nothing is infinite, and the tail is not cut early."""
    farthest = math.sqrt(2 * 65 * math.log(2))
    monkeypatch.setattr(_Words, "_draw", lambda self, number, words: np.zeros(number, dtype=np.uint32))
    assert Gaussian(KEY).standard_normal((2,), dtype=dtype)[0] == pytest.approx(farthest)
    assert stats.norm.sf(farthest) < 1e-20
    monkeypatch.setattr(_Words, "_draw", lambda self, number, words: ~np.zeros(number, dtype=np.uint32))
    assert Gaussian(KEY).standard_normal((2,), dtype=dtype).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_radius_is_that_of_64_bits_also_where_32_are_coarse(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge, end = int(gaussian.EDGE), 1 << 32
    starts = [0, 1, 5, edge - 1, edge, edge + 1, end // 2, end - edge - 1, end - edge, end - 5, end - 1]
    words = iter(
        (
            np.array([*starts, *[0] * len(starts)], dtype=np.uint32),  # radii, and angles of zero
            np.full(len(starts), 0x9ABCDEF0, dtype=np.uint32),  # the second word of each radius
        )
    )
    monkeypatch.setattr(_Words, "_draw", lambda self, number, room: next(words)[:number])
    found = Gaussian(KEY).standard_normal((2 * len(starts),), dtype=dtype)[: len(starts)]
    exact = [-2 * math.log((start * end + 0x9ABCDEF0 + 0.5) / end**2) for start in starts]
    np.testing.assert_allclose(found, np.sqrt(exact), rtol=1e-4 if dtype == np.float32 else 1e-7)


def test_a_key_is_not_used_beyond_its_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "MAX_BYTES", 1000)
    stream = Gaussian(KEY)
    stream.standard_normal((100,))
    with pytest.raises(OverflowError):
        stream.standard_normal((100,))
    with pytest.raises(OverflowError):
        stream.add_to([np.zeros(100, dtype=np.float32)], std=1.0, threads=1)
