"""Which requests the gateway lets through: of a site with a good standing, fresh, and in its own name."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common import flower
from common.errors import StateError
from server.denied import Denied
from server.freshness import Freshness, clock_problem, microseconds
from server.nodes import Nodes, key_of, nodes_of
from server.peer import Peer
from server.rate import Bucket

Headers = Sequence[tuple[bytes, bytes]]

PATHS: Final = {f"/v1/fleet/{name}".encode(): form for name, form in flower.FLEET_REQUESTS.items()}
"""The nine paths that an agent needs, and the form of each request."""
MAX_BODY_BYTES: Final = 16 * 2**20
"""Flower sends arrays in chunks of 5 MiB; the rest of a message is small."""
KEY, TIME, SIGNATURE = (name.lower().encode() for name in flower.SIGNATURE_HEADERS)
_ALGORITHM: Final = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, kw_only=True)
class Denial:
    """Why a request goes no further: an HTTP status, a word for the log, a sentence for a site."""

    status: int
    reason: str
    detail: str = ""


def admit(method: str, target: bytes, headers: Headers) -> Denial | None:
    """Decides on what is asked; None lets it pass.

    The path is compared byte by byte as it came over the wire: nothing is decoded or tidied up, so no
    spelling of another path can become one of ours.

    Args:
        method: as it came.
        target: the request's target, a query included.
        headers: names in lower case.
    """
    if target not in PATHS:
        return Denial(status=403, reason="path")
    if method != "POST":
        return Denial(status=403, reason="method")
    for length in values(headers, b"content-length"):
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return Denial(status=413, reason="size")
    return None


def values(headers: Headers, name: bytes) -> list[bytes]:
    """Returns all values of a header; of two, another program may look at the other one."""
    return [value for key, value in headers if key == name]


class Admission:
    """Decides on who asks.

    Args:
        denied: keys that are not let in.
        freshness: signed times that were used up.
        nodes: the node of each key.
    """

    def __init__(self, *, denied: Denied, freshness: Freshness, nodes: Nodes) -> None:
        self._denied = denied
        self._freshness = freshness
        self._nodes = nodes
        self._buckets: dict[str, Bucket] = {}

    def standing(self, peer: Peer) -> Denial | None:
        """Says whether a site may ask at all, now: connections may be older than a revocation."""
        try:
            if peer.fingerprint in self._denied:
                detail = "Expected a key that is admitted, found one that was revoked; ask the coordinator."
                return Denial(status=403, reason="revoked", detail=detail)
        except StateError as error:
            return Denial(status=503, reason="deny list", detail=str(error))
        if not peer.is_valid():
            detail = "Expected a certificate that is valid today, found another; see feverfew-client renew."
            return Denial(status=403, reason="expired", detail=detail)
        return None

    def head(self, peer: Peer, headers: Headers) -> Denial | None:
        """Decides by the head of a request: standing, rate, key, time and signature."""
        denial = self.standing(peer)
        if denial is not None:
            return denial
        now = time.monotonic()
        if not self._buckets.setdefault(peer.fingerprint, Bucket(now=now)).take(now=now):
            return Denial(status=429, reason="rate", detail="Expected fewer requests a second; wait.")
        found = [values(headers, name) for name in (KEY, TIME, SIGNATURE)]
        if [len(one) for one in found] != [1, 1, 1] or found[0] != [peer.header]:
            return Denial(status=401, reason="key", detail="Expected the key of the certificate.")
        return self._signed(peer, stamp=found[1][0], signature=found[2][0])

    async def body(self, peer: Peer, target: bytes, body: bytes) -> Denial | None:
        """Decides by the content of a request: a site speaks for its own node only."""
        try:
            request: Any = PATHS[target].FromString(body)
        except flower.DecodeError:
            return Denial(status=400, reason="malformed")
        key = key_of(request)
        if key is not None:
            return None if key == peer.pem else Denial(status=403, reason="node")
        try:
            is_own = await self._nodes.belong(nodes_of(request), to=peer.pem)
        except httpx.HTTPError:
            return Denial(status=503, reason="superlink")
        return None if is_own else Denial(status=403, reason="node")

    def _signed(self, peer: Peer, *, stamp: bytes, signature: bytes) -> Denial | None:
        try:
            signed_at = microseconds(stamp)
            peer.key.verify(base64.b64decode(signature, validate=True), stamp, _ALGORITHM)
        except (ValueError, OverflowError, InvalidSignature, binascii.Error):
            return Denial(status=401, reason="signature")
        now = time.time_ns() // 1000
        problem = clock_problem(signed_at, now=now)
        if problem:
            return Denial(status=425, reason="time", detail=problem)
        if not self._freshness.take(peer.fingerprint, signed_at, now=now):
            return Denial(status=401, reason="replay")
        return None
