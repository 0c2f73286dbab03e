"""Normal numbers for the noise of gradients: ChaCha20 by OpenSSL, and the transformation of Box and Muller.

A step of DP-SGD needs one number a parameter; numpy's generators make them one at a time, which costs more
than the backward pass of a large dense layer.

Source: Box, Muller (1958), A Note on the Generation of Random Normal Deviates; the cipher as in
``client/noise.py``.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

CHUNK_PAIRS: Final = 1 << 15
"""At a time: what they need stays in the processor's cache."""
MAX_BYTES: Final = 1 << 37
"""Of one stream; the cipher's counter would begin again after twice as many."""
_RADIUS_BYTES, _ANGLE_BYTES = 8, 4
_ZEROS = bytes(CHUNK_PAIRS * (_RADIUS_BYTES + _ANGLE_BYTES))


class Gaussian:
    """A stream of independent standard normal numbers, decided by a key.

    The radius of a pair comes from 53 random bits, so that numbers reach 8.6 standard deviations; the tail
    beyond holds less than 1e-16. The angle comes from 32.

    Args:
        key: 32 secret bytes that serve nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()
        self._num_bytes = 0
        self._bits = bytearray(len(_ZEROS))

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
        pairs = len(first)
        bits = self._draw(pairs * (_RADIUS_BYTES + _ANGLE_BYTES))
        wide = np.frombuffer(bits, dtype="<u8", count=pairs) >> np.uint64(11)
        narrow = np.frombuffer(bits, dtype="<i4", count=pairs, offset=pairs * _RADIUS_BYTES)
        # (k + 1/2) / 2^53 for k of 53 bits: never 0, and 1 only by rounding
        uniform = (wide.view(np.int64).astype(np.float64) + 0.5) * 2.0**-53
        np.log(uniform, out=uniform)
        radius = np.sqrt((uniform * -2.0).astype(first.dtype))
        angle = narrow.astype(first.dtype) * first.dtype.type(math.pi * 2.0**-31)
        np.cos(angle, out=first)
        np.sin(angle, out=second)
        first *= radius
        second *= radius

    def _draw(self, number: int) -> bytearray:
        """Returns fresh random bytes, until the next call."""
        self._num_bytes += number
        if self._num_bytes > MAX_BYTES:
            raise OverflowError(f"expected at most {MAX_BYTES} random bytes of one key")
        self._cipher.update_into(memoryview(_ZEROS)[:number], self._bits)
        return self._bits
