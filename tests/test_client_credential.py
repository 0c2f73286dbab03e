from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from client import credential, inspection, skeleton
from client.__main__ import main
from client.access import Access
from client.coordinator import accept
from client.ledger import Charge
from client.release import open_ledger
from client.site import Site, open_site
from common import certificates, keys
from common.errors import ConfigError, UserError
from common.privacy import Spend
from tests.authority import Authority

Verb = Callable[..., int]
CHARGE = Charge(
    task="0" * 64,
    run="run",
    plan_hash="0" * 64,
    study="study",
    server_round=1,
    purpose="training",
    part="train",
    spend=Spend(noise_multiplier=1.0, sample_rate=0.1, steps=1),
    nominal_patients=84,
)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=84)
    return open_site(tmp_path / "north")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Verb:
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["feverfew-client", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(str(ended.value.code))

    return run


def join(site: Site, authority: Authority, *, days: float = 365.0) -> None:
    invitation = authority.invitation(site.directory / "north.csr", name="north", days=days)
    accept(invitation, directory=site.directory)
    credential.accept(site.private, invitation, name="north")


def test_a_certificate_is_kept_beside_the_key_that_it_is_about(site: Site, authority: Authority) -> None:
    with pytest.raises(UserError, match="north.csr|\\.csr"):
        credential.require(site.directory)
    join(site, authority)
    used = credential.require(site.directory)
    assert certificates.public_key(used.certificate) == used.key.public_key()
    assert stat.S_IMODE(used.certificate_file.stat().st_mode) == 0o600


def test_an_invitation_that_does_not_fit_is_refused_and_changes_nothing(
    site: Site, authority: Authority, tmp_path: Path
) -> None:
    good = authority.invitation(site.directory / "north.csr", name="north")
    other = tmp_path / "other.csr"
    other.write_text(certificates.make_request(keys.generate(), name="north"))
    south = tmp_path / "south.csr"
    south.write_text(certificates.make_request(credential.credentials(site.private)[0].key, name="south"))
    misfits = {
        "another key": authority.invitation(other, name="north"),
        "found that of south": authority.invitation(south, name="south"),
        "somebody else": good.model_copy(update={"certificate": Authority().pem}),
    }
    for told, invitation in misfits.items():
        with pytest.raises(UserError, match=told):
            credential.accept(site.private, invitation, name="north")
    with pytest.raises(ConfigError, match="certificate"):
        credential.accept(site.private, good.model_copy(update={"site_certificate": "no"}), name="north")
    assert credential.current(site.private) is None


def test_a_key_that_others_can_read_is_not_used(site: Site, authority: Authority) -> None:
    join(site, authority)
    credential.require(site.directory).key_file.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        Access(site.directory, proxy=None).fleet()


def test_no_private_key_is_in_anything_that_is_sent(site: Site, authority: Authority) -> None:
    join(site, authority)
    credential.write_request(site.directory, credential.renew(site.private), name="north")
    sent = (site.directory / "north.csr").read_text()
    assert "PRIVATE" not in sent and len(sent) < 1000
    files = [site.private / "site.key", *(site.private / "connection").glob("*.key")]
    assert len(files) == 3
    for file in files:
        assert file.read_text().splitlines()[1] not in sent


def test_a_renewed_key_is_used_when_its_certificate_has_come_and_the_former_goes(
    site: Site, authority: Authority
) -> None:
    join(site, authority)
    access = Access(site.directory, proxy=None)
    first = credential.require(site.directory)
    second = credential.renew(site.private)
    assert credential.renew(site.private) == second, "one at a time"
    credential.write_request(site.directory, second, name="north")
    assert credential.require(site.directory) == first and access.renewed() is None
    join(site, authority)
    assert credential.require(site.directory) == second
    fleet = access.renewed()
    assert fleet is not None and access.renewed() is None, "tried again later"
    fleet.close()
    assert first.key_file.exists(), "until the new one is in use"
    access.keep()
    assert credential.credentials(site.private) == [second] and not first.certificate_file.exists()
    assert access.renewed() is None


def test_the_verb_renew_makes_a_request_and_leaves_the_ledger_as_it_is(
    site: Site, authority: Authority, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_ledger(site) as ledger:
        ledger.charge(CHARGE, max_repeats=0)
    join(site, authority)
    former = (site.directory / "north.csr").read_text()
    assert verb("renew", site.directory) == 0
    told = capsys.readouterr().out
    request = (site.directory / "north.csr").read_text()
    key = certificates.read_request(request, name="north")
    assert key != certificates.read_request(former, name="north")
    assert str(site.directory / "north.csr") in told and keys.fingerprint(key) in told
    join(site, authority)
    with open_ledger(site) as ledger:
        ledger.verify_signatures()
        assert ledger.head.number == 1


@pytest.mark.parametrize(
    ("days", "level", "told"),
    [(365, "ok", "valid until"), (29.9, "warning", "renew"), (-0.1, "error", "past"), (30.1, "ok", "valid")],
)
def test_check_announces_the_end_of_the_certificate_thirty_days_ahead(
    site: Site, authority: Authority, days: float, level: str, told: str
) -> None:
    assert inspection.certificate_lines(site) == []
    join(site, authority, days=days)
    (line,) = inspection.certificate_lines(site)
    assert line.level == level and told in line.text
    connection = inspection.connection_lines(site)[-1]
    assert connection.level != "ok"  # nobody answers there


def test_a_site_whose_certificate_has_expired_is_told_so_before_it_starts(
    site: Site, authority: Authority, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    join(site, authority, days=-1)
    assert verb("run", site.directory) == 2
    assert "expired" in (told := capsys.readouterr().err) and "feverfew-client renew" in told
