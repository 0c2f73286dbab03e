"""Normal numbers for the noise of gradients: AES-256 by OpenSSL, and the transformation of Box and Muller.

A step of DP-SGD needs one number a parameter; numpy's generators make them one at a time, which costs more
than the backward pass of a large dense layer.

Source: Box, Muller (1958), A Note on the Generation of Random Normal Deviates; NIST SP 800-38A (2001) for the
cipher's counter mode.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CHUNK_PAIRS: Final = 1 << 16
"""At a time: what they need stays in the processor's cache."""
MAX_BYTES: Final = 1 << 37
"""Of one stream: 2^33 blocks. That they never repeat, as random ones might, tells with less than 2^-62."""
EDGE: Final = np.uint32(1 << 22)
"""So many values of a word, at either end of its range, are too coarse for the radius of a pair."""
_WORD_BYTES = 4
_ZEROS = bytes(CHUNK_PAIRS * 2 * _WORD_BYTES)


class Gaussian:
    """A stream of independent standard normal numbers, decided by a key.

    The radius of a pair is that of a uniform number of 32 random bits; of 64 where 32 are coarse, which is
    within a thousandth of 0 and of 1, and always for float64. So numbers reach 9.4 standard deviations; the
    tail beyond holds less than 1e-20. The angle comes from 32.

    Args:
        key: 32 secret bytes that serve nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self._num_bytes = 0

    def standard_normal(self, size: int | tuple[int, ...] | None = None, dtype: Any = np.float64) -> Any:
        """Returns an array of this shape, float32 or float64; without a shape it has one number.

        Raises:
            OverflowError: more numbers than one key may decide.
        """
        shape = (size,) if isinstance(size, int) else size or ()
        number = math.prod(shape)
        values = np.empty(number + number % 2, dtype=dtype)
        for start in range(0, len(values), 2 * CHUNK_PAIRS):
            chunk = values[start : start + 2 * CHUNK_PAIRS]
            self._fill(chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :])
        return values[:number].reshape(shape)

    def _fill(self, first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
        number = first.dtype.type
        high, turn = self._words(2 * len(first)).reshape(2, -1)
        angle = turn.view("<i4").astype(number)
        angle *= number(math.pi * 2.0**-31)
        radius = high.astype(number)
        radius *= number(2.0**-32)
        # the addition goes round, so that both ends of the range are at its beginning
        coarse = np.flatnonzero(high + EDGE < 2 * EDGE) if number is np.float32 else slice(None)
        radius[coarse] = 0.5  # has a logarithm
        np.log2(radius, out=radius)
        radius *= number(-2 * math.log(2))
        np.sqrt(radius, out=radius)
        radius[coarse] = self._fine_radius(high[coarse])
        np.cos(angle, out=first)
        np.sin(angle, out=second)
        first *= radius
        second *= radius

    def _fine_radius(self, high: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """Returns the radii of uniform numbers that begin with these words; k + 1/2 of 2^64 is never 0."""
        low = self._words(len(high))
        uniform = high * 2.0**-32 + (low + 0.5) * 2.0**-64
        return np.asarray(np.sqrt(-2 * np.log(uniform)))

    def _words(self, number: int) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self._draw(number * _WORD_BYTES), dtype="<u4")

    def _draw(self, number: int) -> bytes:
        """Returns fresh random bytes."""
        self._num_bytes += number
        if self._num_bytes > MAX_BYTES:
            raise OverflowError(f"expected at most {MAX_BYTES} random bytes of one key")
        return self._cipher.update(memoryview(_ZEROS)[:number])
