"""Connections to the gateway: TLS with a client's certificate, few for each site, and never slow.

uvicorn tells an application nothing about the certificate of the other end. Here its protocol for HTTP/1.1 is
extended, so that each request's state has the peer; the target of a request stays as it came.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from pathlib import Path
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import ConfigError
from server.peer import Peer, peer_of
from server.refusals import Refusals

HANDSHAKE_SECONDS: Final = 10.0
CLOSING_SECONDS: Final = 5.0
HEAD_SECONDS: Final = 20.0
"""For the head of a request, from the connection or its first byte on."""
MAX_PER_SITE: Final = 16
"""Connections of one site at a time. An agent has up to four."""


class Hall:
    """Who is connected: the number of connections of each key."""

    def __init__(self, refusals: Refusals) -> None:
        self.refusals = refusals
        self.present: Counter[str] = Counter()

    def enter(self, peer: Peer) -> bool:
        """Counts a connection; False where its site has enough of them."""
        if self.present[peer.fingerprint] >= MAX_PER_SITE:
            return False
        self.present[peer.fingerprint] += 1
        return True

    def leave(self, peer: Peer) -> None:
        """Counts a connection out."""
        self.present[peer.fingerprint] -= 1
        if not self.present[peer.fingerprint]:
            del self.present[peer.fingerprint]


class Connection(H11Protocol):  # type: ignore[misc]
    """One connection; ``scope["state"]["peer"]`` of its requests says who is at the other end.

    Args:
        hall: counts connections; the same for all of them.
    """

    def __init__(self, *arguments: Any, hall: Hall, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._hall = hall
        self._peer: Peer | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Lets a peer in, or closes the connection at once."""
        super().connection_made(transport)
        try:
            peer = peer_of(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        except (ConfigError, ValueError):  # signed by our authority, but not as a site's
            self._turn_away("certificate", who=self.client)
            return
        if not self._hall.enter(peer):
            self._turn_away("connections", who=peer.name)
            return
        self._peer = peer
        self.app_state: dict[str, Any] = {**self.app_state, "peer": peer}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Handles bytes; the head of a request has to be whole in time."""
        if self._peer is None:
            return
        before = self.cycle
        if self._head_timer is None and (before is None or before.response_complete):
            self._await_head()
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Counts the peer out."""
        self._stop_waiting()
        if self._peer is not None:
            self._hall.leave(self._peer)
            self._peer = None
        super().connection_lost(exc)

    def _turn_away(self, reason: str, *, who: object) -> None:
        self._hall.refusals.note(reason, who=who, what="a connection")
        self.transport.abort()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        self._turn_away("slow", who="" if self._peer is None else self._peer.name)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers give up on whoever does not finish a TLS handshake."""

    async def create_server(self, *arguments: Any, **named: Any) -> Any:
        """Starts a server; only the two times are ours."""
        named |= {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": CLOSING_SECONDS}
        return await super().create_server(*arguments, **named)


def require_certificates(context: ssl.SSLContext, *, authority: Path, refusals: Refusals) -> None:
    """Makes a server's TLS context take TLS 1.3 only, and clients of one authority only."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.num_tickets = 0  # a session that goes on would not show its certificate again
    context.sslobject_class = _handshake(refusals)


def _handshake(refusals: Refusals) -> type[ssl.SSLObject]:
    class Handshake(ssl.SSLObject):
        """asyncio drops a failed handshake without a word; this one is counted."""

        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                refusals.note("tls", who="somebody", what=f"a handshake ({error.reason})")
                raise

    return Handshake
