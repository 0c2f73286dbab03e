"""What the site's log says of errors: never the text of an exception, which may name a file or a patient."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType

from client.site import Site

FORMAT = "%(asctime)s %(levelname)s %(message)s"
ERRORS = "errors.log"


class Formatter(logging.Formatter):
    """Writes of an exception its type and the places in the code that it passed, and of what led to it."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of a record."""
        record.exc_text = None  # another handler's formatter leaves the whole text here
        return super().format(record)

    def formatException(
        self, info: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Returns an exception without its text."""
        return "\n".join(line for error in _chain(info[1]) for line in _lines(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _lines(error: BaseException) -> Iterator[str]:
    yield f"  {type(error).__module__}.{type(error).__qualname__}"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f"    {frame.filename}:{frame.lineno} in {frame.name}"


def keep_error(site: Site, error: BaseException) -> None:
    """Appends an exception with its text to ``private/errors.log``; a full disk is no further error."""

    def private(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600)

    with (
        contextlib.suppress(OSError),
        open(site.private / ERRORS, "a", encoding="utf-8", opener=private) as file,
    ):
        text = "".join(traceback.format_exception(error))
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{text}\n")
