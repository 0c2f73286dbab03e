from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common import trail
from common.trail import Trail


def test_events_are_read_back_in_order_with_their_fields(tmp_path: Path) -> None:
    log = Trail(tmp_path / "events.jsonl")
    log.record("started", sites=3)
    log.record("finished", auroc=None, reasons={"late": 1})
    first, second = trail.read(tmp_path / "events.jsonl")
    assert (first["event"], first["sites"]) == ("started", 3)
    assert (second["event"], second["auroc"], second["reasons"]) == ("finished", None, {"late": 1})


def test_every_event_has_its_time_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    Trail(tmp_path / "events.jsonl").record("started")
    (event,) = trail.read(tmp_path / "events.jsonl")
    assert event["time"].endswith("+00:00")
    assert before <= datetime.fromisoformat(event["time"]) <= datetime.now(UTC)


def test_trail_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    Trail(path).record("a")
    Trail(path).record("b")
    assert [event["event"] for event in trail.read(path)] == ["a", "b"]


def test_line_breaks_in_a_text_stay_inside_the_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Trail(path).record("said", text='two\nlines "quoted" ü\u2028')
    assert len(path.read_bytes().splitlines()) == 1
    (event,) = trail.read(path)
    assert event["text"] == 'two\nlines "quoted" ü\u2028'


def test_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Trail(path).record("whole")
    with path.open("a") as file:
        file.write(json.dumps({"event": "half"})[:-3])
    assert [event["event"] for event in trail.read(path)] == ["whole"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_event_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "events.jsonl"
    Trail(path).record("before")
    with pytest.raises((TypeError, ValueError)):
        Trail(path).record("broken", value=value)
    assert [event["event"] for event in trail.read(path)] == ["before"]
