"""A warm process that holds the installed ClientApp; its death is survived and reported.

Used by the deployed agent and by the simulation alike. Messages cross the pipe between the two processes in
Flower's protobuf form. Nothing is pickled but the arguments with which the process is started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import logging.handlers
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final

from flwr.app import Context, Error, Message

from client import crew
from client import log as log_lines
from common import flower, logline
from common.errors import DeploymentError

logger = logging.getLogger("feverfew.worker")

APP_FAILED: Final = "app_failed"
"""The ClientApp raised; the full text is in the site's own log only."""
APP_NOT_LOADED: Final = "app_not_loaded"
"""The installed ClientApp cannot be imported."""
WORKER_DIED: Final = "worker_died"
"""The process ended before it answered: killed, out of memory, ``os._exit``."""
WORKER_TIMED_OUT: Final = "worker_timed_out"
"""The process had not answered at the deadline and was killed."""

CODES: Final = {
    APP_FAILED: flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    APP_NOT_LOADED: flower.ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    WORKER_DIED: flower.ErrorCode.CLIENT_APP_CRASHED,
    WORKER_TIMED_OUT: flower.ErrorCode.CLIENT_APP_CRASHED,
}

DEFAULT_APP: Final = "client.app:app"
PING: Final = b""
RUN_NAME: Final = re.compile(r"[a-z0-9-]{1,64}")
KILL_SECONDS: Final = 5.0


def error_reply(message: Message, reason: str) -> Message:
    """Returns the error reply to a message; ``reason`` is one of the constants of ``CODES``."""
    return Message(Error(code=CODES[reason], reason=reason), reply_to=message)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a process answered to a message, not yet unpacked; None where it died over it."""

    message: Message
    answer: bytes | None

    @property
    def has_died(self) -> bool:
        """Says whether there is no answer."""
        return self.answer is None

    @property
    def reply(self) -> Message:
        """The reply; a process that has died gives an error reply with reason ``worker_died``."""
        if self.answer is None:
            return error_reply(self.message, WORKER_DIED)
        return flower.unpack_message(self.answer)


class Worker:
    """One child process with a ClientApp, started when needed and started anew after its death.

    One message at a time. Not for use from several threads.

    Args:
        app: object reference of the ClientApp, ``module:attribute``.
        context: how processes start (fork server or spawn; never fork, which copies open connections).
        threads: number of torch threads of the process.
        memory_bytes: the most data that the process may hold in memory; None for no limit.
        log: where the process writes what went wrong, tracebacks included; None is standard error.
        formatter: makes the lines of that log; None is text.
    """

    def __init__(
        self,
        app: str = DEFAULT_APP,
        *,
        context: BaseContext,
        threads: int,
        memory_bytes: int | None = None,
        log: Path | None = None,
        formatter: logging.Formatter | None = None,
    ) -> None:
        if context.get_start_method() == "fork":
            raise ValueError("Expected a multiprocessing context of forkserver or spawn, found fork.")
        self._app = app
        self._context = context
        self._threads = threads
        self._memory_bytes = memory_bytes
        self._log = log
        self._formatter = formatter or log_lines.Formatter()
        self._process: Any = None
        self._connection: Connection | None = None
        self._message: Message | None = None

    @property
    def pid(self) -> int | None:
        """Process id, or None while no process runs."""
        return None if self._process is None else self._process.pid

    @property
    def is_busy(self) -> bool:
        """True between ``start`` and ``finish``."""
        return self._message is not None

    @property
    def waitables(self) -> list[Any]:
        """What ``multiprocessing.connection.wait`` takes; one is ready when ``finish`` will not block."""
        return [] if self._process is None else [self._connection, self._process.sentinel]

    def warm_up(self) -> None:
        """Starts the process and waits until it holds the app.

        Raises:
            DeploymentError: the app cannot be loaded.
        """
        if self.is_busy:
            return
        loaded = False
        if self._send(PING):
            wait(self.waitables)
            loaded = self._take() == PING
        if not loaded:
            self.close()
            raise DeploymentError(
                f"Expected the client app {self._app} to load, found that its process failed (see the log); "
                "install Feverfew again."
            )

    def start(self, message: Message, context: Context) -> None:
        """Hands over a message; its answer comes from ``finish``.

        Raises:
            ValueError: the answer to another message has not been fetched yet.
        """
        if self.is_busy:
            raise ValueError("Expected an idle worker, found one that is busy; call finish first.")
        self._message = message
        if not self._send(flower.pack_context(context), flower.pack_message(message)):
            logger.warning("the worker process died before it took a message")

    def finish(self) -> Message:
        """Returns the reply to the message handed over; blocks until it is there.

        A process that has died gives an error reply with reason ``worker_died``.

        Raises:
            ValueError: no message was handed over.
        """
        return self.taken().reply

    def taken(self) -> Taken:
        """Returns what ``finish`` makes the reply of; the worker can have its next message first.

        Raises:
            ValueError: no message was handed over.
        """
        if self._message is None:
            raise ValueError("Expected a busy worker, found an idle one; call start first.")
        message = self._message
        if self._process is not None:
            wait(self.waitables)
        answer = self._take()
        self._message = None
        return Taken(message=message, answer=answer)

    def call(self, message: Message, context: Context, *, timeout_seconds: float | None = None) -> Message:
        """Returns the ClientApp's reply, or an error reply with a constant reason and no other text.

        After ``timeout_seconds`` the process is killed. The next call gets a fresh process if this one died.
        """
        self.start(message, context)
        if self._process is not None and not wait(self.waitables, timeout_seconds):
            self._message = None
            self.kill()
            return error_reply(message, WORKER_TIMED_OUT)
        return self.finish()

    def kill(self) -> None:
        """Ends the process at once; a message that it had is answered ``worker_died``."""
        if self._process is not None:
            self._process.kill()
            self._discard()

    def close(self) -> None:
        """Ends the process, after the message that it works on, if it ends within some seconds."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()  # the child reads the end of the pipe and leaves
        self._process.join(KILL_SECONDS)
        self.kill()

    def _send(self, *parcel: bytes) -> bool:
        """Hands a parcel to a living process; False when two processes died over it."""
        for _ in range(2):  # one that died while it was idle is replaced: it had not begun with the parcel
            if self._process is None:
                self._begin()
            assert self._connection is not None
            try:
                for part in parcel:
                    self._connection.send_bytes(part)
            except (BrokenPipeError, ConnectionResetError):
                self._discard()
            else:
                return True
        return False

    def _begin(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        arguments = (theirs, self._app, self._threads, self._memory_bytes, self._log, self._formatter)
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def _take(self) -> bytes | None:
        """Returns what the process sent, or None if it ended without an answer."""
        if self._connection is None:
            return None
        try:
            # A process may answer and end; only an empty pipe says that there is no answer.
            if self._connection.poll():
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            pass
        self._discard()
        return None

    def _discard(self) -> None:
        self._process.join(KILL_SECONDS)
        logger.info("worker process %s ended with exit code %s", self._process.pid, self._process.exitcode)
        if self._connection is not None:
            self._connection.close()
        self._process, self._connection = None, None


def load(reference: str) -> Any:
    """Returns the object named by ``module:attribute``."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _serve(
    connection: Connection,
    reference: str,
    threads: int,
    memory_bytes: int | None,
    log: Path | None,
    formatter: logging.Formatter,
) -> None:
    """Main function of the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=crew.die_with_parent, daemon=True).start()
    handler = logging.StreamHandler() if log is None else logging.handlers.WatchedFileHandler(log)
    # force: what the fork server has imported (Opacus) may have set up the log already
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("feverfew").setLevel(logging.INFO)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    app = _load_or_none(reference)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    gc.freeze()  # a task makes many objects of its own; the million of what is imported need no looking at
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed its end
        while True:
            first = connection.recv_bytes()
            if first == PING:
                connection.send_bytes(PING if app is not None else APP_NOT_LOADED.encode())
                continue
            context, message = flower.unpack_context(first), flower.unpack_message(connection.recv_bytes())
            with logline.about(run=shown_run(context.run_config), round=flower.round_of(message)):
                connection.send_bytes(flower.pack_message(_answer(app, message, context)))


def shown_run(config: Mapping[str, object]) -> str:
    """Returns our id of a run for a log, if it is one."""
    run = str(config.get("run", ""))
    return run if RUN_NAME.fullmatch(run) else "?"


def _load_or_none(reference: str) -> Any:
    try:
        return load(reference)
    except Exception:
        logger.exception("the client app %s cannot be loaded", reference)
        return None


def _answer(app: Any, message: Message, context: Context) -> Message:
    """Returns the reply to a message, an error reply if need be."""
    if app is None:
        return error_reply(message, APP_NOT_LOADED)
    flower.set_identity(context.run_id, node_id=context.node_id)
    begun = time.monotonic()
    try:
        reply = app(message=message, context=context)
    except BaseException:  # whatever it is, SystemExit too: its text must not leave, and the process lives on
        logger.exception("the client app failed after %.1f s", time.monotonic() - begun)
        return error_reply(message, APP_FAILED)
    if not isinstance(reply, Message):
        logger.error("the client app returned %s instead of a message", type(reply).__name__)
        return error_reply(message, APP_FAILED)
    return reply
