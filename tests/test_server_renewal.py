from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common import certificates, durable, keys
from common.errors import UserError
from server import renewal
from server.home import Home, create_home
from server.status import ExpiryLog, status
from server.supervisor import Supervisor


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=8443, internal_port=8444)


def pair(home: Home) -> tuple[bytes, bytes]:
    return home.server_key.read_bytes(), home.server_certificate.read_bytes()


def require_matching(home: Home) -> None:
    """OpenSSL takes the two files together."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(home.server_certificate, home.server_key)


def test_a_renewal_makes_a_new_pair_from_the_same_authority(home: Home) -> None:
    former, authority = pair(home), home.authority_certificate.read_bytes()
    made = renewal.renew(home)
    require_matching(home)
    assert not set(former) & set(pair(home)) and home.authority_certificate.read_bytes() == authority
    issuer = certificates.from_pem(authority.decode())
    assert made == renewal.current(home) and certificates.is_issued_by(made, issuer)
    assert 824 < certificates.days_left(made) < 826
    assert home.server_key.stat().st_mode & 0o777 == 0o600
    assert not list(home.directory.rglob("*.new"))


class Killed(BaseException):
    """What a process that is killed never gets beyond."""


def killed_after(number: int, count: list[int], whole: Any) -> Any:
    def step(*arguments: Any) -> None:
        count.append(1)
        if len(count) > number:
            raise Killed
        whole(*arguments)

    return step


@pytest.mark.parametrize("number", range(6))
def test_a_renewal_that_is_killed_anywhere_leaves_a_pair_that_fits(home: Home, number: int) -> None:
    """Before each of its four steps: the new certificate, the new key, and each moved into its place."""
    former, count = pair(home), list[int]()
    with (
        patch.object(durable, "write", killed_after(number, count, durable.write)),
        patch.object(keys, "write_private", killed_after(number, count, keys.write_private)),
        patch.object(renewal, "_move", killed_after(number, count, renewal._move)),
    ):
        if number < 4:
            with pytest.raises(Killed):
                renewal.renew(home)
        else:
            renewal.renew(home)
    renewal.current(home)
    require_matching(home)
    assert (pair(home) == former) == (number < 2), "the new pair is whole from its second file on"
    assert not list(home.directory.rglob("*.new"))
    renewal.renew(home)
    require_matching(home)


def test_an_authority_key_that_others_can_read_signs_nothing(home: Home) -> None:
    former = pair(home)
    os.chmod(home.authority_key, 0o644)
    with pytest.raises(UserError, match="mode 0644"):
        renewal.renew(home)
    assert pair(home) == former


def test_an_end_that_is_near_is_announced_and_a_renewal_ends_that(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    renewal.renew(home, days=20.5)
    assert status(home).expiring == {"gateway": 20}
    assert "gateway      its certificate expires in 20 days" in status(home).to_text()
    log = ExpiryLog(home)
    for _ in range(3):
        log.announce()
    (told,) = caplog.messages
    assert told == f"gateway: its certificate expires in 20 days; feverfew-server renew {home.directory}"
    renewal.renew(home)
    assert status(home).expiring == {}


def test_a_coordinator_whose_certificate_has_expired_does_not_start_and_says_what_to_do(home: Home) -> None:
    renewal.renew(home, days=-1)
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    with pytest.raises(UserError, match=f"expired on {yesterday:%Y-%m-%d}; run: feverfew-server renew"):
        Supervisor(home=home).run()
