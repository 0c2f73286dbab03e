"""Whole runs of plans about masks, several labels and clinical values, as a researcher starts them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sites import skeleton_cases, write_site

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
SMALL = [
    *("data=directory", "data.directory=sites", "state=keep", "engine.workers=2", "hydra.run.dir=run"),
    *("preprocessing=grey28", "plan.rounds=2", "plan.evaluation.validation_every=1"),
    *("training.local_steps=4", "training.expected_batch=10"),
]


def simulate(place: Path, *overrides: str) -> dict[str, Any]:
    done = subprocess.run(
        [COMMAND, *SMALL, *overrides], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((place / "run" / "report.json").read_text())
    assert report["status"] == "completed"
    return report


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
def test_run_about_masks_reports_dice_by_class_and_site(tmp_path: Path, privacy: str) -> None:
    for name in ("a", "b"):
        write_site(tmp_path / "sites" / name, name=name, num_patients=30, masks=True)
    report = simulate(
        tmp_path,
        *("plan.target=mask", "data.classes=[background,square]", "model=unet", f"privacy={privacy}"),
    )
    final = report["final"]
    assert final["auroc"] is None and len(final["dice_by_class"]) == 1
    assert final["dice_interval"][0] <= final["dice"] <= final["dice_interval"][1]
    assert set(final["per_site"]) == {"a", "b"}
    assert all("dice" in entry for entry in report["rounds"])
    if privacy == "none":
        assert final["dice_exact"] == final["dice"] > 0.2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Dice on test patients" in page and "AUROC" not in page


def write_labelled_site(directory: Path, name: str) -> None:
    """A site whose cases bear none, one or two labels, with a clinical value that tells the first."""
    write_site(directory, name=name, num_patients=40)
    with (directory / "cases.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (directory / "cases.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "patient_id", "bright", "old", "age"])
        for row in rows:
            number = int(row["patient_id"].removeprefix("Patient "))
            old = number // 2 % 2
            writer.writerow(
                [row["image"], row["patient_id"], int(row["label"] == "opacity"), old, 40 + 40 * old]
            )
    settings = directory / "site.yaml"
    cases = skeleton_cases(name) | {
        "label": None,
        "label_columns": {"bright": "bright", "old": "old"},
        "values": {"age": "age"},
    }
    text = settings.read_text()
    settings.write_text(yaml.safe_dump(yaml.safe_load(text) | {"cases": cases}))


@pytest.mark.slow
def test_run_about_labels_learns_one_from_the_image_and_one_from_the_clinical_value(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_labelled_site(tmp_path / "sites" / name, name)
    report = simulate(
        tmp_path,
        *("plan.target=labels", "data.classes=[bright,old]", "privacy=none", "plan.rounds=6"),
        "plan.clinical=[{name: age, kind: number, mean: 60, std: 20}]",
    )
    bright, old = report["final"]["auroc_by_class"]
    assert bright > 0.9 and old == 1.0
    assert report["final"]["sensitivity"] is None and report["final"]["accuracy"] > 0.5
