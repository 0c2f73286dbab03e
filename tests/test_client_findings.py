"""What compares cases and patients before training, and what becomes of it."""

from __future__ import annotations

import csv
import gc
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from client import findings, frozen, lettering, rules, sight, skeleton, split, survey, work
from client.case import Case
from client.check import Findings, check
from client.cohort import open_cohort
from client.findings import Finding
from client.sight import Sight
from client.site import Site, open_site
from common import keys
from common.errors import ConfigError, Refusal, UserError
from common.exchange import Task
from tests import scans
from tests.plans import asked, plan
from tests.sites import EVERY_PLAN

SECRET = bytes(range(32))
Row = tuple[str, str, str]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 24), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray, *, comment: str = "") -> None:
    """The same pixels with another comment are another file."""
    info = PngInfo()
    info.add_text("Comment", comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(pixels).save(path, pnginfo=info)


def make_site(
    directory: Path, rows: Iterable[Row], *, decisions: dict[str, str] | None = None, **settings: Any
) -> Site:
    """A site that lists these rows; images are not written. Keys of ``rules`` are given with the others."""
    tree = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=20))
    own = {key: settings.pop(key) for key in list(settings) if key in tree["rules"]}
    tree["rules"] |= own | {"decisions": tree["rules"]["decisions"] | (decisions or {})}
    directory.mkdir(exist_ok=True)
    (directory / "site.yaml").write_text(yaml.safe_dump({**tree, **settings}))
    lines = ["image,label,patient_id", *(",".join(row) for row in rows)]
    (directory / "cases.csv").write_text("\n".join(lines) + "\n")
    if not (directory / "private").exists():
        (directory / "private").mkdir(mode=0o700)
        keys.write_secret(directory / "private" / "split.key", SECRET.hex().encode())
    return open_site(directory)


def many(directory: Path, *, num: int = 30) -> list[Row]:
    """Writes distinct images, each of a patient of its own."""
    for number in range(num):
        write(directory / f"i{number}.png", picture(number))
    return [(f"i{number}.png", ("normal", "opacity")[number % 2], f"P{number}") for number in range(num)]


def checked(site: Site, **options: Any) -> Findings:
    return check(site, **{"asked": asked(), **options})


def by_code(found: Findings) -> dict[str, Finding]:
    return {one.code: one for one in found.found}


def quarantined(site: Site) -> dict[str, str]:
    with (site.private / "quarantine.csv").open() as stream:
        return {row["image"]: row["code"] for row in csv.DictReader(stream)}


def prepared(site: Site, **changes: Any) -> tuple[str, str]:
    wanted = plan(privacy="none", **changes)
    changed = open_site(site.directory)
    told = work.prepare(
        changed,
        wanted,
        Task(
            run="r", plan_hash=wanted.hash, server_round=0, purpose="prepare", part="",
            parameters=np.zeros(0, np.float32),
        ),
    )  # fmt: skip
    return told.status, told.reason


def test_a_copy_of_one_patient_is_refused_and_the_first_is_used(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", picture(4), comment="exported again")
    site = make_site(tmp_path, [*rows, ("z.png", "normal", "P4")])
    found = by_code(checked(site))["duplicate_pixels"]
    assert (found.cases, found.images, found.decision) == (1, ("z.png",), "refuse")
    assert quarantined(site) == {"z.png": "duplicate_pixels"}
    listed = frozen.read(site, secret=SECRET)
    assert listed is not None and listed.compared == "pixels"
    assert listed.decided["duplicate_pixels"] == "refuse"
    assert {one.case.image for one in listed.cases} == {row[0] for row in rows}


def test_one_picture_of_one_patient_with_two_labels_is_not_used_at_all(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", picture(4), comment="exported again")
    site = make_site(tmp_path, [*rows, ("z.png", "opacity", "P4")])
    assert by_code(checked(site))["contradictory_pixels"].images == ("i4.png", "z.png")
    assert quarantined(site) == dict.fromkeys(("i4.png", "z.png"), "contradictory_pixels")


def test_one_picture_under_two_patients_is_not_used_at_all_and_parts_are_counted(tmp_path: Path) -> None:
    rows = many(tmp_path)
    site = make_site(tmp_path, rows)
    parts = {
        name: split.part_of(split.pseudonym(name, secret=SECRET), split=site.settings.split)
        for name in (f"Q{n}" for n in range(100))
    }
    here = split.part_of(split.pseudonym("P4", secret=SECRET), split=site.settings.split)
    same = next(name for name, part in parts.items() if part == here)
    other = next(name for name, part in parts.items() if part != here)
    write(tmp_path / "z.png", picture(4), comment="exported again")
    found = by_code(checked(make_site(tmp_path, [*rows, ("z.png", "opacity", same)])))["shared_pixels"]
    assert (found.images, found.note) == (("i4.png", "z.png"), "")
    site = make_site(tmp_path, [*rows, ("z.png", "normal", other)])
    found = by_code(checked(site, freeze=True))["shared_pixels"]
    assert found.note.startswith("2 of them lie in two parts")
    assert quarantined(site) == dict.fromkeys(("i4.png", "z.png"), "shared_pixels")


def test_copies_are_of_one_patient_where_every_image_is_said_to_be_its_own(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", picture(4), comment="again")
    site = make_site(tmp_path, [*rows, ("z.png", "normal", "")], patient_is="case")
    assert set(by_code(checked(site))) & {"shared_pixels", "duplicate_pixels"} == {"duplicate_pixels"}
    assert quarantined(site) == {"z.png": "duplicate_pixels"}


def test_other_sizes_types_or_one_pixel_are_other_pictures(tmp_path: Path) -> None:
    rows = many(tmp_path)
    changed = picture(4)
    changed[0, 0] ^= 1
    write(tmp_path / "x.png", changed)
    write(tmp_path / "y.png", picture(4).T)
    write(tmp_path / "z.png", picture(4).reshape(24, 32))
    site = make_site(tmp_path, [*rows, *((f"{n}.png", "normal", "P4") for n in "xyz")])
    assert "duplicate_pixels" not in by_code(checked(site))


def test_copies_may_be_kept_by_a_rule(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", picture(4), comment="again")
    site = make_site(tmp_path, [*rows, ("z.png", "normal", "P4")], decisions={"duplicate_pixels": "keep"})
    found = checked(site)
    assert by_code(found)["duplicate_pixels"].decision == "keep" and found.used == 31


def test_where_the_rules_ask_nothing_is_frozen_until_a_person_decides(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", picture(4))
    listed = [*rows, ("z.png", "normal", "Q")]
    site = make_site(
        tmp_path,
        listed,
        decisions={"shared_pixels": "ask"},
        policies=[EVERY_PLAN],
        unsafe_allow_no_privacy=True,
    )
    found = checked(site)
    assert not found.ok and found.version == "" and not (site.private / "cohort.json").exists()
    assert by_code(found)["shared_pixels"].level == "error"
    assert prepared(site) == ("declined", "undecided")
    with pytest.raises(Refusal, match="shared_pixels"):
        open_cohort(site, asked=asked())
    kept = checked(site, freeze=True, decided={"shared_pixels": "keep"})
    assert kept.ok and kept.used == 31
    again = checked(site)  # what a person decided is remembered as long as this cohort is
    assert again.ok and by_code(again)["shared_pixels"].decision == "keep"
    assert not checked(site, freeze=True).ok
    refused = checked(site, freeze=True, decided={"shared_pixels": "refuse"})
    assert refused.used == 29 and prepared(site) == ("approved", "")


def test_a_run_without_check_compares_files_and_check_says_what_is_left(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "y.png", picture(3))
    write(tmp_path / "z.png", picture(4), comment="other bytes")
    site = make_site(tmp_path, [*rows, ("y.png", "opacity", "P3"), ("z.png", "normal", "P4")])
    cohort = open_cohort(site, asked=asked())
    assert cohort.reasons == {"duplicate_pixels": 1} and quarantined(site) == {"y.png": "duplicate_pixels"}
    found = checked(site)
    left = by_code(found)["not_applied"]
    assert (left.cases, left.example) == (1, "z.png") and "without a check" in left.note
    assert found.version == cohort.version and found.used == 31
    applied = checked(site, freeze=True)
    assert applied.used == 30 and "not_applied" not in by_code(applied)
    assert set(quarantined(site)) == {"y.png", "z.png"}


@pytest.mark.parametrize("survey_first", [True, False])
def test_broken_files_that_are_alike_are_broken_and_no_copies(tmp_path: Path, survey_first: bool) -> None:
    rows = many(tmp_path)
    write(tmp_path / "black.png", np.zeros((32, 24), np.uint8))
    for number, content in enumerate((b"", b"text", (tmp_path / "black.png").read_bytes()) * 2):
        (tmp_path / f"z{number}.png").write_bytes(content)
        rows.append((f"z{number}.png", "normal", f"Z{number}"))
    site = make_site(tmp_path, rows)
    reasons = checked(site).quarantined if survey_first else open_cohort(site, asked=asked()).reasons
    assert reasons == {"constant": 2, "empty_file": 2, "unknown_format": 2}


def test_decisions_of_a_person_are_about_what_can_be_decided() -> None:
    assert rules.decided(refuse=["shared_pixels"], keep=["suspected_text"]) == {
        "shared_pixels": "refuse",
        "suspected_text": "keep",
    }
    for options in (
        {"refuse": ["constant"], "keep": []},
        {"refuse": ["shared_pixels"], "keep": ["shared_pixels"]},
    ):
        with pytest.raises(UserError, match="Expected"):
            rules.decided(**options)


def test_rules_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="least <= most"):
        make_site(tmp_path / "a", [], pixels={"least": 9, "most": 8})
    with pytest.raises(ConfigError, match="decisions"):
        make_site(tmp_path / "b", [], decisions={"shared_pixels": "merge"})


def test_every_decision_has_words_and_a_remedy() -> None:
    for code in rules.Decisions.model_fields:
        one = Finding(code=code, level="ok", cases=1, example="x")
        assert one.says and one.remedy
    assert all(Finding(code=code, level="ok", cases=1, example="x").remedy for code in findings.SAYS)


def write_dicom(directory: Path, number: int, **tags: Any) -> Row:
    stored = np.random.default_rng(number).integers(0, 4096, (16, 20), dtype=np.uint16)
    (directory / f"d{number}.dcm").write_bytes(scans.dicom(stored, **tags))
    return (f"d{number}.dcm", ("normal", "opacity")[number % 2], f"P{number}")


def test_modalities_that_are_not_expected_are_refused_and_mixed_ones_are_found(tmp_path: Path) -> None:
    rows = [write_dicom(tmp_path, n, Modality="DX") for n in range(10)]
    rows += [write_dicom(tmp_path, 10, Modality="CT"), write_dicom(tmp_path, 11, Modality="PLANTED")]
    rows += many(tmp_path, num=2)  # which have no modality
    mixed = by_code(checked(make_site(tmp_path, rows)))
    assert mixed["mixed_modalities"].images == ("d10.dcm", "d11.dcm") and "wrong_modality" not in mixed
    site = make_site(tmp_path, rows, modalities=["DX", "CT"])
    found = by_code(checked(site, freeze=True))
    assert found["wrong_modality"].images == ("d11.dcm",) and "mixed_modalities" not in found
    assert quarantined(site) == {"d11.dcm": "wrong_modality"}


def test_modality_is_looked_at_even_where_a_run_freezes(tmp_path: Path) -> None:
    rows = [write_dicom(tmp_path, n, Modality="DX") for n in range(3)] + [
        write_dicom(tmp_path, 3, Modality="CT")
    ]
    assert open_cohort(make_site(tmp_path, rows, modalities=["DX"]), asked=asked()).reasons == {
        "wrong_modality": 1
    }


def test_nothing_of_a_header_is_kept(tmp_path: Path) -> None:
    words = ("PLANTED", "IVOCT", "IVOCT")
    site = make_site(tmp_path, [write_dicom(tmp_path, n, Modality=word) for n, word in enumerate(words)])
    found = checked(site)
    assert by_code(found)["mixed_modalities"].cases == 1
    kept = b"".join(path.read_bytes() for path in site.private.rglob("*") if path.is_file())
    assert b"PLANTED" not in kept.upper() and "PLANTED" not in json.dumps(found.to_tree()).upper()
    assert b"Planted^Name" not in kept and b"IVOCT" not in kept


def test_text_that_the_header_admits_is_found(tmp_path: Path) -> None:
    rows = [write_dicom(tmp_path, n, BurnedInAnnotation=("YES" if n == 3 else "NO")) for n in range(5)]
    found = by_code(checked(make_site(tmp_path, rows)))["burned_in_text"]
    assert (found.images, found.decision) == (("d3.dcm",), "keep")


def test_sizes_and_spacings_outside_the_rules_are_refused(tmp_path: Path) -> None:
    rows = [write_dicom(tmp_path, n, PixelSpacing=[0.5, 0.5]) for n in range(5)]
    rows += [
        write_dicom(tmp_path, 5, PixelSpacing=[50, 50]),
        write_dicom(tmp_path, 6, PixelSpacing=[0.02, 0.02]),
    ]
    write(tmp_path / "tiny.png", picture(0)[:4])
    site = make_site(tmp_path, [*rows, ("tiny.png", "normal", "T")])
    checked(site)
    assert quarantined(site) == {
        "d5.dcm": "implausible_spacing",
        "d6.dcm": "implausible_spacing",  # 16 of 0.02 mm are no image of a patient
        "tiny.png": "implausible_size",
    }


def test_colour_among_grey_is_found_and_refused_where_grey_is_expected(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "z.png", np.random.default_rng(99).integers(0, 256, (32, 24, 3), dtype=np.uint8))
    rows.append(("z.png", "normal", "Z"))
    assert by_code(checked(make_site(tmp_path, rows)))["mixed_photometric"].images == ("z.png",)
    site = make_site(tmp_path, rows, photometric="grey", decisions={"mixed_photometric": "keep"})
    checked(site, freeze=True)
    assert quarantined(site) == {"z.png": "wrong_photometric"}


def lettered(text: str, *, seed: int = 0, size: int = 14, shade: int = 255) -> np.ndarray:
    """A smooth picture with grain and a line of text."""
    rows, columns = np.mgrid[0:256, 0:256] / 256
    smooth = (
        120
        + 60 * np.sin(3 * rows) * np.cos(2 * columns)
        + np.random.default_rng(seed).normal(0, 6, (256, 256))
    )
    image = Pillow.fromarray(smooth.clip(0, 250).astype(np.uint8))
    ImageDraw.Draw(image).text((12, 12), text, fill=shade, font=ImageFont.load_default(size))
    return np.asarray(image, dtype=np.float32)[None]


@pytest.mark.parametrize("size", [10, 12, 14, 18])
def test_a_line_of_burned_in_text_is_suspected(size: int) -> None:
    assert lettering.is_suspected(lettered("MILLER JOHN 12.03.1961", size=size))


def test_pictures_without_text_are_not_suspected() -> None:
    assert not lettering.is_suspected(lettered(""))
    assert not lettering.is_suspected(lettered("L", size=24))  # a side marker
    assert not any(lettering.is_suspected(picture(seed)[None].astype(np.float32)) for seed in range(50))


def test_one_patient_with_most_of_the_cases_is_found(tmp_path: Path) -> None:
    rows = many(tmp_path)
    own = by_code(checked(make_site(tmp_path, rows)))
    most = by_code(
        checked(make_site(tmp_path, [(a, b, c if n < 10 else "X") for n, (a, b, c) in enumerate(rows)]))
    )
    everybody = checked(make_site(tmp_path, [(a, b, "ward 3") for a, b, _ in rows]))
    assert "one_patient" not in own
    assert (most["one_patient"].cases, most["one_patient"].level) == (20, "warning")
    assert by_code(everybody)["one_patient"].level == "error" and not everybody.ok


def test_patients_written_in_two_ways_are_found(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "y.png", picture(100))
    write(tmp_path / "z.png", picture(101))
    rows += [("y.png", "normal", "p-04"), ("z.png", "normal", "P40")]
    found = by_code(checked(make_site(tmp_path, rows)))["similar_patients"]
    assert found.images == ("i4.png", "y.png") and found.decision == "keep"


def test_every_named_case_is_listed_with_its_copies(tmp_path: Path) -> None:
    rows = many(tmp_path)
    write(tmp_path / "y.png", picture(4), comment="again")
    write(tmp_path / "z.png", picture(5), comment="again")
    site = make_site(tmp_path, [*rows, ("y.png", "normal", "P4"), ("z.png", "normal", "Z")])
    path = site.private / "findings.csv"
    findings.write(path, checked(site).found)
    with path.open() as stream:
        listed = [(row["code"], row["image"], row["decided"]) for row in csv.DictReader(stream)]
        stream.seek(0)
        sets = {row["image"]: row["set"] for row in csv.DictReader(stream)}
    assert sorted(listed) == [
        ("duplicate_pixels", "i4.png", "keep"),
        ("duplicate_pixels", "y.png", "refuse"),
        ("shared_pixels", "i5.png", "refuse"),
        ("shared_pixels", "z.png", "refuse"),
    ]
    assert sets["i4.png"] == sets["y.png"] != sets["i5.png"] == sets["z.png"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_more_unusable_cases_than_the_hospital_states_stop_it(tmp_path: Path) -> None:
    rows = many(tmp_path, num=20)
    for number in range(5):
        (tmp_path / f"i{number}.png").write_bytes(b"")
    free: dict[str, Any] = {"policies": [EVERY_PLAN], "unsafe_allow_no_privacy": True}
    site = make_site(tmp_path, rows, max_quarantined_fraction=0.2, **free)
    found = checked(site)
    assert not found.ok and any("more than 20%" in line.text for line in found.lines)
    assert prepared(site) == ("declined", "too_many_unusable")
    site = make_site(tmp_path, rows, max_quarantined_fraction=0.25, **free)
    assert checked(site).ok and prepared(site) == ("approved", "")


def test_what_only_a_plan_makes_unusable_is_no_answer_to_it(tmp_path: Path) -> None:
    """Else a coordinator could ask, plan by plan and without a charge, how many cases are of some kind."""
    rows = many(tmp_path, num=20)
    free: dict[str, Any] = {"policies": [EVERY_PLAN], "unsafe_allow_no_privacy": True}
    site = make_site(tmp_path, rows, max_quarantined_fraction=0.01, **free)
    assert prepared(site, preprocessing__size=(8, 8, 8)) == ("approved", "")
    with (site.private / "quarantine.csv").open() as stream:
        assert {row["code"] for row in csv.DictReader(stream)} == {"two_dimensional"}


def test_only_the_cohort_of_the_last_plan_is_kept_open(tmp_path: Path) -> None:
    """An open cohort keeps its store on disk after its removal, and some hundred bytes a case in memory."""
    free: dict[str, Any] = {"policies": [EVERY_PLAN], "unsafe_allow_no_privacy": True}
    site = make_site(tmp_path, many(tmp_path, num=20), **free)
    for size in (8, 9, 10):
        assert prepared(site, preprocessing__size=(size, size)) == ("approved", "")
    gc.collect()
    mapped = {line.split("/cache/")[1][:32] for line in maps() if "/cache/" in line and str(tmp_path) in line}
    assert len(mapped) == 1


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def test_a_survey_is_kept_and_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    site = make_site(tmp_path, many(tmp_path))
    cases, _ = frozen.accepted(frozen.listed_rows(site))
    first = survey.survey(site, cases=cases)
    path = site.private / "survey.sqlite"
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as kept:
        kept.execute("update sights set sight = replace(sight, ?, ?)", (pixels(first["i4.png"]), "kept"))
    kept.close()
    assert pixels(survey.survey(site, cases=cases)["i4.png"]) == "kept"
    write(tmp_path / "i4.png", picture(4), comment="touched")
    assert pixels(survey.survey(site, cases=cases)["i4.png"]) == pixels(first["i4.png"])
    path.write_bytes(b"not a database")
    assert survey.survey(site, cases=cases).keys() == first.keys()


def test_several_processes_see_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path, [*many(tmp_path), ("gone.png", "normal", "G")])
    cases, _ = frozen.accepted(frozen.listed_rows(site))
    alone = survey.survey(site, cases=cases)
    (site.private / "survey.sqlite").unlink()
    monkeypatch.setattr(survey, "FEW", 0)
    assert survey.survey(site, cases=cases) == alone and alone["gone.png"] == "missing_file"


def pixels(seen: Sight | str) -> str:
    assert isinstance(seen, Sight)
    return seen.pixels


def test_paths_are_no_names_of_patients_that_could_be_alike(tmp_path: Path) -> None:
    for name in ("a-01.png", "A 1.png"):
        write(tmp_path / name, picture(len(name)))
    rows = [("a-01.png", "normal", "x"), ("A 1.png", "normal", "y")]
    site = make_site(tmp_path, rows, patient_is="case")
    assert "similar_patients" not in {one.code for one in checked(site).found}


def test_case_for_which_no_memory_is_left_does_not_end_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path, many(tmp_path))
    look = sight.look

    def hungry(case: Case, *, directory: Path) -> Sight:
        if case.image == "i3.png":
            raise MemoryError
        return look(case, directory=directory)

    monkeypatch.setattr(sight, "look", hungry)
    cases, _ = frozen.accepted(frozen.listed_rows(site))
    first = survey.survey(site, cases=cases)
    assert first["i3.png"] == "out_of_memory" and len(first) == len(cases)
    monkeypatch.undo()
    assert isinstance(survey.survey(site, cases=cases)["i3.png"], Sight), "it is looked at again"
