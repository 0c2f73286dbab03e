"""Asking again while the other side is away: with pauses that grow, for as long as it makes sense."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import httpx

from client.route import Barred
from common import flower

logger = logging.getLogger("feverfew.agent")
Answer = TypeVar("Answer")

MIN_RETRY_SECONDS: Final = 0.1
MAX_RETRY_SECONDS: Final = 20.0
BROKEN_SECONDS: Final = 15.0
"""A server that answers a request with an internal error for so long will never answer it: it came back with
an older data base, and does not know the run."""
TEMPORARY_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""425 is what the gateway says to a clock that is wrong: it may be set right."""


def is_temporary(error: httpx.HTTPError) -> bool:
    """Returns whether the same request may succeed later: no connection, or a server that is starting."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TEMPORARY_STATUS
    return isinstance(error, httpx.TransportError)


def _is_broken(error: httpx.HTTPError) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 500


def reason(error: Exception) -> str:
    """Returns an error in a few words for the site's log."""
    if isinstance(error, httpx.HTTPStatusError):
        return flower.refusal_text(error)
    if isinstance(error, Barred):
        return str(error)
    if isinstance(error, httpx.RemoteProtocolError):  # all that is seen of a certificate that is not taken
        return "closed without an answer; is the certificate still valid? see feverfew-client check"
    return type(error).__name__


class Outage:
    """Says in the log that the other side is away, each reason once, and that it is back."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, error: Exception) -> None:
        """Says why a request failed, if it is not known yet."""
        why = reason(error)
        if why not in self._told:
            logger.warning("no answer from the coordinator (%s); trying again", why)
        self._told.add(why)

    def end(self) -> None:
        """Says that the other side answers again, if it was away."""
        if self._told:
            logger.info("the coordinator answers again")
        self._told.clear()


def persist(request: Callable[[], Answer], *, stop: threading.Event, seconds: float = float("inf")) -> Answer:
    """Returns the answer to a request, repeating it while the other side is away.

    Args:
        request: safe to repeat.
        stop: no more repetitions once it is set.
        seconds: nor after so long.

    Raises:
        httpx.HTTPError: the last error; one that will not pass is raised at once.
    """
    begun, delay, outage = time.monotonic(), MIN_RETRY_SECONDS, Outage()
    broken_since: float | None = None
    while True:
        try:
            answer = request()
        except httpx.HTTPError as error:
            now = time.monotonic()
            broken_since = (broken_since or now) if _is_broken(error) else None
            is_over = now - begun >= seconds or now - (broken_since or now) >= BROKEN_SECONDS
            if not is_temporary(error) or is_over or stop.is_set():
                raise
            outage.note(error)
        else:
            outage.end()
            return answer
        stop.wait(delay)
        delay = min(2 * delay, MAX_RETRY_SECONDS)
