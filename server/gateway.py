"""The only thing that hospitals can reach: passes nine paths of Flower's Fleet API, refuses everything else.

The SuperLink behind it serves the Control API on the same port, where whoever asks may start runs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from ssl import TLSVersion
from typing import Final

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common import flower
from server.home import Home, open_home

logger = logging.getLogger("feverfew.gateway")

PATHS: Final = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What the agent needs. Not ``get-fab`` (code), not registration (the coordinator's business)."""

MAX_BODY_BYTES: Final = 16 * 2**20
"""Flower sends arrays in chunks of 5 MiB; the rest of a message is small."""
BODY_SECONDS: Final = 60.0
"""For a whole body: 16 MiB at 2.2 Mbit/s. A slower sender is cut off."""
ANSWER_SECONDS: Final = 60.0
MAX_CONNECTIONS: Final = 512
KEEP_ALIVE_SECONDS: Final = 75
REQUEST_HEADERS: Final = frozenset(
    name.lower().encode() for name in ("content-type", "accept", *flower.SIGNATURE_HEADERS)
)
"""What goes on to the SuperLink; its other headers belong to APIs that no site needs."""


@dataclass(frozen=True, kw_only=True)
class Denial:
    """Why a request goes no further: an HTTP status, and a word for the log."""

    status: int
    reason: str


def admit(
    method: str, raw_path: bytes, headers: Mapping[bytes, bytes], peer: tuple[str, int] | None
) -> Denial | None:
    """Decides on a request by its head alone; None lets it pass.

    The path is compared byte by byte as it came over the wire: nothing is decoded or tidied up, so no
    spelling of another path can become one of ours.

    Args:
        method: as it came.
        raw_path: the request's target, a query included.
        headers: names in lower case.
        peer: address and port of the other end.
    """
    del peer  # limits for each site need it
    if raw_path not in PATHS:
        return Denial(status=403, reason="path")
    if method != "POST":
        return Denial(status=403, reason="method")
    length = headers.get(b"content-length")
    if length is not None and (not length.isdigit() or int(length) > MAX_BODY_BYTES):
        return Denial(status=413, reason="size")
    return None


class Gateway:
    """An ASGI application: decides, reads the body within limits, asks the SuperLink, hands on its answer."""

    def __init__(self, upstream: httpx.AsyncClient) -> None:
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert scope["type"] == "http", "uvicorn runs without websockets"
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._upstream.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, request: Request) -> Response:
        scope = request.scope
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        denial = admit(scope["method"], target, dict(scope["headers"]), scope["client"])
        if denial is None:
            body = await self._body(request)
            if not isinstance(body, Denial):
                return await self._forward(scope["raw_path"].decode("ascii"), request, body)
            denial = body
        logger.warning("refused %s from %s: %s", ascii(target[:200]), scope["client"], denial.reason)
        # The connection is closed, so that what is left of a body is not taken for a request.
        return Response(status_code=denial.status, headers={"connection": "close"})

    async def _body(self, request: Request) -> bytes | Denial:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        return Denial(status=413, reason="size")
        except TimeoutError:
            return Denial(status=408, reason="slow")
        return bytes(body)

    async def _forward(self, path: str, request: Request, body: bytes) -> Response:
        headers = [(name, value) for name, value in request.scope["headers"] if name in REQUEST_HEADERS]
        try:
            answer = await self._upstream.post(path, content=body, headers=headers)
        except httpx.ConnectError:
            return Response(status_code=503)  # nothing was sent
        except httpx.TransportError as error:
            logger.warning("no answer from the SuperLink for %s: %s", path, type(error).__name__)
            return Response(status_code=502)
        media_type = answer.headers.get("content-type")
        return Response(answer.content, status_code=answer.status_code, media_type=media_type)


def build(home: Home) -> uvicorn.Server:
    """Returns the gateway of a coordinator, ready to run.

    Raises:
        UserError: a key file is missing or readable by others.
    """
    home.check_secrets()
    upstream = httpx.AsyncClient(
        base_url=f"https://{home.internal_address}",
        verify=home.tls,
        timeout=ANSWER_SECONDS,
        trust_env=False,  # a proxy has no place between gateway and SuperLink
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=4.0),
    )
    config = uvicorn.Config(
        Gateway(upstream),
        host=home.settings.bind,
        port=home.settings.port,
        http="h11",  # keeps the target of a request as it came
        loop="asyncio",  # the same everywhere, whatever else is installed
        ws="none",
        lifespan="on",
        ssl_certfile=str(home.server_certificate),
        ssl_keyfile=str(home.server_key),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
        access_log=False,
        log_level="warning",
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = TLSVersion.TLSv1_3
    return uvicorn.Server(config)


def main() -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    build(open_home(Path(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
