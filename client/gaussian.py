"""Normal numbers for the noise of gradients: AES-256 by OpenSSL, and the transformation of Box and Muller.

A step of DP-SGD needs one number a parameter; numpy's generators make them one at a time, which costs more
than the backward pass of a large dense layer.

The words are AES in counter mode, had as the ciphertext of zeros in Galois/counter mode, which OpenSSL
computes in wider vectors; its tag is of no use here.

Source: Box, Muller (1958), A Note on the Generation of Random Normal Deviates; NIST SP 800-38D (2007) for the
cipher's mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.model import FlatArray

CHUNK: Final = 1 << 18
"""Numbers at a time: more would not stay in a processor's own cache, and with fewer, two threads spend the
time that they save on waiting for the interpreter."""
MAX_BYTES: Final = 1 << 40
"""Of one stream: 2^36 blocks. That they never repeat, as random ones might, tells with less than 2^-56."""
EDGE: Final = np.uint32(1 << 22)
"""So many values of a word, at either end of its range, are too coarse for the radius of a pair."""
_WORD_BYTES = 4
_WORDS_PER_PAIR = 3  # at most
_NONCE_BYTES = 12
_ROOM_WORDS = 4  # a block, which the cipher asks for beyond what it writes
_ZEROS = bytes(CHUNK * _WORD_BYTES)


class Gaussian:
    """A stream of independent normal numbers, decided by a key.

    The radius of a pair is that of a uniform number of 32 random bits; of 64 where 32 are coarse, which is
    within a thousandth of 0 and of 1, and always for float64. So numbers reach 9.4 standard deviations; the
    tail beyond holds less than 1e-20. The angle comes from 32.

    Args:
        key: 32 secret bytes that serve nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = algorithms.AES256(key)
        self._num_chunks = 0
        self._num_bytes = 0

    def standard_normal(self, size: int | tuple[int, ...] | None = None, dtype: Any = np.float64) -> Any:
        """Returns an array of this shape, float32 or float64; without a shape it has one number.

        Raises:
            OverflowError: more numbers than one key may decide.
        """
        shape = (size,) if isinstance(size, int) else size or ()
        values = np.empty(math.prod(shape), dtype=dtype)
        room = _Room(min(CHUNK, len(values)), dtype)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            part[:] = _Words(self._cipher, self._next_chunk(len(part))).normal(len(part), std=1.0, room=room)
        return values.reshape(shape)

    def add_to(self, arrays: Sequence[FlatArray], *, std: float, threads: int) -> None:
        """Adds a normal number of this deviation to each element of float32 arrays, in their order.

        How many threads share the work decides nothing about the numbers.

        Raises:
            OverflowError: more numbers than one key may decide.
        """
        work = [(self._next_chunk(sum(map(len, parts))), parts) for parts in chunks(arrays)]
        size = min(CHUNK, sum(map(len, arrays)))
        # all rooms are this thread's: another thread's own memory would be cleared page by page each time
        rooms = [_Room(size, np.float32) for _ in range(min(threads, len(work)))]
        todo = iter(work)

        def take(room: _Room) -> None:
            for chunk, parts in todo:
                _Words(self._cipher, chunk).add_to(parts, std=std, room=room)

        with ThreadPoolExecutor(max(1, len(rooms) - 1)) as executor:  # starts none before it is given work
            others = [executor.submit(take, room) for room in rooms[1:]]
            for room in rooms[:1]:
                take(room)
            for other in others:
                other.result()  # raises what a thread does

    def _next_chunk(self, number: int) -> int:
        """Returns which is the next chunk, of so many numbers."""
        self._num_bytes += (number + 1) // 2 * _WORDS_PER_PAIR * _WORD_BYTES
        if self._num_bytes > MAX_BYTES:
            raise OverflowError(f"expected at most {MAX_BYTES} random bytes of one key")
        self._num_chunks += 1
        return self._num_chunks


class _Room:
    """What is written over by one chunk after the other."""

    def __init__(self, number: int, dtype: Any) -> None:
        pairs = (number + 1) // 2
        self.words = np.empty(2 * pairs + _ROOM_WORDS, dtype="<u4")
        self.turned = np.empty(pairs, dtype=np.uint32)
        self.is_coarse = np.empty(pairs, dtype=bool)
        self.angles, self.radii = np.empty((2, pairs), dtype=dtype)
        self.values = np.empty(2 * pairs, dtype=dtype)


class _Words:
    """The random words of one chunk, whose number is the cipher's nonce."""

    def __init__(self, cipher: algorithms.AES256, chunk: int) -> None:
        nonce = chunk.to_bytes(_NONCE_BYTES, "big")
        self._encryptor = Cipher(cipher, modes.GCM(nonce)).encryptor()

    def add_to(self, parts: Sequence[FlatArray], *, std: float, room: _Room) -> None:
        """Adds normal numbers to the parts of a chunk."""
        noise = self.normal(sum(map(len, parts)), std=std, room=room)
        for part in parts:  # by numpy: with few numbers, torch's addition takes four times as long
            part += noise[: len(part)]
            noise = noise[len(part) :]

    def normal(self, number: int, *, std: float, room: _Room) -> npt.NDArray[Any]:
        """Returns so many normal numbers, in the room; the two of a pair stand half of them apart."""
        pairs = (number + 1) // 2
        high, turn = self._draw(2 * pairs, room.words).reshape(2, -1)
        angles, radii, values = room.angles[:pairs], room.radii[:pairs], room.values[: 2 * pairs]
        kind = values.dtype.type
        np.multiply(turn.view("<i4"), kind(math.pi * 2.0**-31), out=angles, casting="unsafe", dtype=kind)
        np.multiply(high, kind(2.0**-32), out=radii, casting="unsafe", dtype=kind)
        coarse = _coarse(high, room=room) if kind is np.float32 else slice(None)
        radii[coarse] = 0.5  # has a logarithm
        np.log2(radii, out=radii)
        radii *= kind(-2 * math.log(2) * std**2)
        np.sqrt(radii, out=radii)
        radii[coarse] = std * self._fine_radii(high[coarse])
        for side, function in zip(values.reshape(2, -1), (np.cos, np.sin), strict=True):
            function(angles, out=side)
            side *= radii
        return values[:number]

    def _fine_radii(self, high: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """Returns the radii of uniform numbers that begin with these words; k + 1/2 of 2^64 is never 0."""
        low = self._draw(len(high), np.empty(len(high) + _ROOM_WORDS, dtype="<u4"))
        uniform = high * 2.0**-32 + (low + 0.5) * 2.0**-64
        return np.asarray(np.sqrt(-2 * np.log(uniform)))

    def _draw(self, number: int, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Returns so many fresh random words, at the beginning of an array that is a block longer."""
        self._encryptor.update_into(memoryview(_ZEROS)[: number * _WORD_BYTES], words.data.cast("B"))
        return words[:number]


def _coarse(high: npt.NDArray[np.uint32], *, room: _Room) -> npt.NDArray[np.intp]:
    """Returns where words are within the edge of their range; the addition goes round, so that both ends of
    the range are at its beginning."""
    turned = np.add(high, EDGE, out=room.turned[: len(high)])
    return np.flatnonzero(np.less(turned, 2 * EDGE, out=room.is_coarse[: len(high)]))


def chunks(arrays: Sequence[FlatArray]) -> Iterator[list[FlatArray]]:
    """Yields the arrays in their order, cut so that each list has ``CHUNK`` numbers, the last the rest."""
    chunk: list[FlatArray] = []
    room = CHUNK
    for array in arrays:
        while len(array):
            chunk.append(array[:room])
            array = array[room:]
            room -= len(chunk[-1])
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk
