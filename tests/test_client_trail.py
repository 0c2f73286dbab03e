from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from client import __main__ as command
from client import approval, trail, work
from client.site import Site, open_site
from common import flower, model
from common.plan import Plan
from common.trail import account, read
from tests import planted
from tests.sites import write_site
from tests.test_client_app import answer, private_plan, task_of


@pytest.fixture(autouse=True)
def identity() -> None:
    flower.set_identity(1, node_id=1)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", size=8, max_epsilon=3.0, policies=[])


@pytest.fixture
def asked() -> Plan:
    return private_plan()


def events(site: Site) -> list[dict[str, Any]]:
    return list(read(site.state / "events.jsonl"))


def ran(site: Site, asked: Plan) -> None:
    """Approves a plan and answers the tasks of a run of it, one of them twice and one wrong."""
    approval.decide(site, asked, "approved")
    for task in (
        task_of(asked, "prepare", server_round=0),
        task_of(asked),
        task_of(asked),
        task_of(asked, "evaluate", part="nothing"),
        task_of(asked, "evaluate"),
        task_of(asked, "deliver", server_round=2),
    ):
        answer(site, asked, task)


def test_the_trail_of_a_site_tells_who_approved_and_what_was_received_charged_and_refused(
    site: Site, asked: Plan
) -> None:
    answer(site, asked, task_of(asked))
    ran(site, asked)
    told = [event for event in events(site) if event["event"] != "signed"]
    assert [event["event"] for event in told] == [
        *("received", "refused", "approved", "received", "prepared", "received", "charged"),
        *("received", "received", "refused", "received", "charged", "received", "model_received"),
    ]
    assert [told[1]["code"], told[9]["code"]] == ["not_approved", "no_such_part"]
    assert told[2]["plan_hash"] == asked.hash and told[2]["by"] == account()
    assert told[6]["task"] == task_of(asked).identity and told[6]["round"] == 1
    assert [event["purpose"] for event in told if event["event"] == "received"] == [
        *("train", "prepare", "train", "train", "evaluate", "evaluate", "deliver"),
    ]


def test_approval_and_the_end_of_a_run_are_signed_and_what_it_left_when_the_next_begins(
    site: Site, asked: Plan
) -> None:
    ran(site, asked)
    kinds = [event["event"] for event in events(site)]
    signed = [kinds[place - 1] for place, kind in enumerate(kinds) if kind == "signed"]
    assert signed == ["approved", "model_received"]
    found = trail.verify(site)
    assert found.is_unbroken and found.signed_to == len(kinds)


def test_what_a_run_that_broke_off_left_is_signed_when_the_next_begins(site: Site, asked: Plan) -> None:
    approval.decide(site, asked, "approved")
    answer(site, asked, task_of(asked, "prepare", server_round=0))
    answer(site, asked, task_of(asked))
    answer(site, asked, task_of(asked, "prepare", server_round=0, run="run-2"), run="run-2")
    kinds = [event["event"] for event in events(site)]
    place = len(kinds) - 1 - kinds[::-1].index("signed")
    assert kinds[place - 1] == "charged" and kinds[place + 1 :] == ["received", "prepared"]
    assert trail.verify(site).signed_to == place + 1


def verb(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["feverfew-client", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        command.main()
    return int(end.value.code or 0)


def test_verify_says_unbroken_or_the_line_and_exits_with_1(
    site: Site, asked: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(site, asked)
    assert verb(monkeypatch, "trail", "verify", site.directory) == 0
    number = len(events(site))
    assert capsys.readouterr().out == f"site north: unbroken, {number} lines signed\n"
    path = site.state / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    charged = next(place for place, line in enumerate(lines) if '"charged"' in line)
    path.write_text("".join(lines[:charged] + lines[charged + 1 :]))
    assert verb(monkeypatch, "trail", "verify", site.directory) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"site north: broken at line {charged + 1}: ") and told.count("\n") == 1
    assert verb(monkeypatch, "trail", "verify", site.directory, "--json") == 1
    tree = json.loads(capsys.readouterr().out)
    assert not tree["unbroken"] and tree["trails"][0]["line"] == charged + 1


def test_a_broken_trail_stops_no_work_and_is_said_in_the_log(
    site: Site, asked: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    approval.decide(site, asked, "approved")
    path = site.state / "events.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with caplog.at_level(logging.ERROR):
        task = task_of(asked, "deliver", server_round=2)
        work.keep_model(site, asked, task, network=model.build(asked))
    assert (site.state / "models" / "run-1" / "model.safetensors").exists()
    assert "Expected an unbroken trail" in caplog.text
    assert not trail.verify(site).is_unbroken, "signing did not hide it"


def test_a_site_that_never_worked_has_an_unbroken_trail(site: Site) -> None:
    approval.decide(site, private_plan(), "approved")
    (site.state / "events.jsonl").unlink()
    trail.head_path(site).unlink()
    assert trail.verify(site).to_text() == "site north: unbroken, 0 lines signed"


def test_the_trail_names_no_patient_and_no_case(tmp_path: Path, asked: Plan) -> None:
    site = open_site(write_site(tmp_path / "north", size=8).directory)
    table = site.directory / "cases.csv"
    table.write_text(table.read_text().replace("Patient 1,", "Wolkenstein,"))
    ran(site, asked)
    made = b"".join(path.read_bytes() for path in (site.state / "events.jsonl", trail.head_path(site)))
    assert b"charged" in made and b"images/" not in made and b"Patient" not in made
    assert planted.found(made) == set()
