from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.site import Site, SiteSettings, Split, open_site, read_settings, site_directory, waits_for_disk
from common.errors import ConfigError, DataError
from tests.sites import write_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1)


def refusal(site: Site, **changes: Any) -> str:
    """Writes a site's settings with changes (None takes a key out) and returns why they are refused."""
    path = site.directory / "site.yaml"
    tree = yaml.safe_load(path.read_text()) | changes
    taken_out = {key for key, value in changes.items() if value is None}
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if key not in taken_out}))
    with pytest.raises(ConfigError) as caught:
        open_site(site.directory)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_only_the_node_of_a_simulation_can_say_that_nothing_waits_for_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEVERFEW_DURABLE", "no")
    assert waits_for_disk({"site": "/srv/north"}), "the environment of a real site says nothing"
    assert waits_for_disk({"site": "/srv/north", "durable": True})
    assert not waits_for_disk({"site": "/srv/north", "durable": False})
    assert not waits_for_disk({"partition-id": 0})
    for value in ("yes", ""):
        monkeypatch.setenv("FEVERFEW_DURABLE", value)
        assert waits_for_disk({"partition-id": 0})
    monkeypatch.delenv("FEVERFEW_DURABLE")
    assert waits_for_disk({"partition-id": 0})


def test_site_knows_its_files(site: Site) -> None:
    assert site.name == "north"
    assert site.private == site.directory / "private"
    assert site.state == site.directory / "state"
    assert site.cache == site.directory / "cache"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "North Hospital"),
        ("name", "../up"),
        ("name", "x" * 41),
        ("role", "observer"),
        ("data", "open"),
        ("nominal_patients", 0),
        ("nominal_patients", 10.5),
        ("patient_is", "image"),
        ("max_epsilon", -1),
        ("max_epsilon", float("nan")),
        ("max_epsilon", float("inf")),
        ("delta", 0),
        ("delta", 0.1),
        ("delta", "small"),
        ("policies", "all"),
        ("max_repeats", -1),
        ("threads", 0),
        ("unsafe_allow_seeded_noise", "perhaps"),
    ],
)
def test_wrong_value_is_refused_by_file_and_key(site: Site, key: str, value: Any) -> None:
    assert refusal(site, **{key: value}).startswith(f"{key}: ")


@pytest.mark.parametrize("key", SiteSettings.model_fields)
def test_no_setting_has_a_default(site: Site, key: str) -> None:
    assert refusal(site, **{key: None}).startswith(f"{key}: field required")


def test_a_policy_says_when_and_has_a_name_of_its_own(site: Site) -> None:
    rule = {"name": "all", "decision": "approve"}
    assert refusal(site, policies=[rule]).startswith("policies.0.when: field required")
    assert "each name once" in refusal(site, policies=[rule | {"when": {}}] * 2)


def test_unknown_key_is_refused_by_name(site: Site) -> None:
    assert refusal(site, colour="red").startswith("Unknown key 'colour'")


@pytest.mark.parametrize(
    "split",
    [
        {"train": 0.6, "validation": 0.2, "test": 0.3},
        {"train": 0.6, "validation": 0.1, "test": 0.2},
        {"train": 1.2, "validation": -0.2, "test": 0.0},
        {"train": 1.0, "validation": 0.0},
    ],
)
def test_fractions_that_are_no_split_are_refused(site: Site, split: dict[str, float]) -> None:
    assert refusal(site, split=split).startswith("split")


def test_public_data_are_for_evaluation_only(site: Site) -> None:
    assert "role: evaluation" in refusal(site, data="public")
    evaluates = write_site(site.directory.parent / "open", num_patients=1, data="public", role="evaluation")
    assert evaluates.settings.data == "public"


@pytest.mark.parametrize(
    ("fractions", "parts"),
    [
        ((0.7, 0.1, 0.2), ("train", "validation", "test")),
        ((1.0, 0.0, 0.0), ("train",)),
        ((0.0, 0.0, 1.0), ("test",)),
        ((0.5, 0.0, 0.5), ("train", "test")),
    ],
)
def test_parts_are_those_that_have_patients(fractions: tuple[float, ...], parts: tuple[str, ...]) -> None:
    train, validation, test = fractions
    assert Split(train=train, validation=validation, test=test).parts == parts


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "\x00", ""])
def test_file_that_is_not_a_settings_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes("name: Zürich".encode("latin1"))
    with pytest.raises(ConfigError, match="Expected YAML"):
        read_settings(path)


def test_settings_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="Expected YAML"):
        read_settings(path)


def test_directory_without_settings_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="feverfew-client init"):
        open_site(tmp_path / "nowhere")


def test_agent_names_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEVERFEW_SITES", "/a\n/b")
    assert site_directory({"site": "/data/north", "partition-id": 1}) == Path("/data/north")


def test_simulation_names_it_by_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEVERFEW_SITES", "/sites/a b\n/sites/c")
    assert site_directory({"partition-id": 0, "num-partitions": 2}) == Path("/sites/a b")
    assert site_directory({"partition-id": 1, "num-partitions": 2}) == Path("/sites/c")


def test_sites_that_say_the_same_have_it_in_memory_once(tmp_path: Path) -> None:
    """Of a thousand simulated sites only names and numbers differ; what differs stays apart."""
    apart = {"train": 0.7, "validation": 0.1, "test": 0.2}
    one, other = (write_site(tmp_path / name, name=name, num_patients=2).settings for name in ("a", "b"))
    third = write_site(tmp_path / "c", name="c", num_patients=2, split=apart).settings
    assert one.name != other.name
    assert one.split is other.split and one.rules is other.rules is third.rules
    assert third.split != one.split
