"""What the gateway tells the supervisor of its traffic, and what becomes of it in the metrics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from server.home import Home, create_home
from server.refusals import REASONS
from server.traffic import Traffic
from server.vitals import Vitals
from tests.test_docs import calls, texts

ROOT = Path(__file__).parents[1]
TRAFFIC = Traffic(passed=3, refused={"path": 2, "patient 4711": 1}, connections=2, sites=1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


def lines(home: Home) -> list[str]:
    return [
        f"{one.name}{one.labels.get('reason', '')} {one.value:g}"
        for family in Vitals(home).registry.collect()
        for one in family.samples
        if "gateway" in one.name
    ]


def test_nothing_is_told_before_a_gateway_has_run_or_of_a_damaged_file(home: Home) -> None:
    assert lines(home) == []
    for damaged in (b"", b"{", b'{"passed": "x"}', b"\xff", b'{"passed": -1, "refused": {}}'):
        home.traffic.write_bytes(damaged)
        assert lines(home) == []


def test_each_reason_is_told_from_the_start_and_there_are_no_others(home: Home) -> None:
    TRAFFIC.write(home.traffic)
    told = lines(home)
    assert "feverfew_gateway_passed_total 3" in told and "feverfew_gateway_refused_totalpath 2" in told
    assert "feverfew_gateway_connections 2" in told and "feverfew_gateway_sites 1" in told
    assert sum(line.startswith("feverfew_gateway_refused_total") for line in told) == len(REASONS)
    assert not any("4711" in line for line in told)


def test_a_disk_that_takes_nothing_does_not_end_the_gateway(home: Home) -> None:
    home.traffic.mkdir()
    TRAFFIC.write(home.traffic)
    assert [path for path in home.state.iterdir() if path.name.startswith(".gateway")] == []


def test_every_reason_of_a_refusal_is_counted_and_explained() -> None:
    given = set()
    for call in calls(sorted((ROOT / "server").glob("*.py"))):
        match ast.unparse(call.func).rpartition(".")[2]:
            case "Denial":
                (reason,) = (word.value for word in call.keywords if word.arg == "reason")
                given |= texts(reason)
            case "note" | "_turn_away" if call.args:
                given |= texts(call.args[0])
    assert given == set(REASONS)
    text = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")
    rows = text.partition("<!-- table: refusals -->")[2].split("\n\n")[0]
    assert [row.split("`")[1] for row in rows.splitlines() if row.startswith("| `")] == list(REASONS)
