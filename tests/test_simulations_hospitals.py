from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client import images
from client.case import Case
from client.site import SiteSettings, open_site
from client.split import read_key
from common.errors import DataError, UserError
from simulations import medmnist, site_files
from simulations.hospitals import (
    DirectorySource,
    MedMnistSource,
    PhantomSource,
    prepare_sites,
    write_site,
)

PNEUMONIA = Path(__file__).resolve().parents[2] / "shared" / "data" / "medmnist" / "pneumoniamnist.npz"


def phantoms(**changes: Any) -> PhantomSource:
    source = PhantomSource(
        num_sites=2,
        patients_per_site=10,
        seed=0,
        image_size=48,
        marker_effect=None,
        marker_missing_fraction=0.0,
        max_epsilon=3.0,
        delta=1e-4,
    )
    return replace(source, **changes)


def archive(path: Path, **changes: Any) -> Path:
    """Writes a MedMNIST file of 60 + 10 + 12 grey images of 9x9 with three classes."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 60), ("val", 10), ("test", 12)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 9, 9), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 3)[:, None].astype(np.uint8)
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def mnist(file: Path, **changes: Any) -> MedMnistSource:
    source = MedMnistSource(
        file=file,
        class_names=("a", "b", "c"),
        num_sites=3,
        partition="iid",
        alpha=1.0,
        min_cases=1,
        evaluation_site=True,
        train_fraction=0.8,
        validation_fraction=0.2,
        seed=0,
        max_epsilon=3.0,
        delta=1e-4,
    )
    return replace(source, **changes)


def rows(site: Path) -> list[dict[str, str]]:
    with (site / "cases.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_phantom_sites_are_sites(tmp_path: Path) -> None:
    sites = prepare_sites(tmp_path / "sites", source=phantoms(num_sites=3), num_workers=1)
    assert [site.name for site in sites] == ["site-1", "site-2", "site-3"]
    for site, num_patients in zip(sites, (14, 10, 6), strict=True):
        opened = open_site(site)
        assert opened.name == site.name
        assert opened.settings.patient_is == "column"
        assert (opened.settings.role, opened.settings.data) == ("training", "private")
        assert opened.settings.nominal_patients == round(0.7 * num_patients)
        assert len({row["patient_id"] for row in rows(site)}) == num_patients
        assert all(images.read(site / row["image"]).array.shape[0] == 1 for row in rows(site))
        assert len(rows(site)) == len(list((site / "images").iterdir()))


def test_all_images_of_a_patient_have_one_label(tmp_path: Path) -> None:
    source = phantoms(num_sites=1, patients_per_site=60)
    [site] = prepare_sites(tmp_path / "sites", source=source, num_workers=1)
    labels, counts = defaultdict(set), Counter(row["patient_id"] for row in rows(site))
    for row in rows(site):
        labels[row["patient_id"]].add(row["label"])
    assert all(len(found) == 1 for found in labels.values())
    assert set.union(*labels.values()) == {"normal", "opacity"}
    assert set(counts.values()) == {1, 2, 3, 4}


def test_private_files_are_private_and_the_split_key_follows_from_seed_and_name(tmp_path: Path) -> None:
    def keys_of(seed: int) -> list[bytes]:
        sites = prepare_sites(tmp_path / f"{seed}", source=phantoms(seed=seed, patients_per_site=2))
        for site in sites:
            assert (site / "private").stat().st_mode & 0o777 == 0o700
            assert (site / "private" / "split.key").stat().st_mode & 0o777 == 0o600
        return [read_key(open_site(site)) for site in sites]

    first = keys_of(0)
    assert len({*first, *keys_of(1)}) == 4
    shutil.rmtree(tmp_path / "0")
    assert keys_of(0) == first


def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    source = phantoms(patients_per_site=4)
    prepare_sites(tmp_path / "one", source=source, num_workers=1)
    prepare_sites(tmp_path / "two", source=source, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 10


def test_average_number_of_patients_is_the_asked_one() -> None:
    source = phantoms(num_sites=6, patients_per_site=100)
    sizes = [source.num_patients(index) for index in range(6)]
    assert sum(sizes) == 600
    assert sizes == sorted(sizes, reverse=True)
    assert phantoms(num_sites=1, patients_per_site=100).num_patients(0) == 100


def test_equal_source_is_used_again_and_another_replaces_it(tmp_path: Path) -> None:
    directory = tmp_path / "sites"
    [first, _] = prepare_sites(directory, source=phantoms(patients_per_site=2), num_workers=1)
    (first / "note").write_text("kept")
    prepare_sites(directory, source=phantoms(patients_per_site=2), num_workers=1)
    assert (first / "note").exists()
    prepare_sites(directory, source=phantoms(patients_per_site=2, seed=1), num_workers=1)
    assert not (first / "note").exists()
    assert len(list(directory.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir() if "making" in path.name] == []


@pytest.mark.parametrize("damage", ["record", "site"])
def test_damaged_set_is_made_again(damage: str, tmp_path: Path) -> None:
    directory, source = tmp_path / "sites", phantoms(patients_per_site=2)
    prepare_sites(directory, source=source, num_workers=1)
    before = contents(directory)
    if damage == "record":
        (directory / "source.json").write_text('{"sha256": ')
    else:
        shutil.rmtree(directory / "site-2")
    prepare_sites(directory, source=source, num_workers=1)
    assert contents(directory) == before


def test_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="found other files; nothing was changed"):
        prepare_sites(tmp_path / "mine", source=phantoms())
    assert contents(tmp_path / "mine").keys() == {"thesis.txt"}


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    prepare_sites(tmp_path / "sites", source=phantoms(patients_per_site=2), num_workers=1)
    assert (tmp_path / "sites" / "source.json").exists()


class Interrupted(PhantomSource):
    """A source that fails at its second site."""

    def write(self, directory: Path, *, name: str) -> None:
        if name == "site-2":
            raise KeyboardInterrupt
        super().write(directory, name=name)


def test_interrupted_writing_leaves_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "sites"
    prepare_sites(directory, source=phantoms(patients_per_site=2), num_workers=1)
    before = contents(directory)
    broken = Interrupted(**vars(phantoms(patients_per_site=2, seed=5)))
    with pytest.raises(KeyboardInterrupt):
        prepare_sites(directory, source=broken, num_workers=1)
    assert contents(directory) == before
    with pytest.raises(KeyboardInterrupt):
        prepare_sites(tmp_path / "new", source=broken, num_workers=1)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir() if "making" in path.name] == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".sites.making-abc" / "site-1").mkdir(parents=True)
    prepare_sites(tmp_path / "sites", source=phantoms(patients_per_site=2), num_workers=1)
    assert not (tmp_path / ".sites.making-abc").exists()


def test_written_site_can_be_read(tmp_path: Path) -> None:
    settings = site_files.settings(name="north", num_patients=120, max_epsilon=3.0, delta=1e-5)
    case = Case(images=('images/a, "b".png',), labels=("normal",), patient="7")
    write_site(tmp_path / "north", settings=settings, cases=[case], split_key=bytes(range(32)))
    opened = open_site(tmp_path / "north")
    assert opened.settings.delta == 1e-5
    assert (
        opened.settings.model_dump()
        == SiteSettings.model_validate(
            {key: value for key, value in settings.items() if key != "schema"}
        ).model_dump()
    )
    assert read_key(opened) == bytes(range(32))
    assert rows(tmp_path / "north") == [{"image": 'images/a, "b".png', "label": "normal", "patient_id": "7"}]


def test_medmnist_sites_hold_every_training_case_once_and_the_official_test_part(tmp_path: Path) -> None:
    file = archive(tmp_path / "small.npz")
    sites = prepare_sites(tmp_path / "sites", source=mnist(file), num_workers=1)
    data = np.load(file)
    assert [site.name for site in sites] == ["site-1", "site-2", "site-3", "official-test"]
    training = [pair for site in sites[:3] for pair in _pictures(site)]
    assert sorted(training) == _expected(data, "train", "val")
    assert sorted(_pictures(sites[3])) == _expected(data, "test")


def _pictures(site: Path) -> list[tuple[bytes, str]]:
    return [(np.asarray(Image.open(site / row["image"])).tobytes(), row["label"]) for row in rows(site)]


def _expected(data: Any, *parts: str) -> list[tuple[bytes, str]]:
    return sorted(
        (image.tobytes(), "abc"[label[0]])
        for part in parts
        for image, label in zip(data[f"{part}_images"], data[f"{part}_labels"], strict=True)
    )


def test_medmnist_sites_say_that_every_image_is_its_own_patient(tmp_path: Path) -> None:
    file = archive(tmp_path / "small.npz")
    *training, evaluation = (
        open_site(site) for site in prepare_sites(tmp_path / "sites", source=mnist(file), num_workers=1)
    )
    for site in training:
        assert site.settings.patient_is == "case"
        assert (site.settings.role, site.settings.data) == ("training", "private")
        assert site.settings.nominal_patients == round(0.8 * len(rows(site.directory)))
        assert site.settings.split.parts == ("train", "validation")
    assert evaluation.settings.patient_is == "case"
    assert (evaluation.settings.role, evaluation.settings.data) == ("evaluation", "public")
    assert evaluation.settings.split.parts == ("test",)


def test_evaluation_site_is_left_out_when_not_asked_for(tmp_path: Path) -> None:
    source = mnist(archive(tmp_path / "small.npz"), evaluation_site=False)
    sites = prepare_sites(tmp_path / "sites", source=source, num_workers=1)
    assert [site.name for site in sites] == ["site-1", "site-2", "site-3"]


def test_colour_images_are_written_in_colour(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (60, 9, 9, 3), dtype=np.uint8)
    file = archive(
        tmp_path / "small.npz", train_images=colour, val_images=colour[:10], test_images=colour[:12]
    )
    sites = prepare_sites(tmp_path / "sites", source=mnist(file), num_workers=1)
    read = images.read(sites[-1] / rows(sites[-1])[0]["image"]).array
    assert np.array_equal(read, np.moveaxis(colour[0], -1, 0))


def test_changed_file_is_another_source(tmp_path: Path) -> None:
    source = mnist(archive(tmp_path / "small.npz"))
    before = source.parameters()
    archive(tmp_path / "small.npz", test_labels=np.zeros((12, 1), np.uint8))
    assert replace(source).parameters() != before
    moved = mnist(Path(shutil.copy(tmp_path / "small.npz", tmp_path / "copy.npz")))
    assert moved.parameters() == replace(source).parameters()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, "the array val_labels"),
        ({"train_images": np.zeros((60, 9, 9), np.float32)}, "train_images of uint8"),
        ({"train_images": np.zeros((60, 9, 9, 9), np.uint8)}, "images of one shape"),
        ({"train_images": np.zeros((60, 9), np.uint8)}, "two or three axes"),
        ({"train_labels": np.zeros((60, 14), np.uint8)}, "single-label"),
        ({"train_labels": np.zeros((59, 1), np.uint8)}, "single-label"),
        ({"train_labels": np.zeros((60, 1), np.float32)}, "single-label"),
        ({"train_labels": np.full((60, 1), 3, np.uint8)}, "labels from 0 to 2, found 3 to 3"),
        ({"test_images": np.zeros((12, 5, 5), np.uint8)}, "images of one shape"),
        ({"train_labels": np.array([[{}]] * 60, dtype=object)}, "unreadable"),
    ],
)
def test_file_of_another_kind_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        medmnist.read(archive(tmp_path / "small.npz", **changes), num_classes=3)


def test_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none; .* or set data.file"):
        prepare_sites(tmp_path / "sites", source=mnist(tmp_path / "no.npz"))
    file = archive(tmp_path / "small.npz")
    content = file.read_bytes()
    one = io.BytesIO()
    np.save(one, np.zeros(3))
    for broken in (b"", b"no archive", content[: len(content) // 2], one.getvalue()):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="unreadable"):
            medmnist.read(file, num_classes=3)
    assert not (tmp_path / "sites").exists()


def test_any_damaged_byte_gives_an_error_that_a_person_can_read_or_none(tmp_path: Path) -> None:
    file = archive(tmp_path / "small.npz")
    with np.load(file) as arrays:
        np.savez_compressed(file, **dict(arrays))
    content, refused = file.read_bytes(), 0
    positions = range(0, len(content), 23)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        try:
            medmnist.read(file, num_classes=3)
        except DataError:
            refused += 1
    assert refused > len(positions) / 2


def test_source_keeps_the_minimum_of_cases_at_every_site(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], 40)
    for seed in range(10):
        source = mnist(tmp_path / "unused", partition="dirichlet", alpha=0.4, min_cases=25, seed=seed)
        assert min(len(cases) for cases in source.divided(labels)) >= 25


def test_iid_division_takes_every_case_once_in_equal_shares() -> None:
    labels = np.arange(103) % 2
    sites = medmnist.divide_evenly(labels, num_sites=8, rng=np.random.default_rng(0))
    assert sorted(np.concatenate(sites)) == list(range(103))
    assert {len(cases) for cases in sites} == {12, 13}


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution() -> None:
    labels, num_sites, alpha = np.repeat([0, 1], 2000), 5, 0.7
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        sites = medmnist.divide_by_label(labels, num_sites=num_sites, alpha=alpha, min_cases=0, rng=rng)
        assert sum(len(cases) for cases in sites) == 4000
        shares += [np.mean([(labels[cases] == 1).sum() / 2000 for cases in sites[:1]])]
    mean = 1 / num_sites
    assert np.mean(shares) == pytest.approx(mean, abs=0.035)
    assert np.var(shares) == pytest.approx(mean * (1 - mean) / (num_sites * alpha + 1), rel=0.2)


def test_dirichlet_division_takes_every_case_once_and_keeps_the_minimum() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sites = medmnist.divide_by_label(labels, num_sites=6, alpha=0.5, min_cases=40, rng=rng)
        assert sorted(np.concatenate(sites)) == list(range(1000))
        assert min(len(cases) for cases in sites) >= 40


def test_minimum_that_no_draw_reaches_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DataError, match="raise alpha, or lower"):
        medmnist.divide_by_label(
            np.zeros(20, np.int64), num_sites=5, alpha=0.1, min_cases=5, rng=np.random.default_rng(0)
        )


def test_directories_that_exist_are_taken_as_they_are(tmp_path: Path) -> None:
    prepare_sites(tmp_path / "sites", source=phantoms(patients_per_site=2), num_workers=1)
    before = contents(tmp_path / "sites")
    source = DirectorySource(directory=tmp_path / "sites", from_pacs=False)
    sites = prepare_sites(tmp_path / "unused", source=source)
    assert [site.name for site in sites] == ["site-1", "site-2"]
    assert contents(tmp_path / "sites") == before
    assert not (tmp_path / "unused").exists()
    with pytest.raises(DataError, match="feverfew-client init"):
        prepare_sites(tmp_path, source=DirectorySource(directory=tmp_path / "nowhere", from_pacs=False))


def test_record_says_what_made_the_sites(tmp_path: Path) -> None:
    prepare_sites(tmp_path / "sites", source=phantoms(patients_per_site=2), num_workers=1)
    record = json.loads((tmp_path / "sites" / "source.json").read_text())
    assert record["parameters"]["patients_per_site"] == 2
    assert record["parameters"]["source"] == "phantoms"
    canonical = json.dumps(record["parameters"], sort_keys=True, separators=(",", ":"))
    assert record["sha256"] == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.skipif(not PNEUMONIA.exists(), reason="the MedMNIST files are not beside the checkout")
def test_pneumonia_file_is_divided_over_eight_sites() -> None:
    source = mnist(
        PNEUMONIA,
        class_names=("normal", "pneumonia"),
        num_sites=8,
        partition="dirichlet",
        min_cases=100,
        seed=3,
    )
    parts = medmnist.read(PNEUMONIA, num_classes=2)
    labels = np.concatenate([parts["train"].labels, parts["val"].labels])
    sites = source.divided(labels)
    assert (len(labels), len(parts["test"].labels)) == (5232, 624)
    assert sorted(np.concatenate(sites)) == list(range(5232))
    assert min(len(cases) for cases in sites) >= 100


def test_sites_that_are_to_fetch_and_name_no_pacs_are_refused(tmp_path: Path) -> None:
    prepare_sites(tmp_path / "sites", source=phantoms(num_sites=1, patients_per_site=1))
    with pytest.raises(UserError, match="pacs"):
        prepare_sites(tmp_path, source=DirectorySource(directory=tmp_path / "sites", from_pacs=True))
