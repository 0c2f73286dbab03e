from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu, norm

from client.case import Case
from client.cohort import open_cohort
from client.frozen import listed_rows
from client.site import open_site
from common.errors import ConfigError, DataError
from simulations.hospitals import ListedSource, MedMnistSource, prepare_sites
from simulations.settings import source_of
from tests.plans import asked
from tests.test_simulations_hospitals import phantoms

TABLE: dict[str, Any] = {
    "kind": "table",
    "file": "data.csv",
    "sheet": None,
    "patient": "who",
    "images": {"image": "file"},
    "image_path": "png/{}.png",
    "pacs": None,
    "label": "finding",
    "separator": None,
    "classes": {},
    "label_columns": {},
    "mask": None,
    "values": {"age": "Alter"},
}
DATA: dict[str, Any] = {
    "source": "listed",
    "cases": TABLE,
    "patient_is": "column",
    "classes": ["ill", "well"],
    "num_sites": 3,
    "train_fraction": 0.5,
    "validation_fraction": 0.0,
    "seed": 0,
    "max_epsilon": 3.0,
    "delta": 1e-3,
}


def listed(directory: Path, **changes: Any) -> ListedSource:
    source = source_of({**DATA, "directory": str(directory), **changes})
    assert isinstance(source, ListedSource)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten patients with two images each, and a row without a patient."""
    directory = tmp_path / "folder"
    (directory / "png").mkdir(parents=True)
    with (directory / "data.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["who", "file", "finding", "Alter", "note"])
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (9, 9), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"png/{number}.png")
            label = ["ill", "well", "ill|well", "-"][number % 4]
            writer.writerow([f"P{number // 2}", number, label, 30 + number, "secret"])
        writer.writerow(["", "0", "ill", "", ""])
    return directory


def cases_of(site: Path) -> list[Case]:
    return [row for row in listed_rows(open_site(site)) if isinstance(row, Case)]


def test_patients_of_a_folder_are_divided_and_none_is_at_two_sites(folder: Path, tmp_path: Path) -> None:
    sites = prepare_sites(tmp_path / "sites", source=listed(folder), num_workers=1)
    patients = [Counter(case.patient for case in cases_of(site)) for site in sites]
    assert [len(of_site) for of_site in patients] == [4, 3, 3]
    assert sum(patients, Counter()) == {f"P{number}": 2 for number in range(10)}
    assert "secret" not in (sites[0] / "cases.csv").read_text()


def test_site_of_a_folder_reads_images_and_values_through_a_link(folder: Path, tmp_path: Path) -> None:
    (site, *_) = prepare_sites(tmp_path / "sites", source=listed(folder, num_sites=1), num_workers=1)
    assert (site / "data").is_symlink()
    age = {"name": "age", "kind": "number", "mean": 30, "std": 10}
    wanted = asked(classes=("ill", "well"), clinical=(age,), size=(9, 9))
    cohort = open_cohort(open_site(site), asked=wanted)
    # two of four labels are no class of a plan for one of two classes
    assert cohort.used == 10 and cohort.reasons == {"unknown_label": 10}
    values = np.concatenate([part.values for part in cohort.parts.values()])
    expected = [0.0, 0.1, 0.4, 0.5, 0.8, 0.9, 1.2, 1.3, 1.6, 1.7]
    np.testing.assert_allclose(np.sort(values[:, 0]), expected, atol=1e-6)


def test_folder_with_several_labels_keeps_them(folder: Path, tmp_path: Path) -> None:
    cases = TABLE | {"separator": "|", "classes": {"ill": "ill", "well": "well", "-": None}}
    (site,) = prepare_sites(tmp_path / "sites", source=listed(folder, cases=cases, num_sites=1))
    cohort = open_cohort(open_site(site), asked=asked(target="labels", classes=("ill", "well")))
    found = np.concatenate([part.targets for part in cohort.parts.values()])
    assert Counter(map(tuple, found.tolist())) == {(1, 0): 5, (0, 1): 5, (1, 1): 5, (0, 0): 5}


def test_masks_beside_images_are_cases_of_a_plan_about_masks(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for number in range(4):
        voxels = np.random.default_rng(number).integers(0, 1000, (9, 10, 11)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"set/images/{number}.nii.gz")
        mask = (voxels > 500).astype(np.uint8) + (voxels > 900).astype(np.uint8)
        if number < 3:
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"set/masks/{number}.nii.gz")
    pairs = {"kind": "pairs", "images": {"image": "images"}, "masks": "masks", "patient": None}
    source = listed(tmp_path / "set", cases=pairs, patient_is="case", num_sites=1)
    (site,) = prepare_sites(tmp_path / "sites", source=source)
    wanted = asked(target="mask", classes=("background", "some", "much"), size=(9, 10, 11))
    cohort = open_cohort(open_site(site), asked=wanted)
    assert cohort.used == 3 and cohort.reasons == {"missing_mask": 1}
    part = max(cohort.parts.values(), key=lambda part: len(part.images))
    assert part.targets.shape == part.images[:, 0].shape == (len(part.images), 9, 10, 11)
    brightest = [part.images[:, 0][part.targets == index].max() for index in range(3)]
    assert brightest[0] < brightest[1] < brightest[2]  # image and mask lie on each other
    too_few = open_cohort(
        open_site(site), asked=wanted.model_copy(update={"classes": ("background", "some")})
    )
    assert too_few.reasons == {"bad_mask": 3, "missing_mask": 1}


def test_folder_with_too_few_patients_and_listing_without_sense_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="a patient for each of 11 sites"):
        listed(folder, num_sites=11).parameters()
    with pytest.raises(ConfigError, match="data.cases"):
        listed(folder, cases={"kind": "table"})


def test_changed_table_is_another_source(folder: Path) -> None:
    before = listed(folder).parameters()
    assert listed(folder).parameters() == before
    with (folder / "data.csv").open("a") as stream:
        stream.write("P10,0,ill,1,\n")
    assert listed(folder).parameters() != before


def test_volumes_of_a_medmnist_file_are_read_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 6), ("val", 2), ("test", 2)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 9, 9, 9), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    np.savez(tmp_path / "volumes.npz", **arrays)
    data = {
        key: DATA[key] for key in ("train_fraction", "validation_fraction", "seed", "max_epsilon", "delta")
    }
    source = source_of(
        data
        | {"source": "medmnist", "file": str(tmp_path / "volumes.npz"), "classes": ["a", "b"]}
        | {"num_sites": 1, "partition": "iid", "alpha": 1.0, "min_cases": 1, "evaluation_site": False}
    )
    assert isinstance(source, MedMnistSource)
    (site,) = prepare_sites(tmp_path / "sites", source=source)
    window = ({"name": "window", "lower": 0, "upper": 255}, {"name": "resize"})
    cohort = open_cohort(open_site(site), asked=asked(classes=("a", "b"), size=(9, 9, 9), steps=window))
    found = {image.tobytes() for part in cohort.parts.values() for image in part.images}
    assert found == {image.tobytes() for part in ("train", "val") for image in arrays[f"{part}_images"]}


@pytest.mark.slow
def test_marker_of_phantoms_has_the_effect_that_was_asked_for(tmp_path: Path) -> None:
    source = phantoms(patients_per_site=400, num_sites=1, image_size=16)
    with_marker = replace(source, marker_effect=1.0, marker_missing_fraction=0.25)
    (site,) = prepare_sites(tmp_path / "sites", source=with_marker)
    values: dict[str, set[str]] = {"normal": set(), "opacity": set()}
    missing = set()
    for case in cases_of(site):
        (marker,) = case.values
        assert case.labels is not None
        if marker:
            values[case.labels[0]].add(marker)
        else:
            missing.add(case.patient)
    ill, well = ([float(text) for text in values[name]] for name in ("opacity", "normal"))
    expected = norm.cdf(1 / math.sqrt(2))
    assert mannwhitneyu(ill, well).statistic / (len(ill) * len(well)) == pytest.approx(expected, abs=0.07)
    assert len(missing) == pytest.approx(100, abs=35)


def test_images_of_phantoms_are_the_same_with_a_marker(tmp_path: Path) -> None:
    source = phantoms(patients_per_site=2, num_sites=1)
    (plain,) = prepare_sites(tmp_path / "plain", source=source)
    (marked,) = prepare_sites(tmp_path / "marked", source=replace(source, marker_effect=1.0))
    for path in (plain / "images").iterdir():
        assert (marked / "images" / path.name).read_bytes() == path.read_bytes()
