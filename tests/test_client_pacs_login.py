"""Who may ask the PACS, and whom we take for it: TLS, passwords and tokens."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client import fetch
from client.site import Site
from common import keys
from common.errors import ConfigError, DeploymentError, UserError
from tests.dicomweb import archive, certificate, proxy, served
from tests.orthanc import changed, needs_orthanc, running, scan, site_of

PASSWORD = "pä:ss wörd"
TOKEN = "eyJhbGciOi.J9-token_of.the~site"


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A PACS with TLS and a password, and the certificate that vouches for it."""

    url: str
    certificate: Path


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    """Orthanc with a password, behind TLS; Debian's own build of it ends at the first request over TLS."""
    directory = tmp_path_factory.mktemp("closed")
    authority = certificate(directory)
    with running(directory / "orthanc", user="feverfew", password=PASSWORD) as server:
        server.store(scan(1))
        upstream = server.url.removesuffix("/dicom-web")
        with served(proxy(upstream), certificate=directory / "server.pem") as url:
            yield Closed(url=f"{url}/dicom-web", certificate=authority)


def with_secret(site: Site, name: str, content: str, *, mode: int = 0o600) -> Site:
    path = site.private / name
    path.unlink(missing_ok=True)
    keys.write_secret(path, content.encode())
    path.chmod(mode)
    return site


def closed_site(directory: Path, server: Closed) -> Site:
    basic = {"kind": "basic", "user": "feverfew", "password_file": "private/pacs.password"}
    site = site_of(directory, server.url, authentication=basic, ca_certificate=str(server.certificate))
    return with_secret(site, "pacs.password", PASSWORD + "\n")


@needs_orthanc
def test_certificate_and_password_open_the_pacs(closed: Closed, tmp_path: Path) -> None:
    assert fetch.fetch(closed_site(tmp_path / "north", closed)).fetched == 3


@needs_orthanc
def test_wrong_password_is_told_without_the_password(closed: Closed, tmp_path: Path) -> None:
    site = with_secret(closed_site(tmp_path / "north", closed), "pacs.password", "Guess")
    with pytest.raises(DeploymentError, match="HTTP 401; see authentication") as caught:
        fetch.fetch(site)
    told = "".join(traceback.format_exception(caught.value))
    assert "Guess" not in told and "R3Vlc3M" not in told


@needs_orthanc
def test_server_with_an_unknown_certificate_is_refused_at_once(closed: Closed, tmp_path: Path) -> None:
    site = changed(closed_site(tmp_path / "north", closed), ca_certificate=None, patience_seconds=600)
    with pytest.raises(DeploymentError, match="certificate of the PACS that we trust"):
        fetch.fetch(site)


@needs_orthanc
def test_server_with_a_certificate_of_another_name_is_refused(closed: Closed, tmp_path: Path) -> None:
    site = changed(closed_site(tmp_path / "north", closed), url=closed.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(DeploymentError, match="certificate of the PACS that we trust"):
        fetch.fetch(site)


@needs_orthanc
def test_plain_http_to_a_server_with_tls_is_not_taken_for_an_answer(closed: Closed, tmp_path: Path) -> None:
    site = closed_site(tmp_path / "north", closed)
    with pytest.raises(DeploymentError):
        fetch.fetch(changed(site, url=closed.url.replace("https", "http"), patience_seconds=1))


@pytest.fixture(scope="module")
def behind_token() -> Iterator[str]:
    with served(archive()) as upstream, served(proxy(upstream, token=TOKEN)) as url:
        yield url


def token_site(directory: Path, url: str, content: str) -> Site:
    token = {"kind": "token", "token_file": "private/pacs.token"}
    return with_secret(site_of(directory, url, authentication=token), "pacs.token", content)


def test_token_opens_the_pacs(behind_token: str, tmp_path: Path) -> None:
    assert fetch.fetch(token_site(tmp_path / "north", behind_token, TOKEN + "\n")).fetched == 3


@needs_orthanc
def test_token_opens_a_proxy_before_orthanc(tmp_path: Path) -> None:
    with running(tmp_path / "orthanc") as server:
        server.store(scan(1))
        with served(proxy(server.url.removesuffix("/dicom-web"), token=TOKEN)) as url:
            assert fetch.fetch(token_site(tmp_path / "north", f"{url}/dicom-web/", TOKEN)).fetched == 3


def test_other_token_is_refused_without_being_told(behind_token: str, tmp_path: Path) -> None:
    site = token_site(tmp_path / "north", behind_token, TOKEN[::-1])
    with pytest.raises(DeploymentError, match="HTTP 401; see authentication") as caught:
        fetch.fetch(site)
    assert TOKEN[::-1] not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("content", ["", "two tokens", "one\ntwo", "tökén"])
def test_file_that_holds_no_token_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="one token"):
        fetch.fetch(token_site(tmp_path / "north", "http://127.0.0.1:9", content))


def test_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    site = token_site(tmp_path / "north", "http://127.0.0.1:9", TOKEN)
    (site.private / "pacs.token").chmod(0o640)
    with pytest.raises(UserError, match="readable by its owner only"):
        fetch.fetch(site)
    (site.private / "pacs.token").unlink()
    with pytest.raises(ConfigError, match="write it, mode 0600"):
        fetch.fetch(site)


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_file_without_certificates_is_refused(tmp_path: Path, content: str | None) -> None:
    site = site_of(tmp_path / "north", "https://127.0.0.1:9", ca_certificate="ca.pem")
    if content is not None:
        (site.directory / "ca.pem").write_text(content)
    with pytest.raises(ConfigError, match="that ca_certificate names"):
        fetch.fetch(site)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"url": "http://pacs.hospital.example/dicom-web"}, "unsafe_allow_plain_http"),
        ({"url": "https://user:Geheim@pacs.hospital.example"}, "without user, password"),
        ({"url": "ftp://pacs"}, "expected url as in"),
        ({"url": "pacs.hospital.example"}, "expected url as in"),
        ({"url": "https://"}, "expected url as in"),
        ({"url": "https://pacs:port/"}, "expected url as in"),
        ({"url": "https://pacs/dicom-web?token=Geheim"}, "without user, password"),
        ({"connections": 0}, "pacs.connections"),
        ({"max_requests_per_second": 0}, "pacs.max_requests_per_second"),
        ({"authentication": {"kind": "basic", "user": "a", "password_file": "/etc/passwd"}}, "password_file"),
        ({"authentication": {"kind": "basic", "user": "a:b", "password_file": "private/p"}}, "user"),
        ({"authentication": {"kind": "guess"}}, "pacs.authentication"),
        ({"query": {"colour": "red"}}, "pacs.query.colour"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        site_of(tmp_path / "north", **({"url": "https://pacs.hospital.example"} | changes))
    assert "Geheim" not in str(caught.value)


def test_plain_http_is_possible_where_the_hospital_says_so(tmp_path: Path) -> None:
    url = "http://pacs.hospital.example/dicom-web"
    site = site_of(tmp_path / "north", url, unsafe_allow_plain_http=True)
    assert site.settings.pacs is not None and site.settings.pacs.url == url


def test_dates_of_a_query_are_in_order(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="date_to after date_from"):
        site_of(
            tmp_path / "n", "https://p.example", query={"date_from": "2024-02-01", "date_to": "2024-01-01"}
        )
