from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from client import coordinator, credential, skeleton
from client.__main__ import main
from client.site import SiteSettings, open_site
from common import certificates, keys
from common.errors import ConfigError, UserError
from common.invitation import Invitation
from tests.authority import Authority


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def invitation(authority: Authority) -> Invitation:
    return Invitation(address="fl.example.org:8443", certificate=authority.pem)


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["feverfew-client", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_a_new_site_is_strict_and_its_secrets_are_for_its_owner_only(tmp_path: Path) -> None:
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=84)
    site = open_site(tmp_path / "north")
    assert (site.name, site.settings.nominal_patients) == ("north", 84)
    assert (site.settings.policies, site.settings.unsafe_allow_seeded_noise) == ((), False)
    assert site.private.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in site.private.iterdir()}
    assert modes["site.key"] == modes["split.key"] == 0o600
    assert len(bytes.fromhex((site.private / "split.key").read_text())) == 32
    (own,) = credential.credentials(site.private)
    assert own.key_file.stat().st_mode & 0o777 == 0o600
    request = (site.directory / "north.csr").read_text()
    assert certificates.read_request(request, name="north") == own.key.public_key()
    assert own.key.public_key() != keys.read_private(site.private / "site.key").public_key()


def test_a_hospital_has_to_state_its_number_of_patients_itself(tmp_path: Path) -> None:
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=None)
    with pytest.raises(ConfigError, match="nominal_patients"):
        open_site(tmp_path / "north")


def test_every_key_of_the_settings_has_its_explanation(tmp_path: Path) -> None:
    text = skeleton.settings_text(name="north", nominal_patients=84)
    assert set(yaml.safe_load(text)) == {"schema", *SiteSettings.model_fields}
    explained = False
    for line in text.splitlines():
        comment = line.strip().startswith("#")
        if line and not comment:
            assert explained or line.startswith("delta"), line  # explained with max_epsilon
        explained = comment


def test_nothing_that_exists_is_changed_and_what_is_missing_is_made(tmp_path: Path) -> None:
    directory = tmp_path / "north"
    made = skeleton.complete(directory, name="north", nominal_patients=84)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert set(before) < set(made)
    request = directory / "north.csr"
    key = certificates.read_request(request.read_text(), name="north")
    request.unlink()
    del before[request]  # signatures differ each time
    again = skeleton.complete(directory, name="north", nominal_patients=99)
    assert again == [request]
    assert certificates.read_request(request.read_text(), name="north") == key
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_of_another_site_is_left_alone(tmp_path: Path) -> None:
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=84)
    with pytest.raises(UserError, match="found north"):
        skeleton.complete(tmp_path / "north", name="south", nominal_patients=84)


@pytest.mark.parametrize("name", ["", "-", "North", "a b", "a/b", "-a", "ä", "a" * 41, "a\n"])
def test_a_name_that_is_no_name_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        skeleton.complete(tmp_path / "x", name=name, nominal_patients=84)
    assert not (tmp_path / "x").exists()


def test_an_invitation_is_accepted_once_and_no_other_after_it(tmp_path: Path, invitation: Invitation) -> None:
    for _ in range(2):
        coordinator.accept(invitation, directory=tmp_path)
    known = coordinator.open_coordinator(tmp_path)
    assert (known.address, known.fingerprint) == (invitation.address, invitation.fingerprint)
    other = invitation.model_copy(update={"address": "elsewhere:1"})
    with pytest.raises(UserError, match=r"fl\.example\.org"):
        coordinator.accept(other, directory=tmp_path)


def test_the_verb_init_makes_a_site_and_takes_the_invitation_later(
    tmp_path: Path,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, letter = tmp_path / "north", tmp_path / "invitation"
    assert run("init", directory, "--nominal-patients", 84, monkeypatch=monkeypatch) == 0
    invitation = authority.invitation(directory / "north.csr", name="north")
    letter.write_text(invitation.to_text())
    for _ in range(2):
        assert run("init", directory, "--invitation", letter, monkeypatch=monkeypatch) == 0
        assert invitation.fingerprint in capsys.readouterr().out
    assert coordinator.open_coordinator(directory).address == invitation.address
    assert certificates.to_pem(credential.require(directory).certificate) == invitation.site_certificate


def test_mistakes_give_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, noise = tmp_path / "north", tmp_path / "noise"
    skeleton.complete(directory, name="north", nominal_patients=84)
    noise.write_text("noise")
    mistakes: list[tuple[object, ...]] = [
        ("run", tmp_path / "nowhere"),
        ("run", directory),
        ("init", directory, "--invitation", noise),
        ("init", directory, "--invitation", tmp_path / "nothing"),
        ("init", directory, "--name", "south"),
        ("approve", directory, noise),
    ]
    for mistake in mistakes:
        assert run(*mistake, monkeypatch=monkeypatch) == 2, mistake
        captured = capsys.readouterr()
        assert captured.err.startswith("feverfew-client: ") and captured.err.count("\n") == 1, captured.err
