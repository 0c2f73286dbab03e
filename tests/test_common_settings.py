"""Settings of other versions: ``former/*-1.yaml`` are those from before schemas were noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.__main__ import COMMAND
from client.site import open_site, read_settings
from common.command import exit_code
from common.errors import SchemaError
from common.settings import SCHEMA
from server.home import create_home, open_home
from tests.sites import write_site

FORMER = Path(__file__).parent / "former"


def lines(error: SchemaError) -> list[str]:
    """What a person is told to change, line by line."""
    return [line.strip() for line in str(error).split("\n")[1:]]


def changed(tree: dict[str, Any], told: list[str]) -> dict[str, Any]:
    """The settings after a person did what the lines say."""
    for line in told:
        verb, _, rest = line.partition(" ")
        if verb == "add":
            tree |= yaml.safe_load(rest)
        else:
            del tree[rest.split()[0]]
    return tree


def test_older_settings_of_a_site_are_refused_with_a_line_for_each_key(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text((FORMER / "site-1.yaml").read_text())
    with pytest.raises(SchemaError, match=f"settings of schema {SCHEMA}") as caught:
        read_settings(path)
    told = lines(caught.value)
    assert str(path) in str(caught.value)
    assert "remove  approve  (the rules of policies decide now; docs/approval.md)" in told
    assert {"add     policies: []", "add     hours: null", "add     nominal_cases_per_patient: 2"} <= set(
        told
    )
    assert not any("max_epsilon" in line for line in told), "what is there already is not told"
    assert path.read_text() == (FORMER / "site-1.yaml").read_text(), "nothing is changed"


def test_settings_that_were_changed_line_by_line_are_read_and_nothing_got_looser(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    former = yaml.safe_load((FORMER / "site-1.yaml").read_text())
    assert former["approve"] == "all"
    path.write_text(yaml.safe_dump(former))
    with pytest.raises(SchemaError) as caught:
        read_settings(path)
    path.write_text(yaml.safe_dump(changed(former, lines(caught.value))))
    settings = read_settings(path)
    assert settings.policies == (), "no rule approves until a person writes one"
    assert settings.max_epsilon == 1.5
    assert not (settings.unsafe_allow_no_privacy or settings.unsafe_allow_seeded_noise)


def test_a_key_that_is_missing_deeper_down_is_named_with_its_place(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=1)
    path = site.directory / "site.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["schema"], tree["rules"]["decisions"]["suspected_text"], tree["cases"]["sheet"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(SchemaError) as caught:
        open_site(site.directory)
    assert lines(caught.value) == [
        "add     schema: 2",
        "add     cases.sheet: null",
        "add     rules.decisions.suspected_text: keep",
    ]


def test_newer_settings_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = write_site(tmp_path / "north", num_patients=1)
    path = site.directory / "site.yaml"
    path.write_text(path.read_text().replace("schema: 2", "schema: 3") + "from_another_time: 1\n")

    def opened() -> int:
        open_site(site.directory)
        return 0

    assert exit_code(opened, command=COMMAND) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "found 3: a newer Feverfew wrote it; update this one" in told


@pytest.mark.parametrize("schema", ["two", 0, None, True, 1.5])
def test_a_schema_that_is_no_version_is_refused(tmp_path: Path, schema: object) -> None:
    with pytest.raises(SchemaError, match="with a schema version"):
        write_site(tmp_path / "north", num_patients=1, schema=schema)


def test_older_settings_of_a_coordinator_are_refused_with_a_line_for_each_key(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=8443, internal_port=8444)
    path = home.directory / "coordinator.yaml"
    path.write_text((FORMER / "coordinator-1.yaml").read_text())
    with pytest.raises(SchemaError, match=r"^coordinator\.yaml: ") as caught:
        open_home(home.directory)
    told = lines(caught.value)
    assert told == ["add     schema: 2", "add     certificate_days: 365", "add     monitor_port: null"]
    path.write_text(yaml.safe_dump(changed(yaml.safe_load(path.read_text()), told)))
    assert open_home(home.directory).settings.certificate_days == 365
