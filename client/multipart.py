"""Answers of several parts (``multipart/related``), read as they come: never a whole answer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Final

from common.errors import FeverfewError

MAX_HEADER_BYTES: Final = 16384


class Malformed(FeverfewError):
    """An answer that ends early, or whose parts cannot be told apart."""


def boundary_of(content_type: str) -> bytes | None:
    """Returns what separates the parts of an answer; ``None`` if it is none of several parts.

    >>> boundary_of('multipart/related; type="application/dicom"; boundary="a b"')
    b'a b'
    >>> boundary_of("application/dicom") is None
    True

    Raises:
        Malformed: several parts, and no boundary.
    """
    header = Message()
    header["content-type"] = content_type
    if header.get_content_maintype() != "multipart":
        return None
    boundary = header.get_boundary()
    if not boundary or not boundary.isascii():
        raise Malformed("Expected a boundary, found none.")
    return boundary.encode("ascii")


class Parts:
    """The parts of an answer, one after the other: ``next_part`` and then its ``body``."""

    def __init__(self, chunks: Iterator[bytes], *, boundary: bytes) -> None:
        self._chunks = chunks
        self._delimiter = b"\r\n--" + boundary
        self._buffer = b"\r\n"  # so that the first boundary, which begins the answer, looks like the others
        self._is_inside = True  # of the preamble, which is skipped as the body of a part is

    def next_part(self) -> Mapping[str, str] | None:
        """Returns the headers of the next part, names in lower case; ``None`` after the last.

        What was not read of the part before is skipped.

        Raises:
            Malformed: the answer ends early, or the headers cannot be read.
        """
        for _ in self.body():
            pass
        self._need(2)
        if self._buffer.startswith(b"--"):
            return None
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise Malformed(f"Expected headers of at most {MAX_HEADER_BYTES} bytes, found more.")
            self._need(len(self._buffer) + 1)
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self._is_inside = True
        lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n"))
        return {name.strip().lower(): value.strip() for name, colon, value in lines if colon}

    def body(self) -> Iterator[bytes]:
        """Yields what is left of the current part.

        Raises:
            Malformed: the answer ends before the part does.
        """
        kept = len(self._delimiter) + 2  # a boundary, and what shows that it is one
        while self._is_inside:
            found = self._buffer.find(self._delimiter)
            if found >= 0 and len(self._buffer) >= found + kept:
                content, self._buffer = self._buffer[:found], self._buffer[found + len(self._delimiter) :]
                self._is_inside = self._buffer[:2] not in (b"--", b"\r\n") and self._buffer[:1] not in b" \t"
                yield content + (self._delimiter if self._is_inside else b"")
            else:
                ready = found if found >= 0 else max(0, len(self._buffer) - kept)
                content, self._buffer = self._buffer[:ready], self._buffer[ready:]
                if content:
                    yield content
                self._need(len(self._buffer) + 1)

    def _need(self, size: int) -> None:
        """Reads on until the buffer holds so many bytes."""
        while len(self._buffer) < size:
            try:
                self._buffer += next(self._chunks)
            except StopIteration:
                raise Malformed("Expected a whole answer, found one that ends early.") from None
