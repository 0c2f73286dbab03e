from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common import flower
from server import gateway
from server.gateway import MAX_BODY_BYTES, PATHS, admit
from server.home import Home, create_home

GOOD = b"/v1/fleet/pull-messages"


@dataclass
class Upstream:
    """Stands for the SuperLink: notes what reaches it, and answers with what it got, reversed."""

    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    status: int = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        self.seen.append((request.url.path, dict(request.headers), body))
        media_type = "application/x-protobuf"
        response = Response(
            body[::-1], status_code=self.status, media_type=media_type, headers={"x-more": "1"}
        )
        await response(scope, receive, send)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("gateway") / "home"
    return create_home(directory, host="127.0.0.1", port=free_port(), internal_port=free_port())


@pytest.fixture(scope="module")
def running(home: Home) -> Iterator[Upstream]:
    """The gateway, with something behind it; both on loopback with TLS."""
    upstream = Upstream()
    config = uvicorn.Config(
        upstream,
        port=home.settings.internal_port,
        ssl_certfile=str(home.server_certificate),
        ssl_keyfile=str(home.server_key),
        lifespan="off",
        loop="asyncio",
        ws="none",
        log_level="warning",
    )
    servers = [uvicorn.Server(config), gateway.build(home)]
    threads = [threading.Thread(target=server.run) for server in servers]
    for thread in threads:
        thread.start()
    while not all(server.started for server in servers):
        time.sleep(0.01)
    yield upstream
    for server in reversed(servers):
        server.should_exit = True
    for thread in threads:
        thread.join(10)


@pytest.fixture
def upstream(running: Upstream) -> Upstream:
    running.seen.clear()
    running.status = 200
    return running


def connect(home: Home) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", home.settings.port), timeout=10)
    return home.tls.wrap_socket(plain, server_hostname="127.0.0.1")


def ask(home: Home, head: bytes, body: bytes = b"") -> tuple[int, bytes, bytes]:
    """Sends raw bytes; returns status, head and body of the answer."""
    with connect(home) as tls:
        tls.sendall(head + b"\r\n" + body)
        answer = b""
        try:
            while chunk := tls.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass  # the gateway has closed a connection on which more was to come
    first, _, content = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), first, content


def post(home: Home, path: bytes, body: bytes = b"", headers: bytes = b"") -> tuple[int, bytes, bytes]:
    length = f"Content-Length: {len(body)}\r\n".encode()
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + length + headers
    return ask(home, head, body)


def test_the_nine_paths_and_their_bodies_pass_both_ways(home: Home, upstream: Upstream) -> None:
    assert len(PATHS) == 9
    for path in sorted(PATHS):
        status, _, content = post(home, path, b"abc")
        assert (status, content) == (200, b"cba")
    assert [seen[0].encode() for seen in upstream.seen] == sorted(PATHS)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/health",
        b"/docs",
        b"/openapi.json",
        b"/v1/control/start-run",
        b"/v1/control/list-nodes",
        b"/v1/runtime/acquire-task",
        b"/v1/fleet/get-fab",
        b"/v1/fleet/register-node",
        b"/v1/fleet/unregister-node",
        b"/v1/fleet/pull-messages/",
        b"/v1/fleet//pull-messages",
        b"//v1/fleet/pull-messages",
        b"/v1/fleet/./pull-messages",
        b"/v1/fleet/x/../pull-messages",
        b"/v1/fleet/pull-messages/../../control/start-run",
        b"/v1/fleet/pull-messages/%2e%2e/%2e%2e/control/start-run",
        b"/v1/fleet/pull%2dmessages",
        b"/%761/fleet/pull-messages",
        b"/v1/fleet/PULL-MESSAGES",
        b"/V1/fleet/pull-messages",
        b"/v1/fleet/pull-messages?x=1",
        b"/v1/fleet/pull-messages%00",
        b"/v1/fleet/pull-messages%20",
        b"/v1/fleet/pull-messages;x",
        b"/v1/fleet\\pull-messages",
        b"https://127.0.0.1/v1/fleet/pull-messages",
        b"http://127.0.0.1/v1/control/start-run",
        b"*",
    ],
)
def test_every_other_path_and_every_other_spelling_is_refused(
    home: Home, upstream: Upstream, path: bytes
) -> None:
    status, _, content = post(home, path, b"abc")
    assert status in (400, 403) and b"cba" not in content
    assert upstream.seen == []


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"post", b"CONNECT"])
def test_every_other_method_is_refused(home: Home, upstream: Upstream, method: bytes) -> None:
    status, _, _ = ask(home, method + b" " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
    assert status == 403 and upstream.seen == []


def test_a_body_that_is_too_large_is_refused_before_it_is_read(home: Home, upstream: Upstream) -> None:
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % (MAX_BODY_BYTES + 1)
    assert ask(home, head)[0] == 413
    assert upstream.seen == []


def test_a_body_without_a_stated_length_is_refused_when_it_grows_too_large(
    home: Home, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 1000)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    small, large = b"a\r\n0123456789\r\n", b"3e8\r\n" + 1000 * b"x" + b"\r\n"
    assert ask(home, head, small + b"0\r\n\r\n")[0] == 200
    assert ask(home, head, small + large + b"0\r\n\r\n")[0] == 413
    assert [seen[2] for seen in upstream.seen] == [b"0123456789"]


def test_a_sender_that_is_too_slow_is_cut_off(
    home: Home, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "BODY_SECONDS", 0.2)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
    assert ask(home, head, b"12345")[0] == 408
    assert upstream.seen == []


def test_a_request_hidden_in_the_body_of_a_refused_one_is_not_answered(
    home: Home, upstream: Upstream
) -> None:
    hidden = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(hidden)
    status, _, content = ask(home, head, hidden)
    assert status == 403 and content == b"" and upstream.seen == []


def test_two_stated_lengths_are_refused(home: Home, upstream: Upstream) -> None:
    for lines in (
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: x\r\n",
    ):
        head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines
        assert ask(home, head, b"abcd")[0] in (400, 501)
    assert upstream.seen == []


def test_only_the_headers_that_identify_a_site_go_on(home: Home, upstream: Upstream) -> None:
    names = {name.lower() for name in flower.SIGNATURE_HEADERS} | {"content-type", "accept"}
    others = ["authorization", "cookie", "flwr-task-token", "flwr-superexec-signature", "x-forwarded-for"]
    lines = "".join(f"{name}: value-{name}\r\n" for name in [*sorted(names), *others])
    post(home, GOOD, b"", lines.encode())
    _, headers, _ = upstream.seen[0]
    assert {name: headers.get(name) for name in names} == {name: f"value-{name}" for name in names}
    assert not set(headers) & set(others)


def test_only_status_type_and_body_come_back(home: Home, upstream: Upstream) -> None:
    upstream.status = 412
    status, head, content = post(home, GOOD, b"abc")
    assert (status, content) == (412, b"cba")
    names = {line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    assert names == {b"content-type", b"content-length", b"connection", b"date"}


def test_old_protocols_and_plain_text_get_no_answer(home: Home, upstream: Upstream) -> None:
    old = home.tls
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    address = ("127.0.0.1", home.settings.port)
    with socket.create_connection(address, timeout=10) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname="127.0.0.1")
    with socket.create_connection(address, timeout=10) as plain:
        plain.sendall(b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)
    assert upstream.seen == []


def test_a_superlink_that_is_away_gives_503(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=free_port(), internal_port=free_port())
    server = gateway.build(home)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    assert post(home, GOOD)[0] == 503
    server.should_exit = True
    thread.join(10)


def test_admission_is_decided_by_method_path_and_stated_length_alone() -> None:
    assert admit("POST", GOOD, {}, None) is None
    assert admit("POST", GOOD, {b"content-length": b"16777216"}, ("10.0.0.7", 1)) is None
    for length in (b"16777217", b"-1", b"1e3", b"", b"+5", b"\xb2"):
        denial = admit("POST", GOOD, {b"content-length": length}, None)
        assert denial is not None and denial.status == 413
