"""What the site's log says of errors: never the text of an exception, which may name a file or a patient."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType

from client.site import Site
from common import logline
from common.logline import Format

ERRORS = "errors.log"


class Formatter(logging.Formatter):
    """Writes of an exception its type and the places in the code that it passed, and of what led to it."""

    def __init__(self) -> None:
        super().__init__(logline.TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of a record."""
        record.exc_text = None  # another handler's formatter leaves the whole text here
        return super().format(record)

    def formatException(
        self, info: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Returns an exception without its text."""
        return logline.places(info[1])


def formatter(form: Format, process: str, *, site: str) -> logging.Formatter:
    """Returns the formatter of a site's process; in no form does a line hold the text of an exception."""
    return logline.JsonFormatter(process, site=site) if form == "json" else Formatter()


def kept_apart(site: Site) -> Callable[[str], str]:
    """Returns what makes a JSON line of any other line that a site's process has written.

    Libraries write what they read, such as the cell of a header: the line goes to ``private/errors.log``,
    and the log says no more than that.
    """

    def wrap(text: str) -> str:
        if logline.is_line(text):
            return text
        _keep(site, text)
        told = f"a library has written something; see {site.private / ERRORS}"
        return logline.line(told, level="WARNING", logger=logline.OUTPUT, process="agent", site=site.name)

    return wrap


def keep_error(site: Site, error: BaseException) -> None:
    """Appends an exception with its text to ``private/errors.log``; a full disk is no further error."""
    _keep(site, "".join(traceback.format_exception(error)))


def _keep(site: Site, text: str) -> None:
    def private(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600)

    with (
        contextlib.suppress(OSError),
        open(site.private / ERRORS, "a", encoding="utf-8", opener=private) as file,
    ):
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{text}\n")
