from __future__ import annotations

import base64
import datetime
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common import certificates, flower, keys
from server import admission, connection, enrolment, gateway, rate
from server.admission import MAX_BODY_BYTES, PATHS, admit
from server.denied import deny
from server.gateway import Gateway
from server.home import Home, create_home
from server.refusals import REASONS
from server.traffic import TELL_SECONDS
from server.vitals import Vitals
from tests.callers import TYPE, Caller, certified, enrol
from tests.ports import free_port

GOOD = b"/v1/fleet/pull-messages"
KEY, TIME, SIGNATURE = flower.SIGNATURE_HEADERS


@dataclass
class Upstream:
    """Stands for the SuperLink: lists nodes, notes what reaches it, and answers what it got, reversed."""

    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    status: int = 200
    nodes: dict[bytes, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        answer = body[::-1]
        if request.url.path == "/v1/control/list-nodes":
            known = [NodeInfo(node_id=node, public_key=pem) for pem, node in self.nodes.items()]
            answer = ListNodesResponse(nodes_info=known).SerializeToString()
        else:
            self.seen.append((request.url.path, dict(request.headers), body))
        media_type = "application/x-protobuf"
        headers = {"x-more": "1"} | self.headers
        response = Response(answer, status_code=self.status, media_type=media_type, headers=headers)
        await response(scope, receive, send)


@contextmanager
def serving(*servers: uvicorn.Server) -> Iterator[None]:
    threads = [threading.Thread(target=server.run) for server in servers]
    for thread in threads:
        thread.start()
    while not all(server.started for server in servers):
        assert all(thread.is_alive() for thread in threads), "a server could not start"
        time.sleep(0.01)
    try:
        yield
    finally:
        for server in reversed(servers):
            server.should_exit = True
        for thread in threads:
            thread.join(10)


def superlink(home: Home, upstream: Upstream) -> uvicorn.Server:
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
    return uvicorn.Server(config)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("gateway") / "home"
    return create_home(directory, host="127.0.0.1", port=free_port(), internal_port=free_port())


@pytest.fixture(scope="module")
def north(home: Home) -> Caller:
    return enrol(home, "north", node_id=7)


@pytest.fixture(scope="module")
def south(home: Home) -> Caller:
    return enrol(home, "south", node_id=8)


@pytest.fixture(scope="module")
def server(home: Home) -> uvicorn.Server:
    return gateway.build(home)


@pytest.fixture(scope="module")
def running(home: Home, server: uvicorn.Server, north: Caller, south: Caller) -> Iterator[Upstream]:
    """The gateway, with something behind it; both on loopback with TLS."""
    upstream = Upstream(nodes={north.pem: north.node_id, south.pem: south.node_id})
    with serving(superlink(home, upstream), server):
        yield upstream


@pytest.fixture
def upstream(running: Upstream) -> Upstream:
    running.seen.clear()
    running.status = 200
    return running


@pytest.fixture
def client(home: Home, north: Caller, upstream: Upstream) -> Iterator[httpx.Client]:
    """A client with the certificate of a site in good standing."""
    with north.client(home) as client:
        yield client


def lines(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def connect(home: Home, tls: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", home.settings.port), timeout=10)
    return tls.wrap_socket(plain, server_hostname="127.0.0.1")


def ask(home: Home, caller: Caller, head: bytes, body: bytes = b"") -> tuple[int, bytes, bytes]:
    """Sends raw bytes; returns status, head and body of the answer."""
    with connect(home, caller.tls(home)) as tls:
        tls.sendall(head + lines(caller.signed()) + b"\r\n" + body)
        answer = b""
        try:
            while chunk := tls.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass  # the gateway has closed a connection on which more was to come
    first, _, content = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), first, content


def post(
    home: Home, caller: Caller, path: bytes, body: bytes, headers: bytes = b""
) -> tuple[int, bytes, bytes]:
    length = f"Content-Length: {len(body)}\r\n".encode()
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + length + headers
    return ask(home, caller, head, body)


def own(caller: Caller, path: bytes = GOOD) -> bytes:
    return caller.body(path.decode())


def refused(server: uvicorn.Server) -> dict[str, int]:
    application = server.config.app
    assert isinstance(application, Gateway)
    return dict(application.traffic.refused)


def test_the_nine_paths_and_their_bodies_pass_both_ways(
    client: httpx.Client, north: Caller, upstream: Upstream
) -> None:
    assert len(PATHS) == 9
    for path in sorted(PATHS):
        body = own(north, path)
        answer = client.post(path.decode(), content=body, headers=north.signed())
        assert (answer.status_code, answer.content) == (200, body[::-1])
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
    home: Home, north: Caller, upstream: Upstream, path: bytes
) -> None:
    body = own(north)
    status, _, content = post(home, north, path, body)
    assert status in (400, 403) and body[::-1] not in content
    assert upstream.seen == []


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"post", b"CONNECT"])
def test_every_other_method_is_refused(home: Home, north: Caller, upstream: Upstream, method: bytes) -> None:
    status, _, _ = ask(home, north, method + b" " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
    assert status == 403 and upstream.seen == []


def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    home: Home, north: Caller, upstream: Upstream
) -> None:
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % (MAX_BODY_BYTES + 1)
    assert ask(home, north, head)[0] == 413
    assert upstream.seen == []


def test_a_body_without_an_end_is_refused_when_it_grows_too_large(
    home: Home, north: Caller, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_BODY_BYTES", 1000)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    body = own(north)
    small, large = b"%x\r\n" % len(body) + body + b"\r\n", b"3e8\r\n" + 1000 * b"x" + b"\r\n"
    assert ask(home, north, head, small + b"0\r\n\r\n")[0] == 200
    assert ask(home, north, head, small + large)[0] == 413
    assert [seen[2] for seen in upstream.seen] == [body]


def test_a_sender_that_is_too_slow_is_cut_off(
    home: Home, north: Caller, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "BODY_SECONDS", 0.2)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
    assert ask(home, north, head, b"12345")[0] == 408
    assert upstream.seen == []


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/fleet/pull-mess"])
def test_a_head_that_does_not_end_is_cut_off(
    home: Home, north: Caller, upstream: Upstream, beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with connect(home, north.tls(home)) as tls:
        tls.sendall(beginning)
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError, ssl.SSLError)):
            while tls.recv(100):
                tls.sendall(b"x")
            raise ConnectionResetError  # an orderly end is one too
    assert upstream.seen == []


def test_a_later_head_has_no_more_time_than_the_first(
    home: Home, north: Caller, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    body = own(north)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    with connect(home, north.tls(home)) as tls:
        tls.sendall(head + lines(north.signed()) + b"\r\n" + body)
        assert tls.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.7)  # a connection may rest
        tls.sendall(head)
        begun = time.monotonic()
        with pytest.raises(OSError):
            while tls.recv(1000):
                pass
            raise ConnectionResetError  # an orderly end is one too
    assert time.monotonic() - begun < 5 and len(upstream.seen) == 1


def test_a_trickle_of_bytes_does_not_make_a_head_live_longer(
    home: Home, north: Caller, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    begun = time.monotonic()
    with connect(home, north.tls(home)) as tls, pytest.raises(OSError):
        while time.monotonic() - begun < 5:
            tls.sendall(b"P")
            time.sleep(0.05)
    assert time.monotonic() - begun < 2


def test_a_handshake_that_does_not_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.3)
    home = create_home(tmp_path / "home", host="127.0.0.1", port=free_port(), internal_port=free_port())
    with (
        serving(gateway.build(home)),
        socket.create_connection(("127.0.0.1", home.settings.port), timeout=5) as plain,
    ):
        assert plain.recv(100) == b""


def test_a_request_hidden_in_the_body_of_a_refused_one_is_not_answered(
    home: Home, north: Caller, upstream: Upstream
) -> None:
    hidden = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(hidden)
    status, _, content = ask(home, north, head, hidden)
    assert status == 403 and content == b"" and upstream.seen == []


def test_two_stated_lengths_are_refused(home: Home, north: Caller, upstream: Upstream) -> None:
    for lengths in (
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: x\r\n",
    ):
        head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lengths
        assert ask(home, north, head, b"abcd")[0] in (400, 501)
    assert upstream.seen == []


def test_only_the_headers_that_identify_a_site_go_on(
    client: httpx.Client, north: Caller, upstream: Upstream
) -> None:
    others = ["authorization", "cookie", "flwr-task-token", "flwr-superexec-signature", "x-forwarded-for"]
    signed = north.signed()
    client.post(GOOD.decode(), content=own(north), headers=signed | dict.fromkeys(others, "x"))
    _, headers, _ = upstream.seen[0]
    assert {name: headers.get(name.lower()) for name in signed} == signed
    assert not set(headers) & set(others)


def test_only_status_type_and_body_come_back(home: Home, north: Caller, upstream: Upstream) -> None:
    upstream.status = 412
    body = own(north)
    status, head, content = post(home, north, GOOD, body)
    assert (status, content) == (412, body[::-1])
    names = {line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    assert names == {b"content-type", b"content-length", b"connection", b"date"}


def test_old_protocols_and_plain_text_get_no_answer(home: Home, north: Caller, upstream: Upstream) -> None:
    old = north.tls(home)
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
    caller = enrol(home, "north", node_id=7)
    with serving(gateway.build(home)):
        for path in (GOOD, b"/v1/fleet/activate-node"):
            assert post(home, caller, path, own(caller, path))[0] == 503


def test_what_is_asked_is_decided_by_method_path_and_stated_length_alone() -> None:
    assert admit("POST", GOOD, []) is None
    assert admit("POST", GOOD, [(b"content-length", b"16777216")]) is None
    for length in (b"16777217", b"-1", b"1e3", b"", b"+5", b"\xb2"):
        denial = admit("POST", GOOD, [(b"content-length", b"1"), (b"content-length", length)])
        assert denial is not None and denial.status == 413


def answers(home: Home, tls: ssl.SSLContext, caller: Caller) -> bool:
    """Says whether the gateway answers at all to somebody with this TLS context."""
    try:
        with connect(home, tls) as connected:
            request = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
            connected.sendall(request + lines(caller.signed()) + b"\r\n")
            return bool(connected.recv(1000))
    except OSError:
        return False


def test_nobody_without_a_certificate_of_the_authority_gets_an_answer(
    home: Home, north: Caller, server: uvicorn.Server, upstream: Upstream
) -> None:
    before = refused(server).get("tls", 0)
    stranger = keys.generate()
    foreign = certificates.make_authority(stranger, name="Feverfew coordinator 127.0.0.1")
    signed = certificates.make_site_certificate(
        stranger.public_key(), name="north", authority=foreign, authority_key=stranger, days=9
    )
    contexts = [home.tls]
    for certificate in (foreign, signed):
        contexts.append(Caller(key=stranger, certificate=certificate, node_id=7).tls(home))
    of_server = home.tls
    of_server.load_cert_chain(home.server_certificate, home.server_key)  # for servers, not for clients
    contexts.append(of_server)
    assert answers(home, north.tls(home), north), "the test can tell"
    for tls in contexts:
        assert not answers(home, tls, north)
    assert refused(server)["tls"] - before == len(contexts)


def test_an_expired_certificate_gets_no_answer(home: Home, north: Caller, upstream: Upstream) -> None:
    past = certified(home, north.key, name="north", seconds=-5)
    assert not answers(home, replace(north, certificate=past).tls(home), north)


@pytest.mark.slow
def test_a_certificate_that_expires_ends_what_its_connection_may_do(
    home: Home, north: Caller, upstream: Upstream
) -> None:
    soon = replace(north, certificate=certified(home, north.key, name="north", seconds=2))
    end = soon.certificate.not_valid_after_utc.timestamp()
    with soon.client(home) as client:
        assert client.post(GOOD.decode(), content=own(north), headers=north.signed()).status_code == 200
        time.sleep(max(0.0, end - time.time()) + 1.05)  # ends with its last second
        answer = client.post(GOOD.decode(), content=own(north), headers=north.signed())
    assert answer.status_code == 403 and "renew" in answer.json()["detail"]
    assert len(upstream.seen) == 1


def test_a_key_that_the_superlink_does_not_know_gets_nowhere(home: Home, upstream: Upstream) -> None:
    caller = enrol(home, "east", node_id=0)
    for path in sorted({*PATHS} - {b"/v1/fleet/activate-node"}):
        for node in (0, 7):
            assert post(home, caller, path, caller.body(path.decode(), node=node))[0] == 403
    assert upstream.seen == []


def test_a_site_speaks_with_its_own_key_only(
    client: httpx.Client, north: Caller, south: Caller, upstream: Upstream
) -> None:
    stolen = north.signed() | {KEY: south.signed()[KEY]}
    for headers in (south.signed(), stolen, north.signed() | {KEY: ""}, TYPE):
        assert client.post(GOOD.decode(), content=own(south), headers=headers).status_code == 401
    assert upstream.seen == []


def test_a_site_speaks_for_its_own_node_only(
    client: httpx.Client, north: Caller, south: Caller, upstream: Upstream
) -> None:
    for path in sorted(path.decode() for path in PATHS):
        body = south.body(path)
        assert client.post(path, content=body, headers=north.signed()).status_code == 403
    push = "/v1/fleet/push-messages"
    body = north.body(push, sender=south.node_id)
    assert client.post(push, content=body, headers=north.signed()).status_code == 403
    two = north.body(push) + south.body(push)  # fields that come twice are merged
    assert client.post(push, content=two, headers=north.signed()).status_code == 403
    assert upstream.seen == []


def test_what_is_no_request_is_refused(client: httpx.Client, north: Caller, upstream: Upstream) -> None:
    assert client.post(GOOD.decode(), content=b"\xff\xff", headers=north.signed()).status_code == 400
    assert client.post(GOOD.decode(), content=b"", headers=north.signed()).status_code == 403
    assert upstream.seen == []


def test_a_request_that_was_altered_is_refused(
    client: httpx.Client, north: Caller, south: Caller, upstream: Upstream
) -> None:
    signed = north.signed()
    later = datetime.datetime.fromisoformat(signed[TIME]) + datetime.timedelta(microseconds=1)
    alterations = [
        signed | {TIME: later.isoformat()},
        signed | {TIME: signed[TIME].replace("+00:00", "Z")},
        signed | {SIGNATURE: signed[SIGNATURE][:-8] + "AAAAAAA="},
        signed | {SIGNATURE: "no base64"},
        north.signed(signer=south.key),
        north.signed(stamp="yesterday"),
        north.signed(stamp="2026-01-01T00:00:00"),
    ]
    for headers in alterations:
        assert client.post(GOOD.decode(), content=own(north), headers=headers).status_code == 401, headers
    assert upstream.seen == []


def test_a_request_is_taken_once(client: httpx.Client, north: Caller, upstream: Upstream) -> None:
    signed = north.signed()
    first, second = decode_dss_signature(base64.b64decode(signed[SIGNATURE]))
    order = int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16)  # of P-384
    twin = base64.b64encode(encode_dss_signature(first, order - second)).decode()
    beat = "/v1/fleet/send-node-heartbeat"
    assert client.post(GOOD.decode(), content=own(north), headers=signed).status_code == 200
    for path, headers in (
        (GOOD.decode(), signed),
        (beat, signed),
        (GOOD.decode(), signed | {SIGNATURE: twin}),
    ):
        assert client.post(path, content=north.body(path), headers=headers).status_code == 401
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("name", [KEY, TIME, SIGNATURE])
def test_a_header_that_comes_twice_is_refused(
    client: httpx.Client, north: Caller, south: Caller, upstream: Upstream, name: str
) -> None:
    """The SuperLink would look at the first of them, and others at the last."""
    for order in (1, -1):
        twice = [*north.signed().items(), (name, south.signed()[name])][::order]
        assert client.post(GOOD.decode(), content=own(north), headers=twice).status_code == 401
    assert upstream.seen == []


def test_a_clock_that_is_wrong_is_told_so(client: httpx.Client, north: Caller, upstream: Upstream) -> None:
    for late_seconds, told in ((310, "310 s behind"), (3600, "3600 s behind"), (-60, "60 s ahead")):
        headers = north.signed(late_seconds=late_seconds)
        answer = client.post(GOOD.decode(), content=own(north), headers=headers)
        assert answer.status_code == 425 and told in answer.json()["detail"]
        assert "set this computer's clock" in answer.json()["detail"]
    assert upstream.seen == []
    for late_seconds in (250, -3):
        headers = north.signed(late_seconds=late_seconds)
        assert client.post(GOOD.decode(), content=own(north), headers=headers).status_code == 200


def test_a_gateway_that_starts_again_takes_no_request_a_second_time(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=free_port(), internal_port=free_port())
    caller = enrol(home, "north", node_id=7)
    upstream = Upstream(nodes={caller.pem: 7})
    used = [caller.signed(), caller.signed(late_seconds=-3)]
    statuses = []
    with serving(superlink(home, upstream)):
        for headers in ([*used], [*used, caller.signed(late_seconds=-4)]):
            with serving(gateway.build(home)), caller.client(home) as client:
                for one in headers:
                    statuses.append(client.post(GOOD.decode(), content=own(caller), headers=one).status_code)
    assert statuses == [200, 200, 401, 401, 200]


def test_a_superlink_with_a_new_data_base_has_other_nodes_and_the_gateway_finds_out(
    home: Home, upstream: Upstream, client: httpx.Client, north: Caller
) -> None:
    assert client.post(GOOD.decode(), content=own(north), headers=north.signed()).status_code == 200
    former, fresh = north.node_id, replace(north, node_id=north.node_id + 1000)
    upstream.nodes[north.pem] = fresh.node_id
    time.sleep(1.1)  # the gateway asks again once a second
    try:
        answers = [
            client.post(GOOD.decode(), content=own(caller), headers=caller.signed()).status_code
            for caller in (fresh, north)
        ]
    finally:
        upstream.nodes[north.pem] = former
        time.sleep(1.1)
    assert answers == [200, 403]


def test_a_revoked_site_is_out_on_open_connections_within_a_second(
    home: Home, upstream: Upstream, server: uvicorn.Server
) -> None:
    caller = enrol(home, "west", node_id=9)
    upstream.nodes[caller.pem] = 9
    time.sleep(1.1)  # the gateway asks for unknown keys once a second
    with caller.client(home) as client:
        assert client.post(GOOD.decode(), content=own(caller), headers=caller.signed()).status_code == 200
        enrolment.revoke(home, "west")
        begun = time.monotonic()
        answer = client.post(GOOD.decode(), content=own(caller), headers=caller.signed())
    assert answer.status_code == 403 and "revoked" in answer.json()["detail"]
    assert time.monotonic() - begun < 1 and len(upstream.seen) == 1 and refused(server)["revoked"] == 1


def test_a_body_that_a_site_was_sending_when_it_was_revoked_goes_nowhere(
    home: Home, upstream: Upstream
) -> None:
    caller = enrol(home, "sending", node_id=10)
    upstream.nodes[caller.pem] = 10
    body = own(caller)
    head = b"POST " + GOOD + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    time.sleep(1.1)
    with connect(home, caller.tls(home)) as tls:
        tls.sendall(head + lines(caller.signed()) + b"\r\n" + body[:-1])
        time.sleep(0.2)
        deny(home.denied, [keys.fingerprint(caller.key.public_key())], site="sending", why="revoked")
        tls.sendall(body[-1:])
        assert tls.recv(1000).startswith(b"HTTP/1.1 403")
    assert upstream.seen == []


@pytest.mark.parametrize("damage", [None, "# a comment\nno fingerprint\n"])
def test_without_a_deny_list_nobody_is_let_in(
    home: Home, client: httpx.Client, north: Caller, upstream: Upstream, damage: str | None
) -> None:
    kept = home.denied.read_bytes()
    home.denied.unlink() if damage is None else home.denied.write_text(damage)
    answer = client.post(GOOD.decode(), content=own(north), headers=north.signed())
    home.denied.write_bytes(kept)
    assert answer.status_code == 503 and "deny list" in answer.json()["detail"]
    assert client.post(GOOD.decode(), content=own(north), headers=north.signed()).status_code == 200


def test_a_site_that_asks_too_often_is_slowed_down_and_others_are_not(
    home: Home, client: httpx.Client, north: Caller, south: Caller, upstream: Upstream
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "BURST", 5.0)
        patch.setattr(rate, "REQUESTS_A_SECOND", 0.0)
        told = [client.post(GOOD.decode(), content=own(north), headers=north.signed()) for _ in range(7)]
        assert [answer.status_code for answer in told] == [200] * 5 + [429] * 2
        with south.client(home) as other:
            assert other.post(GOOD.decode(), content=own(south), headers=south.signed()).status_code == 200
    time.sleep(0.1)
    assert client.post(GOOD.decode(), content=own(north), headers=north.signed()).status_code == 200


def test_a_site_has_only_so_many_connections_and_others_have_theirs(
    home: Home, north: Caller, south: Caller, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_PER_SITE", 3)
    time.sleep(0.2)  # until connections of earlier tests are gone
    tls = south.tls(home)
    open_ones = [connect(home, tls) for _ in range(3)]
    time.sleep(0.1)
    assert not answers(home, tls, south)
    assert answers(home, north.tls(home), north)
    for one in open_ones:
        one.close()
    time.sleep(0.2)
    assert answers(home, tls, south)


def metrics(home: Home) -> dict[tuple[str, str], float]:
    """Returns what /metrics of the coordinator says of the gateway, by name and reason."""
    families = Vitals(home).registry.collect()
    return {
        (one.name.removeprefix("feverfew_gateway_"), one.labels.get("reason", "")): one.value
        for family in families
        for one in family.samples
        if one.name.startswith("feverfew_gateway_")
    }


@pytest.mark.slow
def test_what_is_refused_is_counted_by_reason_and_logged_within_bounds(
    home: Home,
    client: httpx.Client,
    north: Caller,
    server: uvicorn.Server,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = refused(server).get("path", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            client.post("/v1/control/start-run", content=b"", headers=north.signed())
    application = server.config.app
    assert isinstance(application, Gateway)
    traffic = application.traffic
    assert traffic.refused["path"] - before == 100
    assert client.post(GOOD.decode(), content=own(north), headers=north.signed()).status_code == 200
    assert application.traffic.passed == traffic.passed + 1
    time.sleep(2 * TELL_SECONDS)
    shown = metrics(home)
    assert {reason for name, reason in shown if name == "refused_total"} == set(REASONS)
    assert shown["refused_total", "path"] == traffic.refused["path"] and shown["passed_total", ""] > 0
    assert shown["connections", ""] == shown["sites", ""] == 1
    told = [line for line in caplog.messages if "'/v1/control/start-run' from north: path" in line]
    assert 5 <= len(told) < 100  # earlier refusals may have used up some of the lines
