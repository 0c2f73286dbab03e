"""Small DICOMweb servers for tests: one that answers as it is told, and a proxy with TLS or a token."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.orthanc import scan
from tests.ports import free_port

Handler = Callable[[Request], Any]
TYPE = 'multipart/related; type="application/dicom"; boundary=xyz'
STUDY, SERIES = "1.2.826.0.1.3680043.10.1.1", "1.2.826.0.1.3680043.10.1.1.1"
FILES: Mapping[str, bytes] = {f"{SERIES}.{number}": file for number, file in enumerate(scan(1), start=1)}


class Switch:
    """A server whose answers may be changed while it runs."""

    app: Starlette

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@contextlib.contextmanager
def served(app: Starlette | Switch, *, certificate: Path | None = None) -> Iterator[str]:
    """Yields the address of the root of a server, for as long as the block lasts; with TLS, given key and
    certificate in one file."""
    port = free_port()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        lifespan="off",
        ws="none",
        ssl_certfile=certificate,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server could not start"
            time.sleep(0.01)
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def element(value: Any) -> dict[str, Any]:
    return {"vr": "LO", "Value": [value]}


def page(results: Sequence[Any], request: Request) -> Sequence[Any]:
    """Returns what a correct server answers to ``limit`` and ``offset``."""
    offset = int(request.query_params.get("offset", 0))
    return results[offset : offset + int(request.query_params.get("limit", len(results)))]


STUDIES = [{"0020000D": element(STUDY), "00100020": element("P1"), "00080050": element("A1")}]
ALL_SERIES = [{"0020000E": element(SERIES), "00080060": element("CT")}]
INSTANCES = [{"00080018": element(uid)} for uid in FILES]


def parts(content: bytes, *, boundary: bytes = b"xyz") -> bytes:
    return (
        b"--"
        + boundary
        + b"\r\nContent-Type: application/dicom\r\n\r\n"
        + content
        + b"\r\n--"
        + boundary
        + b"--"
    )


def give(request: Request) -> Response:
    return Response(parts(FILES[request.path_params["instance"]]), headers={"Content-Type": TYPE})


def listed(results: Sequence[Any]) -> Handler:
    return lambda request: JSONResponse(page(results, request))


def archive(**changed: Handler) -> Starlette:
    """Returns a server of one series of three slices, with handlers of its own for some questions.

    Args:
        changed: for ``studies``, ``series``, ``instances`` or ``instance`` what answers instead.
    """
    handlers: dict[str, Handler] = {
        "studies": listed(STUDIES),
        "series": listed(ALL_SERIES),
        "instances": listed(INSTANCES),
        "instance": give,
    } | changed
    series = "/studies/{study:path}/series"
    paths = {
        "studies": "/studies",
        "instance": series + "/{series}/instances/{instance}",
        "instances": series + "/{series}/instances",
        "series": series,
    }
    return Starlette(routes=[Route(path, handlers[name]) for name, path in paths.items()])


def proxy(upstream: str, *, token: str | None = None) -> Starlette:
    """Returns a proxy that passes everything on; given a token, only what bears it, and not the token."""

    async def forward(request: Request) -> Response:
        asked = {
            name: request.headers[name] for name in ("accept", "authorization") if name in request.headers
        }
        if token is not None and asked.pop("authorization", "") != f"Bearer {token}":
            return Response("who are you?", status_code=401)
        async with httpx.AsyncClient(base_url=upstream) as client:
            query = request.query_params.multi_items()
            answer = await client.get(request.url.path, params=query, headers=asked)
        kind = {"Content-Type": answer.headers.get("Content-Type", "text/plain")}
        return Response(answer.content, answer.status_code, headers=kind)

    return Starlette(routes=[Route("/{path:path}", forward)])


def certificate(directory: Path) -> Path:
    """Writes ``server.pem`` (key and certificate) and ``ca.pem``, for 127.0.0.1; returns that."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "PACS")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "server.pem").write_bytes(secret + public)
    (directory / "ca.pem").write_bytes(public)
    return directory / "ca.pem"
