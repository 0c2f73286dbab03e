"""The command with which a hospital decides about plans."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client import approval, decision, waiting
from client.__main__ import main
from client.site import Site
from common.errors import Refusal
from common.plan import SCHEMA_VERSION
from common.trail import account
from tests.plans import plan
from tests.sites import write_site

COMMAND = Path(sys.executable).with_name("feverfew-client")
ASKED = plan(rounds=3)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1, policies=[])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(ASKED.to_json())
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["feverfew-client", "approve", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(str(ended.value.code)), told.out, told.err

    return run


def verdict(site: Site) -> str:
    return approval.answer(site, ASKED).status


def at_a_terminal(*arguments: object, typed: str) -> tuple[int, str]:
    """Runs the command as a person does who types an answer."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "approve", *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, f"{typed}\n".encode())
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(60), shown.decode()


def test_the_whole_plan_its_cost_and_what_leaves_are_shown_before_it_is_approved(
    site: Site, file: Path, run: Any
) -> None:
    code, out, _ = run(site.directory, file, "--yes")
    assert code == 0 and f"approved plan {ASKED.hash}" in out
    for part in ("expected_batch", "opacity", "arrays.update", "A run costs epsilon", "left", "percentile"):
        assert part in out
    told = decision.find(site, ASKED.hash, by="person")
    assert told is not None and told.who == account() and told.verdict == "approved"


@pytest.mark.parametrize(("typed", "status"), [("yes", "approved"), ("y", "waiting"), ("no", "waiting")])
@pytest.mark.slow
def test_a_person_at_a_terminal_is_asked_and_only_yes_is_yes(
    site: Site, file: Path, typed: str, status: str
) -> None:
    code, shown = at_a_terminal(site.directory, file, typed=typed)
    assert "Approve exactly this plan?" in shown
    assert (code, verdict(site)) == (0 if typed == "yes" else 1, status)


def test_without_a_terminal_nothing_is_approved_unless_it_is_said(
    site: Site, file: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    code, _, err = run(site.directory, file)
    assert code == 2 and "--yes" in err and verdict(site) == "waiting"


def test_json_alone_shows_and_json_with_yes_records(site: Site, file: Path, run: Any) -> None:
    code, out, _ = run(site.directory, file, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["decision"] is None and verdict(site) == "waiting"
    assert shown["plan_hash"] == ASKED.hash and shown["cost"]["epsilon"] > 0
    code, out, _ = run(site.directory, file, "--json", "--yes")
    assert json.loads(out)["decision"]["verdict"] == "approved" and verdict(site) == "approved"


def test_a_plan_without_privacy_is_valid_json_too(site: Site, tmp_path: Path, run: Any) -> None:
    exact = tmp_path / "exact.json"
    exact.write_text(plan(privacy="none").to_json())
    _, out, _ = run(site.directory, exact, "--json")
    assert json.loads(out)["cost"]["epsilon"] is None
    _, out, _ = run(site.directory, exact, "--yes")
    assert "Nothing bounds what this plan tells" in out


def test_a_refusal_and_a_withdrawal_keep_their_reason_at_the_site(site: Site, file: Path, run: Any) -> None:
    assert run(site.directory, file, "--withdraw", "--yes")[0] == 2
    assert run(site.directory, file, "--refuse", "--reason", "not our patients", "--yes")[0] == 0
    assert verdict(site) == "refused"
    with pytest.raises(Refusal) as caught:
        approval.require(site, ASKED)
    assert caught.value.code == "plan_refused", "the reason is no part of what leaves"
    assert run(site.directory, file, "--yes")[0] == 0
    assert run(site.directory, file, "--withdraw", "--reason", "new board", "--yes")[0] == 0
    told = decision.find(site, ASKED.hash, by="person")
    assert told is not None and (told.verdict, told.reason) == ("withdrawn", "new board")
    assert verdict(site) == "waiting"


def test_waiting_plans_are_listed_and_approved_by_the_beginning_of_their_hash(site: Site, run: Any) -> None:
    waiting.keep(site, ASKED)
    _, out, _ = run(site.directory)
    assert ASKED.hash[:12] in out
    tree = json.loads(run(site.directory, "--json")[1])
    assert [one["plan_hash"] for one in tree["waiting"]] == [ASKED.hash] and tree["decided"] == []
    assert run(site.directory, ASKED.hash[:8], "--yes")[0] == 0
    tree = json.loads(run(site.directory, "--json")[1])
    assert tree["waiting"] == [] and [one["verdict"] for one in tree["decided"]] == ["approved"]
    assert run(site.directory, ASKED.hash[:8], "--withdraw", "--yes")[0] == 0, "known plans can be named"


def test_a_file_that_counts_for_nothing_is_named_in_the_list(site: Site, file: Path, run: Any) -> None:
    run(site.directory, file, "--yes")
    (path,) = site.approvals.iterdir()
    path.write_text(path.read_text().replace('"approved"', '"refused"'))
    assert "no decision of this site" in run(site.directory)[1]
    assert json.loads(run(site.directory, "--json")[1])["invalid"] == [str(path)]


def test_what_a_plan_says_cannot_speak_to_the_terminal(site: Site, tmp_path: Path, run: Any) -> None:
    hostile = tmp_path / "hostile.json"
    hostile.write_text(plan(classes=("normal", "\x1b[2J[red]x")).to_json())
    _, out, _ = run(site.directory, hostile, "--yes")
    assert "\x1b[2J" not in out and "?[2J[red]x" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--yes"],
        ["--refuse"],
        ["plan.json", "--reason", "x"],
        ["plan.json", "--refuse", "--reason", "x" * 2000],
        ["abcdef", "--yes"],
        ["abc", "--yes"],
        ["nothing.json", "--yes"],
        [".", "--yes"],
    ],
)
def test_mistakes_give_one_line_and_record_nothing(
    site: Site, file: Path, run: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    code, _, err = run(site.directory, *arguments)
    assert code == 2 and err.startswith("feverfew-client: ") and err.count("\n") == 1, err
    assert decision.every(site) == []


def test_a_plan_of_a_newer_version_is_refused_in_one_line_and_nothing_is_recorded(
    site: Site, file: Path, run: Any
) -> None:
    newer = json.loads(ASKED.to_json()) | {"schema_version": SCHEMA_VERSION + 1, "from_another_time": True}
    file.write_text(json.dumps(newer))
    code, _, told = run(site.directory, file, "--yes")
    assert code == 2 and told.count("\n") == 1
    found = f"a plan of schema {SCHEMA_VERSION} at most, found {SCHEMA_VERSION + 1}"
    assert f"{found}: a newer Feverfew wrote it; update this one" in told
    assert not decision.every(site)
