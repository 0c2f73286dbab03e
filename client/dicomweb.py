"""DICOMweb as a client: searches (QIDO-RS) and single instances (WADO-RS), with a pace and with patience."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

from client import answers, login, part10
from client.answers import TRIES, Attributes, NotGiven
from client.pacs_settings import Pacs
from common.errors import DataError, DeploymentError

logger = logging.getLogger("feverfew.pacs")
Answer = TypeVar("Answer")

PAGE: Final = 100
MIN_PAUSE_SECONDS: Final = 0.2
MAX_PAUSE_SECONDS: Final = 20.0
BUSY: Final = frozenset({408, 429, 502, 503, 504})
AWAY: Final = frozenset({502, 503, 504})  # what a proxy says for a server that is down
JSON: Final = {"Accept": "application/dicom+json"}
# As it is stored: a server that must convert or compress first takes longer, and may convert with loss.
STORED: Final = {
    "Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*',
    "Accept-Encoding": "identity",
}


@contextmanager
def open_archive(pacs: Pacs, *, directory: Path) -> Iterator[Archive]:
    """Yields the PACS, ready to be asked; closes its connections.

    Args:
        directory: the site, to which the paths of secrets and certificates are relative.

    Raises:
        UserError: a password, token or certificate that cannot be used.
    """
    timeout = httpx.Timeout(pacs.timeout_seconds)
    limits = httpx.Limits(max_connections=pacs.connections, max_keepalive_connections=pacs.connections)
    client = httpx.Client(
        base_url=pacs.url.rstrip("/"),
        auth=login.auth(pacs.authentication, directory=directory),
        verify=login.trust(pacs.ca_certificate, directory=directory),
        timeout=timeout,
        limits=limits,
        trust_env=False,  # no proxy and no .netrc that the hospital did not name
    )
    with client:
        pace = Pace(per_second=pacs.max_requests_per_second)
        yield Archive(client=client, pace=pace, patience_seconds=pacs.patience_seconds)


class Pace:
    """Lets requests through at equal distances, whichever thread they come from."""

    def __init__(self, *, per_second: float) -> None:
        self.stop = threading.Event()
        self._seconds = 1 / per_second
        self._next_turn = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when it is the caller's turn.

        Raises:
            DeploymentError: everything was stopped meanwhile.
        """
        with self._lock:
            turn = max(time.monotonic(), self._next_turn)
            self._next_turn = turn + self._seconds
        self.pause(turn - time.monotonic())

    def pause(self, seconds: float) -> None:
        """Waits, and no longer once everything is stopped.

        Raises:
            DeploymentError: everything was stopped.
        """
        if self.stop.wait(max(0.0, seconds)):
            raise DeploymentError("Expected to go on with the PACS, found a stop; run the command again.")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A PACS. A request that fails is repeated; for a server that is away we wait, ``patience_seconds`` long.

    Every method may raise ``DeploymentError``: the server stays away, or accepts neither us nor we its
    certificate; and ``NotGiven``: it answers, but not to this request.
    """

    client: httpx.Client
    pace: Pace
    patience_seconds: float

    def search(
        self,
        path: str,
        *,
        key: str,
        fields: Iterable[str] = (),
        match: Mapping[str, str] | None = None,
        page: int = PAGE,
    ) -> list[Attributes]:
        """Returns everything that a search finds, each once.

        Servers are known that ignore ``offset``, and others that apply it wrongly together with a filter, so
        that what follows looks empty. Where the last page was full the search is therefore made again,
        from the start and with a higher limit, until an answer is shorter than its limit.

        Args:
            path: such as ``/studies``.
            key: the tag of the unique identifier by which results differ.
            fields: tags to be told beside those that a server always tells.
            match: tag and value of a filter; a server may ignore it.
        """
        asked = {"includefield": list(fields), **(match or {})}
        found: dict[str, Attributes] = {}
        is_full = False
        while True:
            results = self._page(path, params={**asked, "limit": page, "offset": len(found)})
            before = len(found)
            found.update({answers.text(one, key): one for one in results})
            if len(found) == before:
                break
            is_full = len(results) == page
        limit = 2 * len(found)
        while is_full:
            results = self._page(path, params={**asked, "limit": limit, "offset": 0})
            found.update({answers.text(one, key): one for one in results})
            is_full = len(results) == limit
            limit *= 2
        return [one for identifier, one in found.items() if identifier]

    def at(self, path: str, *, place: int) -> list[Attributes]:
        """Returns the result of a search at one place, counted from 0; none behind the last."""
        return self._page(path, params={"limit": 1, "offset": place})

    def _page(self, path: str, *, params: Mapping[str, Any]) -> list[Attributes]:
        def ask() -> list[Attributes]:
            with self.client.stream("GET", path, params=params, headers=JSON) as response:
                _check(response)
                return answers.results(response)

        return self._patiently(ask)

    def retrieve(self, path: str, *, instance: str, to: Path) -> int:
        """Fetches one instance as a DICOM file that is there as a whole or not at all; returns its size.

        Args:
            path: such as ``/studies/1.2/series/3.4/instances/5.6``.
            instance: what the file itself must say that it is.
            to: the file (mode 0600) in a directory that is there.

        Raises:
            DataError: the file cannot be written.
        """
        temporary = to.with_name(f".{to.name}.part")

        def ask() -> int:
            with self.client.stream("GET", path, headers=STORED) as response:
                _check(response)
                return _save(answers.content(response), temporary=temporary, instance=instance)

        try:
            size = self._patiently(ask)
            os.replace(temporary, to)
        except OSError as error:
            raise DataError(
                f"Expected room for the images of the PACS, found: {error.strerror}; free some and run the "
                "command again, which goes on where it stopped."
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return size

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Repeats a request that fails, each time after the server has shown that it is there."""
        pause = MIN_PAUSE_SECONDS
        for number in range(1, TRIES + 1):
            self.pace.wait()
            try:
                return ask()
            except httpx.RequestError as error:
                _raise_if_distrusted(error)
                problem = NotGiven("no_answer", tries=TRIES)
            except NotGiven as error:
                problem = error
            if number >= problem.tries:
                break
            self._await_server()
            self.pace.pause(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
        raise problem

    def _await_server(self) -> None:
        """Returns as soon as the server answers anything.

        Raises:
            DeploymentError: it did not for ``patience_seconds``.
        """
        begun, pause = time.monotonic(), MIN_PAUSE_SECONDS
        while not self._is_there():
            if pause == MIN_PAUSE_SECONDS:
                logger.warning("no answer from the PACS; waiting for up to %.0f s", self.patience_seconds)
            if time.monotonic() - begun >= self.patience_seconds:
                raise DeploymentError(
                    f"Expected the PACS to answer, found none for {self.patience_seconds:g} s; see url in "
                    "site.yaml, and run the command again, which goes on where it stopped."
                )
            self.pace.pause(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _is_there(self) -> bool:
        self.pace.wait()
        try:
            with self.client.stream("GET", "/studies", params={"limit": 1}, headers=JSON) as response:
                return response.status_code not in AWAY
        except httpx.RequestError as error:
            _raise_if_distrusted(error)
            return False


def _check(response: httpx.Response) -> None:
    """Raises for a status that is no answer."""
    status = response.status_code
    if status == 401:
        raise DeploymentError(
            "Expected the PACS to accept us, found HTTP 401; see authentication in site.yaml and its files."
        )
    if status in BUSY:
        raise NotGiven("server_error", status=status, tries=TRIES)
    if status >= 500:
        raise NotGiven("server_error", status=status, tries=2)  # most likely it cannot, and never will
    if status in (403, 404, 410):
        raise NotGiven("forbidden" if status == 403 else "not_found", status=status)
    if not response.is_success:
        raise NotGiven("refused", status=status)


def _save(chunks: Iterator[bytes], *, temporary: Path, instance: str) -> int:
    """Writes a DICOM file and checks that it is the one that was asked for; returns its size."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w+b") as stream:
        for chunk in chunks:
            stream.write(chunk)
        size = stream.tell()
        stream.seek(0)
        found = part10.instance_of(stream.read(part10.HEAD_BYTES))
        if found != instance:
            raise NotGiven("other_instance" if found else "bad_answer")
        os.fsync(stream.fileno())
    return size


def _raise_if_distrusted(error: BaseException | None) -> None:
    """A certificate that is not trusted will not be trusted later either."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            raise DeploymentError(
                "Expected a certificate of the PACS that we trust, found another "
                f"({error.verify_message}); see url and ca_certificate in site.yaml."
            ) from None
        error = error.__cause__ or error.__context__
