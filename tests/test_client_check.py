from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as Pillow
from rich.console import Console

from client import inspection, page, rarity, skeleton, work
from client.__main__ import main
from client.check import Counts, Findings, Line, check
from client.findings import Level
from client.report import progress, render, report
from client.site import Site, open_site
from common import keys
from common.errors import DataError
from common.exchange import Task
from tests import scans
from tests.plans import asked, plan
from tests.sites import write_site

CLASSES = ("normal", "opacity")
ASKED = asked()
EVERYTHING_TRAINS = {"train": 1, "validation": 0, "test": 0}


def make_site(directory: Path, *, num_patients: int = 12, **settings: Any) -> Site:
    """A site whose patients have two images each, every third patient one of each class."""
    tree = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=num_patients))
    directory.mkdir()
    (directory / "site.yaml").write_text(yaml.safe_dump({**tree, "split": EVERYTHING_TRAINS, **settings}))
    lines = ["image,label,patient_id"]
    for number in range(2 * num_patients):
        patient = number // 2
        label = CLASSES[number % 2 if patient % 3 == 0 else patient % 3 - 1]
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9), dtype=np.uint8)
        Pillow.fromarray(pixels).save(directory / f"{number}.png")
        lines.append(f"{number}.png,{label},P{patient}")
    (directory / "cases.csv").write_text("\n".join(lines) + "\n")
    (directory / "private").mkdir(mode=0o700)
    keys.write_secret(directory / "private" / "split.key", b"ab" * 32)
    return open_site(directory)


def checked(site: Site, **options: Any) -> Findings:
    return check(site, **{"asked": ASKED, **options})


def level(findings: Findings, name: str) -> Level | None:
    return next((line.level for line in findings.lines if line.name == name), None)


def test_patients_and_cases_are_counted_by_class_and_part(tmp_path: Path) -> None:
    findings = checked(make_site(tmp_path / "site"))
    assert (findings.offered, findings.used, findings.patients) == (24, 24, 12)
    train = findings.parts["train"]
    assert train.total == Counts(patients=12, cases=24)
    # 4 patients have one image of each class, 4 two of the first, 4 two of the second
    assert train.by_class == {name: Counts(patients=8, cases=12) for name in CLASSES}
    assert findings.parts["test"].total == Counts(patients=0, cases=0)
    assert findings.ok and {line.level for line in findings.lines} == {"ok"}


def test_quarantine_is_counted_with_a_remedy(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    (site.directory / "3.png").unlink()
    (site.directory / "4.png").write_bytes(b"")
    findings = checked(site)
    assert findings.quarantined == {"empty_file": 1, "missing_file": 1}
    assert level(findings, "cases") == "warning" and findings.ok
    tree = json.loads(json.dumps(findings.to_tree()))
    assert tree["quarantined"]["empty_file"] == {"cases": 1, "remedy": "the file is empty; export it again"}


def test_a_class_or_part_without_cases_is_found(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    absent = checked(site, asked=asked(classes=(*CLASSES, "effusion")))
    assert [one.note for one in absent.found if one.code == "rare_to_learn"][-1].startswith("effusion: 0")
    assert absent.ok
    nothing = checked(site, asked=asked(classes=("x", "y")))
    assert level(nothing, "training") == "error" and not nothing.ok


def test_evaluation_site_needs_no_training_part(tmp_path: Path) -> None:
    only_test = {"train": 0, "validation": 0, "test": 1}
    site = make_site(tmp_path / "site", role="evaluation", split=only_test)
    findings = checked(site)
    assert findings.ok and level(findings, "nominal_patients") is None
    assert findings.parts["test"].total.patients == 12


@pytest.mark.parametrize(("nominal", "expected"), [(40, "ok"), (48, "ok"), (33, "warning"), (51, "warning")])
def test_nominal_patients_far_from_the_training_part_are_found(
    tmp_path: Path, nominal: int, expected: str
) -> None:
    site = make_site(tmp_path / "site", num_patients=40, nominal_patients=nominal)
    assert level(checked(site), "nominal_patients") == expected


def test_changed_table_is_found_until_it_is_frozen(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    assert level(checked(site), "case table") is None
    table = site.directory / "cases.csv"
    table.write_text(table.read_text().replace("0.png,normal,P0\n", ""))
    assert level(checked(site), "case table") == "warning"
    output = io.StringIO()
    options: dict[str, Any] = {"asked": ASKED, "as_json": True}
    assert report(site, **options, freeze=True, console=Console(file=output)) == 0
    tree = json.loads(output.getvalue())
    assert tree["offered"] == 23 and "case table" not in [line["name"] for line in tree["lines"]]


def test_more_threads_than_the_machine_has_are_found(tmp_path: Path) -> None:
    assert level(checked(make_site(tmp_path / "site", threads=256)), "device") == "warning"


def test_images_as_patients_are_said(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", patient_is="case")
    (site.directory / "cases.csv").write_text("image,label\n0.png,normal\n1.png,opacity\n")
    assert level(checked(site), "patients") == "ok"


def test_lines_of_others_are_shown_and_decide(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    budget = Line(name="budget", text="epsilon 1.5 [bold] of 3.0 left")
    findings = checked(site, others=[budget])
    assert findings.lines[-1] == budget
    output = io.StringIO()
    Console(file=output, width=120).print(render(findings))
    assert budget.text in output.getvalue()
    cut = Line(name="connection", text="no answer", level="error")
    assert not checked(site, others=[cut, budget]).ok
    assert report(site, asked=ASKED, others=[cut]) == 1


def test_tables_show_what_was_found_and_no_name(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    (site.directory / "3.png").unlink()
    output = io.StringIO()
    Console(file=output, width=120).print(render(checked(site)))
    text = output.getvalue()
    for expected in ("12 (23)", "missing_file", "restore it or remove the row", "nominal_patients", "12 in"):
        assert expected in text
    assert ".png" not in text and "P1" not in text


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    told: list[tuple[int, int]] = []
    checked(site, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 24) for n in range(1, 25)] * 2  # once to freeze, once to decode
    with progress(Console(file=io.StringIO())) as on_progress:
        on_progress(1, 2)


def test_check_says_what_a_plan_would_cost_and_whether_this_site_may_pay_it(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=10, max_epsilon=3.0)
    cheap = plan(rounds=2, training__expected_batch=1000, privacy__target_epsilon=2.0)
    assert inspection.plan_line(site, cheap).level == "ok"
    assert "epsilon 2.00" in inspection.plan_line(site, cheap).text
    dear = plan(rounds=2, training__expected_batch=1000, privacy__target_epsilon=4.0)
    line = inspection.plan_line(site, dear)
    assert line.level == "error" and "raise max_epsilon" in line.text


@pytest.mark.slow
def test_site_too_small_for_the_target_is_told_so_and_declines(tmp_path: Path) -> None:
    asked = plan(
        rounds=100, training__local_steps=100, privacy__target_epsilon=0.5, training__expected_batch=10
    )
    small = write_site(tmp_path / "small", name="small", num_patients=10)
    large = write_site(tmp_path / "large", name="large", num_patients=10, nominal_patients=100_000)
    line = inspection.plan_line(small, asked)
    assert line.level == "error" and "so few patients" in line.text
    task = Task(
        run="r",
        plan_hash=asked.hash,
        server_round=0,
        purpose="prepare",
        part="",
        parameters=np.zeros(0, np.float32),
    )
    told = work.prepare(small, asked, task)
    assert (told.status, told.reason) == ("declined", "unreachable_target")
    assert work.prepare(large, asked, task).status == "approved"


def test_page_names_examples_runs_nothing_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    (site.directory / "<b>bold.png").write_bytes(b"")
    with (site.directory / "cases.csv").open("a") as table:
        table.write("<b>bold.png,normal,P1\n")
    console = Console(file=io.StringIO(), width=160)
    assert report(site, asked=ASKED, console=console) == 0
    path = site.private / "check.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "&lt;b&gt;bold.png" in text and "<b>bold.png" not in text
    assert "empty_file" in text and "rare_to_learn" in text and "can take part" in text
    for absent in ("<script", "http://", "https://", "src=", "url(", "javascript:"):
        assert absent not in text
    assert "bold.png" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_page_says_that_a_site_cannot_take_part(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    found = checked(site, others=[Line(name="connection", text="no answer", level="error")])
    assert "cannot take part" in page.render(site, found)


def test_json_names_no_case(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    (site.directory / "3.png").write_bytes((site.directory / "4.png").read_bytes())
    tree = checked(site).to_tree()
    codes = {one["code"]: one for one in tree["findings"]}
    assert codes["shared_pixels"]["cases"] == 2 and codes["shared_pixels"]["decision"] == "refuse"
    assert ".png" not in json.dumps(tree)


def test_classes_with_few_patients_are_found(tmp_path: Path) -> None:
    settings = make_site(tmp_path / "site", nominal_patients=1000).settings
    patients = {"train": {"a": 10, "b": 9}, "test": {"a": 0, "b": 9}}
    found = rarity.rare(settings, patients=patients, plan=None)
    assert [(one.code, one.example) for one in found] == [("rare_to_learn", "b")]


def test_classes_that_the_noise_of_a_plan_drowns_are_found(tmp_path: Path) -> None:
    """q p sqrt(T) < sigma: with q = 10 / 1000, T = 25 and sigma = 4 below 80 patients."""
    in_parts = {"train": 0.7, "validation": 0.1, "test": 0.2}
    settings = make_site(tmp_path / "site", nominal_patients=1000, split=in_parts).settings
    noisy = plan(
        rounds=25,
        training__local_steps=1,
        training__expected_batch=10,
        privacy__target_epsilon=None,
        privacy__noise_multiplier=4.0,
        evaluation__noise_multiplier=5.0,
        evaluation__bins=16,
    )
    patients = {"train": {"a": 80, "b": 79}, "test": {"a": 20, "b": 19}}
    found = rarity.rare(settings, patients=patients, plan=noisy)
    # a sum of 16 bins, each with noise of 5 (one head), is off by 20
    assert [(one.code, one.example) for one in found] == [("drowned", "b"), ("rare_to_test", "b")]
    assert rarity.rare(settings, patients=patients, plan=plan(privacy="none")) == []


def write_volumes(directory: Path, *, masks: bool) -> Site:
    """A site of eight volumes as NIfTI, with a class each, or with masks of three classes."""
    tree = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=8))
    tree["split"] = EVERYTHING_TRAINS
    directory.mkdir()
    if masks:
        tree["cases"] |= {"label": None, "mask": "mask"}
    (directory / "site.yaml").write_text(yaml.safe_dump(tree))
    lines = ["image,label,patient_id,mask"]
    for number in range(8):
        rng = np.random.default_rng(number)
        volume = rng.integers(0, 1000, (12, 11, 10)).astype(np.int16)
        (directory / f"{number}.nii").write_bytes(scans.nifti(volume))
        (directory / f"{number}-mask.nii").write_bytes(scans.nifti((volume % 3).astype(np.uint8)))
        lines.append(f"{number}.nii,{CLASSES[number % 2]},P{number},{number}-mask.nii")
    (directory / "cases.csv").write_text("\n".join(lines) + "\n")
    (directory / "private").mkdir(mode=0o700)
    keys.write_secret(directory / "private" / "split.key", b"ab" * 32)
    return open_site(directory)


@pytest.mark.parametrize("masks", [False, True])
def test_volumes_and_masks_are_checked_without_a_plan(tmp_path: Path, masks: bool) -> None:
    site = write_volumes(tmp_path / "site", masks=masks)
    (site.directory / "0.nii").write_bytes(b"")  # the first is not readable
    usual = inspection.usual(site)
    assert usual.preprocessing.size == (32, 32, 32)
    assert usual.classes == (("0", "1", "2") if masks else CLASSES)
    findings = checked(site, asked=usual)
    assert findings.quarantined == {"empty_file": 1} and findings.used == 7


def test_command_decides_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path / "site")
    (site.directory / "3.png").write_bytes((site.directory / "4.png").read_bytes())

    def run(*options: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["feverfew-client", "check", str(site.directory), "--json", *options]
        )
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    code, kept, _ = run("--keep", "shared_pixels")
    assert code == 0 and json.loads(kept)["used"] == 24
    code, refused, _ = run("--refuse", "shared_pixels")
    assert code == 0 and json.loads(refused)["used"] == 22
    code, _, told = run("--keep", "constant")
    assert code == 2 and "Expected a code" in told


@pytest.mark.parametrize("cells", ["long", "many"])
def test_label_column_that_holds_no_classes_is_named_by_numbers_alone(tmp_path: Path, cells: str) -> None:
    site = make_site(tmp_path / "site")
    texts = ["Wolkenstein " * 8] * 3 if cells == "long" else [f"Wolkenstein {n}" for n in range(1001)]
    lines = ["image,label,patient_id", *(f"{n}.png,{text},P{n}" for n, text in enumerate(texts))]
    (site.directory / "cases.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        inspection.usual(site)
    assert "Wolkenstein" not in str(caught.value)
    assert ("95" if cells == "long" else "1001") in str(caught.value)
