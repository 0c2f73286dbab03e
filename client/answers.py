"""What a DICOMweb server answers: DICOM JSON of a search, the file of an instance, or neither."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import httpx

from client import multipart
from client.files import MAX_BYTES
from client.multipart import Malformed
from common.errors import CodedError

Attributes = Mapping[str, Any]
"""One result of a search: tag to value representation and values, as DICOM JSON has them."""

MAX_RESULTS_BYTES: Final = 2**28
MAX_EPILOGUE_BYTES: Final = 65536
TRIES: Final = 5  # of what may have failed by chance, at a server that answers others


class NotGiven(CodedError):
    """A request that a server answers with something else than what was asked for; the code says what.

    ``status`` is its HTTP status, 0 where that was not the matter; ``tries`` how often it is worth asking.
    """

    def __init__(self, code: str, *, status: int = 0, tries: int = 1) -> None:
        super().__init__(code)
        self.status = status
        self.tries = tries


def results(response: httpx.Response) -> list[Attributes]:
    """Returns the results of a search; none where the server says that there is no content.

    Raises:
        NotGiven: ``bad_answer`` or ``too_large``.
    """
    if response.status_code == 204:
        return []
    text = b"".join(_bounded(response.iter_bytes(), size=MAX_RESULTS_BYTES))
    if not text.strip():
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise NotGiven("bad_answer", tries=TRIES) from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise NotGiven("bad_answer")
    return found


def text(attributes: Attributes, tag: str) -> str:
    """Returns the first value of an attribute as text; "" where a server leaves it out or leaves it empty.

    >>> text({"00080060": {"vr": "CS", "Value": ["CT "]}}, "00080060"), text({}, "00080060")
    ('CT', '')
    """
    return next(iter(texts(attributes, tag)), "")


def texts(attributes: Attributes, tag: str) -> list[str]:
    """Returns the values of an attribute as texts, without empty ones."""
    element = attributes.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    scalars = (
        [one for one in values if isinstance(one, (str, int, float))] if isinstance(values, list) else []
    )
    return [found for found in (str(one).strip(" \0") for one in scalars) if found]


def number(attributes: Attributes, tag: str) -> int | None:
    """Returns a count; ``None`` where a server does not tell it.

    >>> number({"00201209": {"vr": "IS", "Value": ["12"]}}, "00201209")
    12
    """
    found = text(attributes, tag)
    return int(found) if found.isascii() and found.isdigit() else None


def content(response: httpx.Response) -> Iterator[bytes]:
    """Yields the file of one instance, which is either the whole answer or the first of its parts.

    Raises:
        NotGiven: ``bad_answer`` or ``too_large``.
    """
    chunks = response.iter_bytes()
    try:
        boundary = multipart.boundary_of(response.headers.get("Content-Type", ""))
        if boundary is None:
            yield from _bounded(chunks, size=MAX_BYTES)
            return
        parts = multipart.Parts(chunks, boundary=boundary)
        if parts.next_part() is None:
            raise NotGiven("bad_answer")
        yield from _bounded(parts.body(), size=MAX_BYTES)
        _skip(chunks)
    except Malformed:
        raise NotGiven("bad_answer", tries=TRIES) from None


def _skip(chunks: Iterator[bytes]) -> None:
    """Reads what little may follow, since a connection can only be used again after an answer's end."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_EPILOGUE_BYTES:
            break


def _bounded(chunks: Iterator[bytes], *, size: int) -> Iterator[bytes]:
    for chunk in chunks:
        size -= len(chunk)
        if size < 0:
            raise NotGiven("too_large")
        yield chunk
