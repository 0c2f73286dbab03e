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
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

CHUNK_PAIRS: Final = 1 << 15
"""At a time: what they need stays in the processor's cache."""
MAX_BYTES: Final = 1 << 37
"""Of one stream; the cipher's counter would begin again after twice as many."""
_RADIUS_BYTES, _ANGLE_BYTES = 8, 4


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

    def standard_normal(self, size: int | tuple[int, ...] = (), dtype: Any = np.float64) -> Any:
        """Returns an array of this shape, float32 or float64; without a shape it has one number.

        Raises:
            OverflowError: more numbers than one key may decide.
        """
        shape = (size,) if isinstance(size, int) else size
        number = math.prod(shape)
        values = torch.empty(
            number + number % 2, dtype=torch.float32 if dtype == np.float32 else torch.float64
        )
        for start in range(0, len(values), 2 * CHUNK_PAIRS):
            chunk = values[start : start + 2 * CHUNK_PAIRS]
            self._fill(chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :])
        return values[:number].numpy().reshape(shape)

    def _fill(self, first: torch.Tensor, second: torch.Tensor) -> None:
        pairs = len(first)
        bits = self._bytes(pairs * (_RADIUS_BYTES + _ANGLE_BYTES))
        wide = torch.frombuffer(bits, dtype=torch.int64, count=pairs)
        narrow = torch.frombuffer(bits, dtype=torch.int32, count=pairs, offset=pairs * _RADIUS_BYTES)
        # (k + 1/2) / 2^53 for k of 53 bits: never 0, and 1 only by rounding
        uniform = ((wide >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
        radius = uniform.log_().mul_(-2.0).sqrt_().to(first.dtype)
        angle = narrow.to(first.dtype).mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=first).mul_(radius)
        torch.sin(angle, out=second).mul_(radius)

    def _bytes(self, number: int) -> bytearray:
        self._num_bytes += number
        if self._num_bytes > MAX_BYTES:
            raise OverflowError(f"expected at most {MAX_BYTES} random bytes of one key")
        return bytearray(self._cipher.update(bytes(number)))
