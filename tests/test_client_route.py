"""The way to the gateway: straight, through a hospital's proxy, and where it is barred; real sockets."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from client import coordinator, credential, inspection, skeleton
from client.access import Access
from client.check import Line
from client.patience import persist, reason
from client.proxy import NamedProxy, Proxy, proxy_to
from client.route import Barred
from client.site import Site, open_site, read_settings
from common import certificates, keys
from common.errors import ConfigError, UserError
from server import enrolment, gateway
from server.home import Home, create_home
from tests.dicomweb import archive, served
from tests.forward_proxy import ForwardProxy
from tests.orthanc import site_of
from tests.ports import free_port
from tests.test_server_gateway import Upstream, serving, superlink

PASSWORD = "pä:ss wörd"
LOGIN = f"feverfew:{PASSWORD}"
ISSUER, SUBJECT = "Inspecting proxy of the hospital", "127.0.0.1"
VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


@dataclass(frozen=True, kw_only=True)
class World:
    """A gateway with something behind it, and a site that is enrolled."""

    home: Home
    site: Path
    upstream: Upstream

    @property
    def address(self) -> str:
        return self.home.invitation.address

    def with_proxy(self, setting: Any) -> Site:
        """Returns the site with this in ``site.yaml``."""
        path = self.site / "site.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"proxy": setting}))
        return open_site(self.site)

    def lines(self, setting: Any) -> dict[str, Line]:
        """Returns what check says about the way to the coordinator."""
        return {line.name: line for line in inspection.connection_lines(self.with_proxy(setting))}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("route")
    home = create_home(directory / "home", host="127.0.0.1", port=free_port(), internal_port=free_port())
    site = directory / "north"
    skeleton.complete(site, name="north", nominal_patients=100)
    enrolled = enrolment.admit(home, "north", request=(site / "north.csr").read_text(), renewed=False)
    invitation = enrolment.invitation(home, enrolled)
    coordinator.accept(invitation, directory=site)
    credential.accept(site / "private", invitation, name="north")
    keys.write_secret(site / "private" / "proxy.password", f"{PASSWORD}\n".encode())
    keys.write_secret(site / "private" / "wrong.password", b"wrong")
    upstream = Upstream(status=503)
    with serving(superlink(home, upstream), gateway.build(home)):
        yield World(home=home, site=site, upstream=upstream)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "TIMEOUT_SECONDS", 0.5)


def named(url: str, *, password: str = "", ca: Path | None = None) -> dict[str, Any]:
    basic = {"kind": "basic", "user": "feverfew", "password_file": f"private/{password}.password"}
    authentication = basic if password else {"kind": "none"}
    return {
        "url": url,
        "authentication": authentication,
        "ca_certificate": None if ca is None else str(ca),
    }


def server_context(directory: Path, *, issuer: str = ISSUER) -> tuple[ssl.SSLContext, Path]:
    """Returns a server's TLS for 127.0.0.1 by an authority of its own, and the certificate of that."""
    directory.mkdir()
    key, authority_key = keys.generate(), keys.generate()
    authority = certificates.make_authority(authority_key, name=issuer)
    made = certificates.make_server_certificate(
        key.public_key(), hosts=[SUBJECT], authority=authority, authority_key=authority_key
    )
    keys.write_private(directory / "key", key)
    (directory / "crt").write_text(certificates.to_pem(made))
    (directory / "ca").write_text(certificates.to_pem(authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "crt", directory / "key")
    return context, directory / "ca"


def test_a_site_goes_straight_where_nobody_names_a_proxy(world: World) -> None:
    for setting in ("environment", None):
        lines = world.lines(setting)
        assert {line.level for line in lines.values()} == {"ok"}
        assert lines["proxy"].text == f"none, straight to {world.address}"


def test_check_reaches_the_gateway_through_a_proxy_and_names_it(world: World) -> None:
    with ForwardProxy(login=LOGIN) as proxy:
        lines = world.lines(named(proxy.url, password="proxy"))
    assert {line.level for line in lines.values()} == {"ok"}
    assert (
        lines["proxy"].text == f"{proxy.url} (site.yaml)" and "through the proxy" in lines["connection"].text
    )
    assert proxy.targets == [world.address]


def test_everything_that_a_site_asks_goes_through_the_proxy_with_its_certificate(world: World) -> None:
    with ForwardProxy(login=LOGIN) as proxy:
        site = world.with_proxy(named(proxy.url, password="proxy"))
        fleet = Access(site.directory, proxy=site.settings.proxy).fleet()
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            fleet.beat()  # the gateway lets it in, and asks what is behind it
        fleet.close()
    assert proxy.targets == [world.address]


BARRED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "nobody named": ({"login": LOGIN}, "", ("wants a user and a password (407)", "hospital's IT")),
    "a wrong password": ({"login": LOGIN}, "wrong", ("does not take its user and password (407)",)),
    "forbidden": ({"status": 403}, "", ("forbids", "(403)", "allow CONNECT")),
    "nobody behind": ({"status": 502}, "", ("does not reach", "(502)", "the coordinator")),
    "refused": ({"status": 405}, "", ("refuses CONNECT", "(405)", "hospital's IT")),
    "stalled": ({"stalls": True}, "", ("no answer to CONNECT (time-out)", "hospital's IT")),
    "a page instead": ({"instead": b"<html>Log in first</html>"}, "", ("speaks no TLS", "hospital's IT")),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("faults", "password", "told"), BARRED.values(), ids=BARRED.keys())
def test_check_says_how_a_proxy_bars_the_way_and_whom_to_ask(
    world: World, faults: dict[str, Any], password: str, told: tuple[str, ...]
) -> None:
    with ForwardProxy(**faults) as proxy:
        line = world.lines(named(proxy.url, password=password))["connection"]
    assert line.level == "error" and all(part in line.text for part in (*told, proxy.url, world.address)[:-1])
    assert "wrong" not in line.text.partition("407")[2]


def test_a_proxy_that_is_not_there_is_named(world: World) -> None:
    line = world.lines(named(f"http://127.0.0.1:{free_port()}"))["connection"]
    assert "the proxy http://127.0.0.1" in line.text and "is not reached (Connection refused)" in line.text


def test_a_gateway_that_is_not_reached_straight_makes_check_think_of_a_proxy(tmp_path: Path) -> None:
    refused = httpx.ConnectError("[Errno 111] Connection refused")
    assert reason(refused) == "ConnectError"
    told = pytest.raises(Barred, match="If this network needs a proxy")
    with client_of(tmp_path, port=free_port()) as client, told:
        client.get("/")


def client_of(directory: Path, *, port: int) -> httpx.Client:
    """Returns a client of a gateway that is not there, by a new coordinator's authority."""
    from client.route import Route

    home = create_home(directory / "home", host="127.0.0.1", port=port, internal_port=1)
    pem = home.invitation.certificate
    route = Route(home.invitation.address, authority=pem, tls=keys.trust_only(pem), proxy=None)
    return httpx.Client(base_url=f"https://{home.invitation.address}", transport=route, trust_env=False)


@pytest.fixture(params=["TLS 1.3", "TLS 1.2"])
def inspector(request: pytest.FixtureRequest, tmp_path: Path) -> ssl.SSLContext:
    """TLS of a proxy that breaks open what it carries."""
    context, _ = server_context(tmp_path / "inspector")
    if request.param == "TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def test_check_names_who_breaks_tls_open_and_what_to_ask_for(world: World, inspector: ssl.SSLContext) -> None:
    with ForwardProxy(inspects=inspector) as proxy:
        line = world.lines(named(proxy.url))["connection"]
    assert line.level == "error" and "is broken open, or the address is wrong" in line.text
    assert f"issued by 'CN={ISSUER}'" in line.text and f"for 'CN={SUBJECT}'" in line.text
    assert f"IT to except {world.address} from inspection" in line.text
    assert proxy.read == b"", "not a byte was sent"


def test_nothing_is_ever_sent_to_who_breaks_tls_open_and_the_agent_goes_on(
    world: World, inspector: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with ForwardProxy(inspects=inspector, login=LOGIN) as proxy:
        site = world.with_proxy(named(proxy.url, password="proxy"))
        fleet = Access(site.directory, proxy=site.settings.proxy).fleet()
        stop = threading.Event()
        calls: list[None] = []

        def beat() -> bool:
            calls.append(None)
            if len(calls) == 3:
                proxy.inspects = None  # the hospital's IT has done what the log asked for
            return fleet.beat()

        with caplog.at_level(logging.INFO), pytest.raises(httpx.HTTPStatusError):
            persist(beat, stop=stop, seconds=0.2)
        fleet.close()
    warnings = [line for line in caplog.messages if "broken open" in line]
    assert len(warnings) == 1 and ISSUER in warnings[0] and "\n" not in warnings[0]
    assert len(calls) >= 3 and proxy.read == b""
    assert PASSWORD not in caplog.text and "Basic" not in caplog.text


def test_tls_that_is_broken_open_without_a_proxy_is_found_too(tmp_path: Path) -> None:
    context, _ = server_context(tmp_path / "inspector")
    told = pytest.raises(Barred, match=f"issued by 'CN={ISSUER}'")
    with listening(lambda end: shake(context, end)) as port, client_of(tmp_path, port=port) as client, told:
        client.get("/")


def shake(context: ssl.SSLContext, end: socket.socket) -> None:
    """Is a server that speaks TLS and says nothing."""
    with context.wrap_socket(end, server_side=True) as opened:
        opened.recv(1)


@contextmanager
def listening(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """Yields a port; each connection to it is served in a thread."""
    server = socket.create_server(("127.0.0.1", 0))

    def quietly(end: socket.socket) -> None:
        with end, suppress(OSError):
            serve(end)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=quietly, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_a_certificate_of_the_coordinator_that_does_not_fit_is_no_inspection(tmp_path: Path) -> None:
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with listening(lambda end: shake(own, end)) as port, client_of(tmp_path, port=port) as client:
        home = Home(directory=tmp_path / "home", settings=None)  # type: ignore[arg-type]
        other = certificates.make_server_certificate(
            keys.read_private(home.server_key).public_key(),
            hosts=["elsewhere.example"],
            authority=certificates.from_pem(home.authority_certificate.read_text()),
            authority_key=keys.read_private(home.authority_key),
        )
        (tmp_path / "crt").write_text(certificates.to_pem(other))
        own.load_cert_chain(tmp_path / "crt", home.server_key)
        with pytest.raises(Barred, match="a certificate of the coordinator that does not hold"):
            client.get("/")


def test_a_coordinator_cannot_send_a_site_elsewhere(world: World) -> None:
    hits: list[bytes] = []
    with listening(lambda end: hits.append(end.recv(100))) as port:
        before = world.upstream.status
        site = world.with_proxy(None)
        fleet = Access(site.directory, proxy=None).fleet()
        world.upstream.status, world.upstream.headers = 307, {"location": f"http://127.0.0.1:{port}/"}
        try:
            with pytest.raises(httpx.HTTPStatusError):
                fleet.beat()
        finally:
            world.upstream.status, world.upstream.headers = before, {}
            fleet.close()
    assert hits == []


def test_a_proxy_that_is_reached_over_tls_is_trusted_by_its_own_authority(
    world: World, tmp_path: Path
) -> None:
    context, authority = server_context(tmp_path / "outer", issuer="The hospital")
    with ForwardProxy(tls=context, login=LOGIN) as proxy:
        told = world.lines(named(proxy.url, password="proxy"))["connection"]
        assert "of the proxy" in told.text and "proxy.ca_certificate" in told.text
        assert proxy.heads == [], "the password is not shown to somebody else"
        lines = world.lines(named(proxy.url, password="proxy", ca=authority))
        assert {line.level for line in lines.values()} == {"ok"}, lines
    assert proxy.targets == [world.address]


def test_the_environment_names_a_proxy_where_site_yaml_leaves_it_to_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ForwardProxy(login=LOGIN) as proxy, ForwardProxy() as other:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//feverfew:p%C3%A4%3Ass%20w%C3%B6rd@"))
        lines = world.lines("environment")
        assert {line.level for line in lines.values()} == {"ok"} and proxy.targets == [world.address]
        assert lines["proxy"].text.startswith(f"{proxy.url} (HTTPS_PROXY); the daemon")
        assert "ss" not in lines["proxy"].text.replace("address", "").partition("HTTPS")[2]
        assert "site.yaml wins" in world.lines(None)["proxy"].text
        world.lines(named(other.url))
        assert proxy.targets == other.targets == [world.address], "what site.yaml names wins"
        monkeypatch.setenv("NO_PROXY", "example.org, 127.0.0.1")
        assert "none, straight" in world.lines("environment")["proxy"].text and len(proxy.targets) == 1


def told(**environment: str) -> Proxy | None:
    return proxy_to("fl.example.org:8443", "environment", directory=Path("."), environment=environment)


def test_variables_are_read_as_other_programs_read_them() -> None:
    expected = Proxy(url="http://proxy.example:3128", source="HTTPS_PROXY")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        assert told(**{name: "http://proxy.example:3128/"}) == expected
    assert told(HTTPS_PROXY="proxy.example:3128") == expected
    assert told(HTTPS_PROXY="http://other.example:1", https_proxy="http://proxy.example:3128") == expected
    assert told(HTTPS_PROXY="http://proxy.example:3128", ALL_PROXY="socks5://x:1") == expected
    assert told(HTTP_PROXY="http://proxy.example:3128") is None and told(HTTPS_PROXY="") is None
    for excepted in ("fl.example.org", "example.org", ".example.org", "*", "a.b, fl.example.org:8443"):
        assert told(HTTPS_PROXY="http://proxy.example:3128", NO_PROXY=excepted) is None
    assert told(HTTPS_PROXY="http://proxy.example:3128", NO_PROXY="ample.org") == expected
    known = told(HTTPS_PROXY="http://me:secret@proxy.example:80")
    assert known is not None and known.login == ("me", "secret") and known.url == "http://proxy.example:80"
    assert "secret" not in f"{known} {known!r} {known.client!r}"


SECRET = "hunter2"


@pytest.mark.parametrize(
    "value",
    [
        f"socks5://me:{SECRET}@proxy.example:1080",
        f"http://me:{SECRET}@proxy.example",
        f"http://{SECRET}:0",
        f"http://me:{SECRET}@pro xy:3128",
        f"https://proxy.example:3128/{SECRET}",
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(value: str, world: World) -> None:
    with pytest.raises(ConfigError) as refused:
        told(HTTPS_PROXY=value)
    assert SECRET not in str(refused.value) and "port" in str(refused.value)
    for setting in (value, named(value)):
        with pytest.raises(ConfigError) as refused:
            world.with_proxy(setting)
        assert SECRET not in str(refused.value) and "proxy" in str(refused.value)
    world.with_proxy(None)


def test_settings_without_effect_and_files_that_others_can_read_are_errors(world: World) -> None:
    with pytest.raises(ConfigError, match="ca_certificate"):
        world.with_proxy(named("http://proxy.example:3128", ca=Path("ca.pem")))
    site = world.with_proxy(named("http://proxy.example:3128", password="missing"))
    with pytest.raises(UserError, match=r"missing\.password"):
        Access(site.directory, proxy=site.settings.proxy)
    (site.private / "wrong.password").chmod(0o644)
    setting = NamedProxy.model_validate(named("http://proxy.example:3128", password="wrong"))
    with pytest.raises(UserError, match="chmod 600"):
        Access(site.directory, proxy=setting)
    (site.private / "wrong.password").chmod(0o600)


def test_the_example_in_site_yaml_is_one(tmp_path: Path) -> None:
    text = skeleton.settings_text(name="north", nominal_patients=1)
    lines = text[text.index("# proxy:\n") :].split("\n# docs")[0].splitlines()
    example = "\n".join(line.removeprefix("# ") for line in lines)
    (tmp_path / "site.yaml").write_text(text.replace("proxy: environment", example))
    assert isinstance(read_settings(tmp_path / "site.yaml").proxy, NamedProxy)


def test_the_pacs_is_reached_straight_whatever_names_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import dicomweb

    with ForwardProxy() as proxy, served(archive()) as url:
        for name in VARIABLES[:3]:
            monkeypatch.setenv(name, proxy.url)
        site = site_of(tmp_path / "north", url)
        path = site.directory / "site.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"proxy": named(proxy.url)}))
        assert site.settings.pacs is not None
        with dicomweb.open_archive(site.settings.pacs, directory=site.directory) as pacs:
            pacs.at("/studies", place=0)
    assert proxy.targets == []
