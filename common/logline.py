"""Lines of a log: text for people, or JSON for programs, one object a line and nothing else.

A JSON line has ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``process`` (its kind) and ``message``; where
they are known ``site``, ``run`` and ``round``; and ``exception``, which never has an exception's text.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

Format = Literal["text", "json"]
FORMATS: Final = ("text", "json")
VARIABLE: Final = "FEVERFEW_LOG_FORMAT"
"""Tells the coordinator's processes the form of their lines."""
TEXT: Final = "%(asctime)s %(levelname)s %(message)s"
KEYS: Final = ("time", "level", "logger", "process", "message")
OUTPUT: Final = "output"
"""The logger of what a program has written that does not write such lines."""
MAX_LINE: Final = 2**16
END_SECONDS: Final = 1.0
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*")
_about: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039 - never changed


@contextlib.contextmanager
def about(**known: str | int) -> Iterator[None]:
    """Adds ``site``, ``run`` or ``round`` to what is logged meanwhile in this thread, in JSON."""
    token = _about.set({**_about.get(), **known})
    try:
        yield
    finally:
        _about.reset(token)


def line(message: str, *, level: str, logger: str, process: str, **more: str | int) -> str:
    """Returns a JSON line about something that happens now.

    >>> sorted(json.loads(line("hello", level="INFO", logger="x", process="agent", site="north")))
    ['level', 'logger', 'message', 'process', 'site', 'time']
    """
    tree = {"time": _utc(), "level": level, "logger": logger, "process": process, "message": message}
    return json.dumps({**tree, **more})


def wrapped(text: str, *, process: str) -> str:
    """Returns a line of a program as a JSON line, as it is if it is one already."""
    if is_line(text):
        return text
    text = _COLOUR.sub("", text)
    found = _LEVEL.match(text)
    level, message = ("INFO", text) if found is None else (found[1], text[found.end() :])
    return line(message, level=level, logger=OUTPUT, process=process)


def is_line(text: str) -> bool:
    """Says whether a text is a JSON line with the keys that each has."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.keys() >= set(KEYS)


def places(error: BaseException | None) -> str:
    """Returns an exception's type and the places in the code that it passed, and of what led to it.

    Never its text, which may hold anything.
    """
    return "\n".join(place for one in _chain(error) for place in _places(one))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _places(error: BaseException) -> Iterator[str]:
    yield f"  {type(error).__module__}.{type(error).__qualname__}"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f"    {frame.filename}:{frame.lineno} in {frame.name}"


class JsonFormatter(logging.Formatter):
    """Makes JSON lines of the records of a process.

    Args:
        process: what kind of process it is.
        known: ``site``, where all lines are about one.
    """

    def __init__(self, process: str, **known: str) -> None:
        super().__init__()
        self._process = process
        self._known = known

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        tree: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **self._known,
            **_about.get(),
        }
        if record.exc_info:
            tree["exception"] = places(record.exc_info[1])
        return json.dumps(tree)


def start(process: str, *, form: Format, output: TextIO) -> None:
    """Begins the log of a process of the coordinator."""
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter(process) if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(form == "json")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def start_ours(process: str, *, output: TextIO) -> None:
    """Begins a log in JSON of what is ours in a process of Flower's, which has a log of its own."""
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter(process))
    ours = logging.getLogger("feverfew")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


def tell_errors(process: str) -> Callable[[str], None]:
    """Lets this process tell in JSON what ends it, or a thread of it; returns what tells any error."""

    def tell(message: str, **more: str) -> None:
        told = line(message, level="ERROR", logger="feverfew", process=process, **more)
        print(told, file=sys.stdout, flush=True)

    def of_process(kind: type[BaseException], error: BaseException, _: object) -> None:
        tell(f"ended by {kind.__name__}", exception=places(error))

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        tell(f"a thread was ended by {arguments.exc_type.__name__}", exception=places(arguments.exc_value))

    sys.excepthook, threading.excepthook = of_process, of_thread
    return tell


def funnel(sink: int, wrap: Callable[[str], str]) -> tuple[int, threading.Thread]:
    """Starts a thread that writes what comes through a pipe as JSON lines to a file, which is closed then.

    A full disk loses lines and never stops who writes them.

    Returns:
        The pipe's end to write to, and the thread, which ends when all that have this end have closed it.
    """
    source, entry = os.pipe()

    def carry() -> None:
        with open(source, "rb") as pipe, open(sink, "wb", buffering=0) as file:
            while content := pipe.readline(MAX_LINE):
                text = content.decode("utf-8", "replace").rstrip()
                if text:
                    with contextlib.suppress(OSError):
                        file.write(wrap(text).encode() + b"\n")

    thread = threading.Thread(target=carry, name="log", daemon=True)
    thread.start()
    return entry, thread


@contextlib.contextmanager
def own_output(wrap: Callable[[str], str]) -> Iterator[TextIO]:
    """Lets standard output and error of this process, and of those that it starts, carry JSON lines only.

    Yields the true standard output, for those who write such lines.
    """
    sys.stdout.flush()
    former = os.dup(1), os.dup(2)
    entry, thread = funnel(os.dup(1), wrap)
    os.dup2(entry, 1)
    os.dup2(entry, 2)
    os.close(entry)
    try:
        with open(os.dup(former[0]), "w", buffering=1, encoding="utf-8") as true:
            yield true
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in enumerate(former, start=1):
            os.dup2(kept, number)
            os.close(kept)
        thread.join(END_SECONDS)  # a process that we have started may live a little longer


def _utc(seconds: float | None = None) -> str:
    now = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return now.isoformat(timespec="milliseconds")
