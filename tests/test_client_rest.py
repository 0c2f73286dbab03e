"""When a site rests."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from client import rest
from client.rest import Hours
from client.site import read_settings
from common.errors import ConfigError
from tests import sites

NOON, MIDNIGHT = datetime(2026, 3, 2, 12), datetime(2026, 3, 2, 0)


def test_site_that_was_paused_rests_until_it_is_resumed(tmp_path: Path) -> None:
    assert rest.reason(tmp_path, None, now=NOON) == ""
    rest.pause(tmp_path)
    assert rest.reason(tmp_path, None, now=NOON) == "paused"
    rest.resume(tmp_path)
    rest.resume(tmp_path)
    assert rest.reason(tmp_path, None, now=NOON) == ""


def test_site_rests_outside_of_its_hours(tmp_path: Path) -> None:
    night = Hours(begin="19:00", end="07:00")
    assert rest.reason(tmp_path, night, now=MIDNIGHT) == ""
    assert "19:00 to 07:00" in rest.reason(tmp_path, night, now=NOON)
    day = Hours(begin="07:00", end="19:00")
    assert rest.reason(tmp_path, day, now=NOON) == "" and rest.reason(tmp_path, day, now=MIDNIGHT)


@pytest.mark.parametrize(("begin", "end"), [("7:00", "19:00"), ("24:00", "07:00"), ("07:00", "07:00")])
def test_hours_that_are_none_are_refused(begin: str, end: str) -> None:
    with pytest.raises(ValidationError):
        Hours(begin=begin, end=end)


def test_hours_without_quotes_which_yaml_reads_as_a_number_are_refused(tmp_path: Path) -> None:
    sites.write_site(tmp_path / "north")
    path = tmp_path / "north" / "site.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["hours"]
    path.write_text(yaml.safe_dump(tree) + "hours: {begin: 19:00, end: 07:00}\n")
    with pytest.raises(ConfigError, match="hours.begin"):
        read_settings(path)
