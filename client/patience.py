"""Asking again while the other side is away: with pauses that grow, for as long as it makes sense."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import httpx

from common import flower

logger = logging.getLogger("feverfew.agent")
Answer = TypeVar("Answer")

MIN_RETRY_SECONDS: Final = 0.1
MAX_RETRY_SECONDS: Final = 20.0
TEMPORARY_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""425 is what the gateway says to a clock that is wrong: it may be set right."""


def is_temporary(error: httpx.HTTPError) -> bool:
    """Returns whether the same request may succeed later: no connection, or a server that is starting."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TEMPORARY_STATUS
    return isinstance(error, httpx.TransportError)


def reason(error: Exception) -> str:
    """Returns an error in a few words for the site's log."""
    if isinstance(error, httpx.HTTPStatusError):
        return flower.refusal_text(error)
    if isinstance(error, httpx.RemoteProtocolError):  # all that is seen of a certificate that is not taken
        return "closed without an answer; is the certificate still valid? see feverfew-client check"
    if isinstance(error, httpx.ConnectError) and "certificate has expired" in str(error):
        return "its certificate has expired; the coordinator has to run feverfew-server renew"
    return type(error).__name__


def persist(request: Callable[[], Answer], *, stop: threading.Event, seconds: float = float("inf")) -> Answer:
    """Returns the answer to a request, repeating it while the other side is away.

    Args:
        request: safe to repeat.
        stop: no more repetitions once it is set.
        seconds: nor after so long.

    Raises:
        httpx.HTTPError: the last error; one that will not pass is raised at once.
    """
    begun, delay, failures = time.monotonic(), MIN_RETRY_SECONDS, 0
    while True:
        try:
            answer = request()
        except httpx.HTTPError as error:
            if not is_temporary(error) or time.monotonic() - begun >= seconds or stop.is_set():
                raise
            if failures == 0:
                logger.warning("no answer from the coordinator (%s); trying again", reason(error))
            failures += 1
        else:
            if failures:
                logger.info("the coordinator answers again")
            return answer
        stop.wait(delay)
        delay = min(2 * delay, MAX_RETRY_SECONDS)
