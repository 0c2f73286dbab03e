from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import certificates, keys
from common.errors import ConfigError, UserError
from common.invitation import Invitation
from server import enrolment
from server.__main__ import main
from server.control import Node
from server.denied import Denied, denied
from server.enrolment import Enrolled
from server.home import Home, create_home, open_home
from server.status import status


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


def request_of(name: str = "north") -> str:
    return certificates.make_request(keys.generate(), name=name)


def admit(home: Home, name: str = "north", request: str = "", *, renewed: bool = False) -> Enrolled:
    return enrolment.admit(home, name, request=request or request_of(name), renewed=renewed)


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["feverfew-server", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


class Registry:
    """The SuperLink's list of nodes, in memory; takes a key only once, as the real one does."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def nodes(self) -> list[Node]:
        return self._nodes

    def register(self, name: str, *, public_key: bytes) -> int:
        if any(node.public_key == public_key for node in self._nodes):
            raise AssertionError("a key was registered twice")
        number = len(self._nodes) + 1
        self._nodes.append(Node(node_id=number, name=name, status="registered", public_key=public_key))
        return number

    def unregister(self, node_id: int) -> None:
        self.turn(self._nodes[node_id - 1].public_key, "unregistered")

    def turn(self, public_key: bytes, status: str) -> None:
        self._nodes = [
            replace(node, status=status) if node.public_key == public_key else node for node in self._nodes
        ]


def test_every_secret_of_a_new_coordinator_is_for_its_owner_only(home: Home) -> None:
    assert home.directory.stat().st_mode & 0o777 == 0o700
    secrets = list((home.directory / "private").iterdir())
    assert {path.name for path in secrets} == {"authority.key", "server.key", "superexec.secret"}
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}


def test_a_directory_that_exists_is_left_as_it_is(home: Home) -> None:
    before = home.server_key.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        create_home(home.directory, host="127.0.0.1", port=1, internal_port=2)
    assert home.server_key.read_bytes() == before


def test_a_bad_host_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        create_home(tmp_path / "home", host="not a host", port=1, internal_port=2)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_read_back_and_mistakes_in_them_are_named(home: Home) -> None:
    assert open_home(home.directory).settings == home.settings
    settings = home.directory / "coordinator.yaml"
    settings.write_text(settings.read_text() + "colour: red\n")
    with pytest.raises(ConfigError, match="colour"):
        open_home(home.directory)


@pytest.mark.parametrize(
    ("host", "bind"), [("127.0.0.1", "127.0.0.1"), ("fl.example.org", "0.0.0.0"), ("10.0.0.7", "0.0.0.0")]
)
def test_a_coordinator_for_this_computer_only_listens_on_loopback(
    tmp_path: Path, host: str, bind: str
) -> None:
    assert create_home(tmp_path / "h", host=host, port=1, internal_port=2).settings.bind == bind


def test_a_secret_that_others_can_read_is_refused(home: Home) -> None:
    home.check_secrets()
    home.superexec_secret.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        home.check_secrets()


def test_a_site_is_recorded_once(home: Home) -> None:
    request = request_of()
    first, second = (admit(home, request=request) for _ in range(2))
    assert enrolment.enrolled(home) == [first] == [second]
    assert (first.name, first.number) == ("north", 1)
    assert first.public_key == certificates.read_request(request, name="north")


def test_the_certificate_is_of_our_authority_and_as_long_as_the_settings_say(home: Home) -> None:
    settings = home.directory / "coordinator.yaml"
    settings.write_text(settings.read_text().replace("certificate_days: 365", "certificate_days: 20"))
    site = admit(open_home(home.directory))
    authority = certificates.from_pem(home.authority_certificate.read_text())
    assert certificates.is_issued_by(site.certificate, authority)
    assert 19.99 < certificates.days_left(site.certificate) <= 20
    invitation = enrolment.invitation(home, site)
    assert certificates.from_pem(invitation.site_certificate) == site.certificate


def test_a_name_has_one_key_and_a_key_has_one_name(home: Home) -> None:
    key = keys.generate()
    admit(home, request=certificates.make_request(key, name="north"))
    with pytest.raises(UserError, match="another key"):
        admit(home)
    with pytest.raises(UserError, match="enrolled as north"):
        admit(home, "south", certificates.make_request(key, name="south"))


def test_an_authority_key_that_others_can_read_signs_nothing(home: Home) -> None:
    home.authority_key.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        admit(home)
    assert enrolment.enrolled(home) == []


@pytest.mark.parametrize("name", ["", "-", "North", "a/b", "../x", "a" * 41, "a b", "a\n"])
def test_a_name_that_is_no_name_is_refused(home: Home, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        admit(home, name, request_of())


def test_only_what_the_superlink_does_not_know_is_registered(home: Home) -> None:
    registry: Any = Registry()
    admit(home)
    assert enrolment.register_missing(home, registry) == ["north"]
    admit(home, "south")
    assert enrolment.register_missing(home, registry) == ["south"]
    assert enrolment.register_missing(home, registry) == []
    assert [node.name for node in registry.nodes()] == ["north", "south"]


def test_a_renewed_key_is_a_second_node_of_the_name(home: Home) -> None:
    registry: Any = Registry()
    with pytest.raises(UserError, match="none of the name"):
        admit(home, renewed=True)
    first = admit(home)
    request = request_of()
    second = admit(home, request=request, renewed=True)
    assert admit(home, request=request) == second, "the same again changes nothing"
    assert enrolment.newest(home) == [second] and enrolment.is_renewing(home)
    enrolment.settle(home, registry)
    assert [(node.name, node.public_key) for node in registry.nodes()] == [
        ("north", first.pem),
        ("north", second.pem),
    ]


def test_a_former_key_is_retired_once_the_new_one_is_online_and_it_is_not(home: Home) -> None:
    registry: Any = Registry()
    first, second = admit(home), admit(home, renewed=True)
    enrolment.settle(home, registry)
    for states in (("online", "registered"), ("online", "online"), ("offline", "offline")):
        registry.turn(first.pem, states[0])
        registry.turn(second.pem, states[1])
        assert enrolment.settle(home, registry) == []
    registry.turn(second.pem, "online")
    assert enrolment.settle(home, registry) == ["retired the former key of north", "unregistered north"]
    assert enrolment.enrolled(home) == [second] and not enrolment.is_renewing(home)
    assert first.fingerprint in Denied(home.denied) and second.fingerprint not in Denied(home.denied)
    assert [node.status for node in registry.nodes()] == ["unregistered", "online"]
    assert enrolment.settle(home, registry) == []


def test_a_revoked_site_is_denied_and_unregistered_with_all_its_keys_and_no_other(home: Home) -> None:
    registry: Any = Registry()
    north, south = [admit(home), admit(home, renewed=True)], admit(home, "south")
    enrolment.settle(home, registry)
    assert enrolment.revoke(home, "north") == [site.fingerprint for site in north]
    assert enrolment.enrolled(home) == [south]
    assert denied(home.denied) == {site.fingerprint for site in north}
    assert enrolment.settle(home, registry) == ["unregistered north"] * 2
    assert [node.status for node in registry.nodes()] == ["unregistered", "unregistered", "registered"]
    with pytest.raises(UserError, match="none of the name"):
        enrolment.revoke(home, "north")


def test_a_revoked_key_is_never_admitted_again_and_a_new_one_under_the_same_name_is(home: Home) -> None:
    request = request_of()
    admit(home, request=request)
    enrolment.revoke(home, "north")
    with pytest.raises(UserError, match="revoked"):
        admit(home, request=request)
    assert admit(home).number == 2, "what was recorded once is not overwritten"


def test_enrolling_while_nothing_runs_is_recorded_for_later(home: Home) -> None:
    admit(home)
    assert not enrolment.settle_now(home)


def test_the_verbs_init_enroll_and_revoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, request = tmp_path / "home", tmp_path / "north.csr"
    request.write_text(request_of())
    assert run("init", home, "--host", "localhost", "--port", 1, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("enroll", home, "north", request, monkeypatch=monkeypatch) == 0
    invitation = Invitation.from_text(capsys.readouterr().out)
    assert invitation.address == "localhost:1"
    assert invitation.fingerprint == open_home(home).invitation.fingerprint
    request.write_text(request_of())
    assert run("enroll", home, "north", request, monkeypatch=monkeypatch) == 2
    assert "--renew" in capsys.readouterr().err
    assert run("enroll", home, "north", request, "--renew", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("revoke", home, "north", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("refuses SHA256:") == 2


def test_status_announces_the_end_of_a_certificate_thirty_days_ahead(home: Home) -> None:
    for name, days in (("north", 29.9), ("south", 30.1), ("west", 0.5)):
        settings = home.settings.model_copy(update={"certificate_days": days})
        admit(replace(home, settings=settings), name)
    found = status(home)
    assert found.expiring == {"north": 29, "west": 0}
    assert "expiry   north        its certificate expires in 29 days" in found.to_text()
    admit(home, "north", renewed=True)
    assert status(home).expiring == {"west": 0}


def test_mistakes_give_one_line_and_exit_code_2(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    mistakes: list[tuple[object, ...]] = [
        ("init", home.directory, "--host", "127.0.0.1"),
        ("init", tmp_path / "new", "--host", "127.0.0.1", "--port", 70000),
        ("enroll", home.directory, "north", tmp_path / "no-such-file"),
        ("enroll", home.directory, "north", home.server_key),
        ("enroll", home.directory, "north", home.authority_certificate),
        ("revoke", home.directory, "nobody"),
        ("status", tmp_path / "nowhere"),
        ("start", tmp_path / "nowhere"),
        ("submit", home.directory, plan),
    ]
    for mistake in mistakes:
        assert run(*mistake, monkeypatch=monkeypatch) == 2, mistake
        captured = capsys.readouterr()
        assert captured.err.startswith("feverfew-server: ") and captured.err.count("\n") == 1, captured.err


def test_status_of_a_coordinator_that_does_not_run_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    admit(home)
    assert run("status", home.directory, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.count("not running") == 4 and "north" in shown
