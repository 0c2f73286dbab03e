"""The only thing that hospitals can reach: passes nine paths of Flower's Fleet API, refuses everything else.

The SuperLink behind it serves the Control API on the same port, where whoever asks may start runs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from common import flower, logline
from server import admission
from server.admission import Admission, Denial, admit
from server.connection import Connection, Hall, require_certificates
from server.denied import Denied
from server.freshness import Freshness, Marks
from server.home import Home, open_home
from server.nodes import Nodes
from server.peer import Peer
from server.refusals import Refusals
from server.traffic import TELL_SECONDS, Traffic

logger = logging.getLogger("feverfew.gateway")

BODY_SECONDS: Final = 60.0
"""For a whole body: 16 MiB at 2.2 Mbit/s. A slower sender is cut off."""
ANSWER_SECONDS: Final = 60.0
MAX_CONNECTIONS: Final = 512
KEEP_ALIVE_SECONDS: Final = 75
REQUEST_HEADERS: Final = frozenset(
    name.lower().encode() for name in ("content-type", "accept", *flower.SIGNATURE_HEADERS)
)
"""What goes on to the SuperLink; its other headers belong to APIs that no site needs."""


class Gateway:
    """An ASGI application: decides, reads the body within limits, asks the SuperLink, hands on its answer.

    Args:
        admission: decides on who asks.
        hall: who is connected, and what was refused.
        upstream: asks the SuperLink.
        close: called at the end.
        tell: told every second what was passed and refused.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        hall: Hall,
        upstream: httpx.AsyncClient,
        close: Callable[[], None],
        tell: Callable[[Traffic], None],
    ) -> None:
        self._admission = admission
        self._hall = hall
        self._upstream = upstream
        self._close = close
        self._tell = tell
        self._passed = 0

    @property
    def traffic(self) -> Traffic:
        """What happened since the start."""
        return Traffic(
            passed=self._passed,
            refused=dict(self._hall.refusals.counts),
            connections=self._hall.present.total(),
            sites=len(self._hall.present),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert scope["type"] == "http", "uvicorn runs without websockets"
        request = Request(scope, receive)
        try:
            response = await self._respond(request, scope["state"]["peer"])
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        telling = asyncio.create_task(self._keep_telling())
        await receive()
        telling.cancel()
        self._tell(self.traffic)
        await self._upstream.aclose()
        self._close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _keep_telling(self) -> None:
        while True:
            self._tell(self.traffic)
            await asyncio.sleep(TELL_SECONDS)

    async def _respond(self, request: Request, peer: Peer) -> Response:
        scope = request.scope
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        denial = admit(scope["method"], target, scope["headers"])
        denial = denial or self._admission.head(peer, scope["headers"])
        body = denial or await self._body(request)
        if not isinstance(body, Denial):
            denial = await self._admission.body(peer, target, body)
            denial = denial or self._admission.standing(peer)  # reading and asking took time
            if denial is None:
                self._passed += 1
                return await self._forward(target.decode("ascii"), request, body)
            body = denial
        with logline.about(site=peer.name):
            self._hall.refusals.note(body.reason, who=peer.name, what=ascii(target[:200]))
        # The connection is closed, so that what is left of a body is not taken for a request.
        closing = {"connection": "close"}
        if not body.detail:
            return Response(status_code=body.status, headers=closing)
        return JSONResponse({"detail": body.detail}, status_code=body.status, headers=closing)

    async def _body(self, request: Request) -> bytes | Denial:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > admission.MAX_BODY_BYTES:
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
    hall, marks = Hall(Refusals()), Marks(home.state / "gateway.marks")
    upstream = httpx.AsyncClient(
        base_url=f"https://{home.internal_address}",
        verify=home.tls,
        timeout=ANSWER_SECONDS,
        trust_env=False,  # a proxy has no place between gateway and SuperLink
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=4.0),
    )
    gateway = Gateway(
        admission=Admission(
            denied=Denied(home.denied),
            freshness=Freshness(marks),
            nodes=Nodes(functools.partial(registered, home)),
        ),
        hall=hall,
        upstream=upstream,
        close=marks.close,
        tell=lambda traffic: traffic.write(home.traffic),
    )
    config = uvicorn.Config(
        gateway,
        host=home.settings.bind,
        port=home.settings.port,
        http=functools.partial(Connection, hall=hall),  # h11 keeps the target of a request as it came
        loop="server.connection:Loop",
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
        log_config=None,  # its lines are like ours
    )
    config.load()
    assert config.ssl is not None
    require_certificates(config.ssl, authority=home.authority_certificate, refusals=hall.refusals)
    return uvicorn.Server(config)


def registered(home: Home) -> Mapping[bytes, int]:
    """Returns the node of every key that the SuperLink has registered."""
    with home.control() as control:
        return {node.public_key: node.node_id for node in control.nodes()}


def main() -> None:
    form: logline.Format = "json" if os.environ.get(logline.VARIABLE) == "json" else "text"
    logline.start("gateway", form=form, output=sys.stdout)
    build(open_home(Path(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
