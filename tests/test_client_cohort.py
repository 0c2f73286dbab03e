from __future__ import annotations

import csv
import hashlib
import hmac
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as Pillow

from client import frozen, images, split
from client import preprocessing as preparing
from client.case import Case, Refused
from client.cohort import Neighbours, freeze
from client.site import Site, Split, open_site
from common.errors import ConfigError, DataError, SchemaError, StateError, UserError
from tests.cohorts import (
    ASKED,
    CLASSES,
    SECRET,
    SETTINGS,
    make_site,
    opened,
    rows_of,
    same,
    write_png,
    write_table,
)
from tests.plans import asked


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "north", rows_of(30))


def part_by_patient(site: Site) -> dict[str, str]:
    secret = split.read_key(site)
    listed = frozen.read(site, secret=secret)
    assert listed is not None
    return {
        one.case.patient: split.part_of(
            split.pseudonym(one.case.patient, secret=secret), split=site.settings.split
        )
        for one in listed.cases
    }


def quarantined(site: Site) -> dict[str, str]:
    with (site.private / "quarantine.csv").open() as stream:
        return {row["image"]: row["code"] for row in csv.DictReader(stream)}


def test_every_case_is_in_one_part_with_its_label_and_pixels(site: Site) -> None:
    cohort = opened(site)
    expected: dict[str, list[tuple[bytes, int]]] = {"train": [], "validation": [], "test": []}
    parts = part_by_patient(site)
    for image, label, patient in rows_of(30):
        pixels = preparing.apply([images.read(site.directory / image)], ASKED)["image"]
        expected[parts[patient]].append((pixels.tobytes(), CLASSES.index(label)))
    assert (cohort.offered, cohort.used, cohort.reasons) == (60, 60, {})
    for name, part in cohort.parts.items():
        assert part.images.dtype == np.uint8 and part.images.shape == (len(part.targets), 1, 8, 8)
        assert part.targets.dtype == np.int64
        found = [
            (image.tobytes(), int(label)) for image, label in zip(part.images, part.targets, strict=True)
        ]
        assert sorted(found) == sorted(expected[name])
        assert len(part.patients) * 2 == len(part.targets) > 0
        for cases in part.patients:
            assert len(set(part.targets[cases])) == 1  # the label is by patient here
        assert sorted(np.concatenate(part.patients)) == list(range(len(part.targets)))


def test_arrays_cannot_be_written(site: Site) -> None:
    part = opened(site).parts["train"]
    for array in (part.images, part.targets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_split_is_hmac_of_the_patient_under_the_site_secret(site: Site) -> None:
    opened(site)
    for patient, part in part_by_patient(site).items():
        digest = hmac.new(SECRET, patient.encode(), hashlib.sha256).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        assert part == ("train" if position < 0.5 else "validation" if position < 0.7 else "test")


def test_split_has_the_fractions_that_were_asked_for() -> None:
    settings = Split(train=0.7, validation=0.1, test=0.2)
    found = [split.part_of(split.pseudonym(str(n), secret=SECRET), split=settings) for n in range(20_000)]
    for name, fraction in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert found.count(name) / 20_000 == pytest.approx(fraction, abs=0.01)
    ends = Split(train=0, validation=1, test=0)
    assert {split.part_of(byte * 32, split=ends) for byte in (b"\0", b"\x80", b"\xff")} == {"validation"}


def test_coming_and_going_patients_move_nobody(site: Site) -> None:
    opened(site)
    before = part_by_patient(site)
    rows = rows_of(50)[10:]
    for number, row in enumerate(rows):
        write_png(site.directory / row[0], seed=1000 + number)
    write_table(site.directory, rows)
    freeze(site)
    after = part_by_patient(site)
    assert len(before) == 30 and len(after) == 45
    assert all(after[patient] == part for patient, part in before.items() if patient in after)


def test_order_of_rows_and_place_of_the_site_change_nothing(site: Site, tmp_path: Path) -> None:
    moved = make_site(tmp_path / "south", rows_of(30))
    write_table(moved.directory, rows_of(30)[::-1])
    assert opened(moved).version == opened(site).version
    assert same(opened(moved), opened(site))


def test_every_image_is_its_own_patient_when_said(tmp_path: Path) -> None:
    site = make_site(tmp_path / "north", rows_of(10), patient_is="case")
    (site.directory / "cases.csv").write_text(
        "image,label\n" + "".join(f"{image},{label}\n" for image, label, _ in rows_of(10))
    )
    cohort = opened(site)
    assert sum(len(part.patients) for part in cohort.parts.values()) == cohort.used == 20


def test_empty_parts_and_an_empty_cohort_are_legal(tmp_path: Path) -> None:
    site = make_site(tmp_path / "a", rows_of(3), split={"train": 0, "validation": 0, "test": 1})
    cohort = opened(site)
    assert cohort.parts["train"].images.shape == (0, 1, 8, 8) and len(cohort.parts["train"].patients) == 0
    assert len(cohort.parts["test"].targets) == 6
    empty = opened(make_site(tmp_path / "b", []))
    assert (empty.offered, empty.used) == (0, 0)
    nothing = opened(site, asked=asked(classes=("x", "y")))
    assert nothing.used == 0 and nothing.reasons == {"unknown_label": 6}


def test_what_cannot_be_used_is_counted_listed_and_never_fatal(site: Site) -> None:
    rows = rows_of(30)
    (site.directory / rows[0][0]).unlink()
    (site.directory / rows[1][0]).write_bytes(b"not an image")
    (site.directory / rows[2][0]).write_bytes((site.directory / rows[2][0]).read_bytes()[:-40])
    rows[3] = (rows[3][0], "healthy", rows[3][2])
    rows[4] = (rows[4][0], rows[4][1], "")
    rows += [rows[5], (rows[6][0], "opacity", "somebody else")]
    write_table(site.directory, rows)
    cohort = opened(site)
    assert cohort.reasons == {
        "contradictory_rows": 2,
        "duplicate_row": 1,
        "missing_file": 1,
        "missing_patient": 1,
        "truncated": 1,
        "unknown_format": 1,
        "unknown_label": 1,
    }
    assert cohort.offered == 62 and cohort.used == 54 == cohort.offered - sum(cohort.reasons.values())
    assert sum(len(part.targets) for part in cohort.parts.values()) == 54
    codes = quarantined(site)
    assert codes[rows[0][0]] == "missing_file" and codes[rows[6][0]] == "contradictory_rows"
    assert opened(site).reasons == cohort.reasons  # a warm start tells the same


def test_changed_table_is_picked_up_by_freezing_only(site: Site) -> None:
    first = opened(site)
    assert not frozen.has_changed(site)
    write_table(site.directory, rows_of(30)[:20])
    assert frozen.has_changed(site)
    assert opened(site).version == first.version and same(opened(site), first)
    second = freeze(site)
    assert second.version != first.version and len(second.cases) == 20
    assert opened(site).used == 20
    kept = site.private / f"cohort-{first.version[:16]}.json"
    assert json.loads(kept.read_bytes())["version"] == first.version


def test_changed_and_missing_files_are_refused_until_frozen_again(site: Site) -> None:
    version = opened(site).version
    changed, gone, touched = (site.directory / rows_of(30)[n][0] for n in (0, 1, 2))
    write_png(changed, seed=999)
    gone.unlink()
    touched.touch()
    cohort = opened(site)
    assert cohort.version == version
    assert cohort.reasons == {"changed_since_frozen": 1, "missing_file": 1}
    write_png(changed, seed=0)
    assert opened(site).reasons == {"missing_file": 1}
    write_png(changed, seed=999)
    freeze(site)
    assert opened(site).reasons == {"missing_file": 1} and opened(site).version != version


def test_names_and_ids_are_in_the_private_folder_only(site: Site) -> None:
    (site.directory / rows_of(30)[0][0]).write_bytes(b"not an image")
    site.private.chmod(0o755)
    opened(site)
    listed = frozen.read(site, secret=SECRET)
    assert listed is not None
    planted = [b"Patient", b".png", *(one.content.encode() for one in listed.cases)]
    for path in (path for path in site.cache.rglob("*") if path.is_file()):
        content = path.read_bytes() + path.name.encode()
        assert not any(text in content for text in planted)
        assert path.stat().st_mode & 0o077 == 0
    for directory in (site.private, site.cache, *(path for path in site.cache.iterdir() if path.is_dir())):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in site.private.iterdir())


def test_split_and_patient_are_permanent(site: Site) -> None:
    opened(site)
    for change in ({"split": {"train": 0.6, "validation": 0.2, "test": 0.2}}, {"patient_is": "case"}):
        (site.directory / "site.yaml").write_text(yaml.safe_dump({**SETTINGS, **change}))
        changed = open_site(site.directory)
        for action in (opened, freeze):
            with pytest.raises(ConfigError, match=next(iter(change))):
                action(changed)


def test_another_key_or_an_edited_list_stops_the_site(site: Site) -> None:
    opened(site)
    key, path = site.private / "split.key", site.private / "cohort.json"
    secret, content = key.read_text(), path.read_text()
    key.write_text("ab" * 32)
    with pytest.raises(StateError, match="split.key"):
        opened(site)
    key.write_text(secret)
    assert opened(site).used == 60
    for edited in (content.replace('"normal"', '"opacity"', 1), content[:-2], "[]"):
        path.write_text(edited)
        with pytest.raises(StateError):
            freeze(site)


@pytest.mark.parametrize(("found", "told"), [(99, "a newer Feverfew wrote it"), (1, "--freeze")])
def test_a_cohort_of_another_schema_is_refused_and_left_as_it_is(site: Site, found: int, told: str) -> None:
    opened(site)
    path = site.private / "cohort.json"
    tree = json.loads(path.read_text())
    tree["list"]["format"] = found
    secret = bytes.fromhex((site.private / "split.key").read_text())
    tree["version"] = frozen._version(tree["list"], secret=secret)
    path.write_text(json.dumps(tree))
    before = path.read_bytes()
    for action in (opened, freeze):
        with pytest.raises(SchemaError, match=told):
            action(site)
    assert path.read_bytes() == before


def test_a_cohort_that_was_moved_away_is_frozen_again_with_the_same_parts(site: Site) -> None:
    before = opened(site).version
    (site.private / "cohort.json").unlink()
    assert opened(site).version == before, "which tells the list and who is in which part"


def test_split_key_that_is_missing_damaged_or_readable_by_others_stops_the_site(site: Site) -> None:
    key = site.private / "split.key"
    key.chmod(0o644)
    with pytest.raises(UserError, match="chmod"):
        opened(site)
    key.chmod(0o600)
    key.write_text("abc")
    with pytest.raises(DataError, match="64 hexadecimal"):
        opened(site)
    key.unlink()
    with pytest.raises(UserError):
        opened(site)


def test_version_depends_on_the_secret(site: Site, tmp_path: Path) -> None:
    other = make_site(tmp_path / "other", rows_of(30))
    (other.private / "split.key").write_text("cd" * 32)
    assert freeze(other).version != freeze(site).version


def test_warm_start_imports_neither_a_decoder_nor_a_network(tmp_path: Path) -> None:
    site = make_site(tmp_path / "large", rows_of(500))
    opened(site)
    program = f"""
import sys
from pathlib import Path
from client.cohort import open_cohort
from client.site import open_site
from common.asked import Asked
site = open_site(Path({str(site.directory)!r}))
asked = Asked.model_validate_json({ASKED.model_dump_json()!r})
assert open_cohort(site, asked=asked).used == 1000
assert not {{"monai", "pydicom", "nibabel", "PIL", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_accepted_drops_the_first_of_contradictory_rows_once() -> None:
    case = Case(images=("a",), labels=("x",), patient="p")
    again = Refused(image="a", code="contradictory_rows")
    cases, refused = frozen.accepted([case, again, again])
    assert cases == [] and len(refused) == 3


def write_pairs(directory: Path, **settings: Any) -> Site:
    """A site of ten patients whose cases have two images, T1 of 10 to 20 and T2 of 210 to 220, and a mask."""
    cases = SETTINGS["cases"] | {"images": {"t1": "t1", "t2": "t2"}, "label": "label", "mask": "mask"}
    site = make_site(directory, [], cases=cases, **settings)
    lines, rng = ["t1,t2,mask,label,patient_id"], np.random.default_rng(0)
    for number in range(10):
        for name, least in (("t1", 10), ("t2", 210)):
            pixels = rng.integers(least, least + 10, (9, 11), dtype=np.uint8)
            Pillow.fromarray(pixels).save(directory / f"{name}-{number}.png")
        Pillow.fromarray((pixels > 214).astype(np.uint8)).save(directory / f"mask-{number}.png")
        names = ",".join(f"{name}-{number}.png" for name in ("t1", "t2", "mask"))
        lines.append(f"{names},{CLASSES[number % 2]},P{number}")
    (directory / "cases.csv").write_text("\n".join(lines) + "\n")
    return site


@pytest.mark.parametrize("inputs", [("t1", "t2"), ("t2", "t1"), ("t2",)])
def test_images_of_a_case_are_channels_in_the_order_of_the_plan(
    tmp_path: Path, inputs: tuple[str, ...]
) -> None:
    site = write_pairs(tmp_path / "north")
    window = {"name": "window", "lower": 0, "upper": 255}
    wanted = asked(inputs=inputs, steps=(window, {"name": "resize"}))
    cohort = opened(site, asked=wanted)
    assert cohort.used == 10
    for part in cohort.parts.values():
        assert part.images.shape[1] == len(inputs)
        is_bright = (part.images > 128).all(axis=(0, 2, 3)).tolist()
        assert is_bright == [name == "t2" for name in inputs]


def test_images_and_masks_of_another_size_are_quarantined_by_themselves(tmp_path: Path) -> None:
    site = write_pairs(tmp_path / "north")
    for name in ("t2-3", "mask-4", "mask-5"):
        Pillow.fromarray(np.arange(90, dtype=np.uint8).reshape(9, 10) % 2).save(
            site.directory / f"{name}.png"
        )
    cohort = opened(site, asked=asked(inputs=("t1", "t2"), target="mask"))
    assert cohort.used == 7 and cohort.reasons == {"mismatched_inputs": 1, "mismatched_mask": 2}
    assert quarantined(site)["t1-3.png"] == "mismatched_inputs"
    assert opened(site, asked=asked(inputs=("t1",))).used == 10, "a plan that asks for less can use all"


@pytest.mark.parametrize("counts", [[], [1], [2, 1, 3], [0, 2, 0, 1]])
def test_neighbours_are_the_indices_that_counts_say(counts: list[int]) -> None:
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    expected = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
    found = Neighbours(counts)
    assert len(found) == len(counts) and bool(found) is bool(counts)
    assert [list(one) for one in found] == expected
    assert [list(one) for one in found[1:]] == expected[1:] and type(found[1:]) is tuple
    assert all(one.dtype == np.int64 for one in found)
    if counts:
        assert list(found[-1]) == expected[-1]
    with pytest.raises(IndexError):
        found[len(counts)]
