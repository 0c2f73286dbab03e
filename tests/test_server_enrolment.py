from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import keys
from common.errors import ConfigError, UserError
from common.invitation import Invitation
from server import enrolment
from server.__main__ import main
from server.control import Node
from server.home import Home, create_home, open_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


@pytest.fixture
def public_text() -> str:
    return keys.public_text(keys.generate().public_key())


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


def test_a_site_is_recorded_once(home: Home, public_text: str) -> None:
    for _ in range(2):
        enrolment.record(home, "north", public_text=public_text)
    sites = enrolment.enrolled(home)
    assert [(site.name, keys.public_text(site.public_key)) for site in sites] == [("north", public_text)]


def test_a_name_has_one_key_and_a_key_has_one_name(home: Home, public_text: str) -> None:
    enrolment.record(home, "north", public_text=public_text)
    with pytest.raises(UserError, match="another key"):
        enrolment.record(home, "north", public_text=keys.public_text(keys.generate().public_key()))
    with pytest.raises(UserError, match="enrolled as north"):
        enrolment.record(home, "south", public_text=public_text)


@pytest.mark.parametrize("name", ["", "-", "North", "a/b", "../x", "a" * 41, "a b", "a\n"])
def test_a_name_that_is_no_name_is_refused(home: Home, public_text: str, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        enrolment.record(home, name, public_text=public_text)


def test_only_what_the_superlink_does_not_know_is_registered(home: Home) -> None:
    registry: Any = Registry()
    enrolment.record(home, "north", public_text=keys.public_text(keys.generate().public_key()))
    assert enrolment.register_missing(home, registry) == ["north"]
    enrolment.record(home, "south", public_text=keys.public_text(keys.generate().public_key()))
    assert enrolment.register_missing(home, registry) == ["south"]
    assert enrolment.register_missing(home, registry) == []
    assert [node.name for node in registry.nodes()] == ["north", "south"]


def test_enrolling_while_nothing_runs_is_recorded_for_later(home: Home, public_text: str) -> None:
    enrolment.record(home, "north", public_text=public_text)
    assert not enrolment.register_now(home)


def test_the_verbs_init_and_enroll_give_an_invitation_that_a_site_can_read(
    tmp_path: Path, public_text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, key = tmp_path / "home", tmp_path / "site.pub"
    key.write_text(public_text)
    assert run("init", home, "--host", "localhost", "--port", 1, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("enroll", home, "north", key, monkeypatch=monkeypatch) == 0
    invitation = Invitation.from_text(capsys.readouterr().out)
    assert invitation.address == "localhost:1"
    assert invitation.fingerprint == open_home(home).invitation.fingerprint


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
        ("status", tmp_path / "nowhere"),
        ("start", tmp_path / "nowhere"),
        ("submit", home.directory, plan),
    ]
    for mistake in mistakes:
        assert run(*mistake, monkeypatch=monkeypatch) == 2, mistake
        captured = capsys.readouterr()
        assert captured.err.startswith("feverfew-server: ") and captured.err.count("\n") == 1, captured.err


def test_status_of_a_coordinator_that_does_not_run_says_so(
    home: Home, public_text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enrolment.record(home, "north", public_text=public_text)
    assert run("status", home.directory, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.count("not running") == 4 and "north" in shown
