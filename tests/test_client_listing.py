from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from client import bids, folders, listing
from client.bids import Bids
from client.case import Case, Refused
from client.folders import Folders
from client.table import Table
from common.errors import ConfigError, DataError
from tests.sites import skeleton_cases

FOLDERS: dict[str, Any] = {
    "kind": "folders",
    "directory": "images",
    "classes": {"0_normal": "normal", "1_ill": "ill"},
    "patient": r"^(?P<patient>[^_/]+)_",
    "series": False,
}
BIDS: dict[str, Any] = {
    "kind": "bids",
    "directory": "bids",
    "images": {"t1": "T1w", "t2": "T2w"},
    "label": "diagnosis",
    "classes": {"AD": "ill", "HC": "well"},
    "mask": None,
    "mask_directory": None,
    "values": {"age": "age"},
}


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def in_folders(root: Path, *, patient_is: Any = "column", **changes: Any) -> list[Case | Refused]:
    asked = Folders.model_validate(FOLDERS | changes)
    return list(folders.rows(asked, directory=root, patient_is=patient_is))


def in_bids(root: Path, **changes: Any) -> list[Case | Refused]:
    return list(bids.rows(Bids.model_validate(BIDS | changes), directory=root, patient_is="column"))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    touch(tmp_path, "images/0_normal/P1_a.png", "images/0_normal/P1_b.png", "images/0_normal/.hidden")
    touch(tmp_path, "images/1_ill/deep/P2_a.png", "images/1_ill/noname.png", "images/other/P3_a.png")
    return tmp_path


def test_folder_says_the_class_and_a_pattern_the_patient(classes: Path) -> None:
    found = in_folders(classes, patient=r"(^|/)(?P<patient>[^_/]+)_")
    assert found == [
        Case(images=("images/0_normal/P1_a.png",), patient="P1", labels=("normal",)),
        Case(images=("images/0_normal/P1_b.png",), patient="P1", labels=("normal",)),
        Case(images=("images/1_ill/deep/P2_a.png",), patient="P2", labels=("ill",)),
        Refused(image="images/1_ill/noname.png", code="missing_patient"),
    ]


def test_every_file_is_a_patient_only_when_that_is_said(classes: Path) -> None:
    found = in_folders(classes, patient=None, patient_is="case")
    assert len({one.patient for one in found if isinstance(one, Case)}) == len(found) == 4
    for patient, patient_is in ((None, "column"), (FOLDERS["patient"], "case")):
        with pytest.raises(ConfigError, match="who the patient is"):
            in_folders(classes, patient=patient, patient_is=patient_is)


def test_folder_with_files_is_a_case_where_cases_are_series(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/0_normal/P{n}_x/{m}.dcm" for n in (1, 2) for m in range(3)))
    (tmp_path / "images/1_ill").mkdir()
    found = in_folders(tmp_path, series=True)
    assert [one.image for one in found] == ["images/0_normal/P1_x", "images/0_normal/P2_x"]


def test_class_without_a_folder_and_pattern_without_a_patient_are_errors(classes: Path) -> None:
    with pytest.raises(DataError, match="folder of the class other"):
        in_folders(classes, classes={"absent": "other"})
    for pattern in ("(", "P(.*)"):
        with pytest.raises(ValidationError, match="expected a"):
            in_folders(classes, patient=pattern)


@pytest.fixture
def brains(tmp_path: Path) -> Path:
    root = tmp_path / "bids"
    for session in ("sub-01/ses-1", "sub-01/ses-2", "sub-02"):
        name = session.replace("/", "_")
        touch(root, f"{session}/anat/{name}_T1w.nii.gz", f"{session}/anat/{name}_T2w.nii")
    touch(root, "sub-03/anat/sub-03_T1w.nii.gz")
    touch(root, "sub-04/anat/sub-04_run-1_T1w.nii.gz", "sub-04/anat/sub-04_run-2_T1w.nii.gz")
    touch(root, "derivatives/labels/sub-02/anat/sub-02_dseg.nii.gz")
    (root / "participants.tsv").write_text(
        "participant_id\tage\tdiagnosis\nsub-01\t60\tAD\nsub-02\tn/a\tHC\nsub-03\t1\tAD\n"
    )
    return tmp_path


def test_every_session_of_a_participant_is_a_case_of_one_patient(brains: Path) -> None:
    first, second, third, *refused = in_bids(brains)
    assert isinstance(first, Case) and isinstance(second, Case) and isinstance(third, Case)
    assert first.images == (
        "bids/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "bids/sub-01/ses-1/anat/sub-01_ses-1_T2w.nii",
    )
    assert (first.patient, second.patient, third.patient) == ("sub-01", "sub-01", "sub-02")
    assert (first.labels, third.labels) == (("ill",), ("well",))
    assert (first.values, third.values) == (("60",), ("",))
    assert refused == [
        Refused(image="sub-03", code="missing_image"),
        Refused(image="sub-04", code="several_images"),
    ]


def test_participant_of_whom_the_table_says_nothing_has_no_label(brains: Path) -> None:
    (brains / "bids" / "participants.tsv").write_text("participant_id\tage\tdiagnosis\nsub-01\t60\tother\n")
    found = in_bids(brains)
    assert found[:2] == [Refused(image=f"sub-01/ses-{n}", code="unknown_label") for n in (1, 2)]
    assert isinstance(found[2], Case) and found[2].labels is None and found[2].values == ("",)


def test_mask_is_found_among_the_derivatives(brains: Path) -> None:
    options = {"images": {"t1": "T1w"}, "label": None, "classes": {}, "values": {}}
    found = in_bids(brains, mask="dseg", mask_directory="derivatives/labels", **options)
    masks = {one.patient: one.mask for one in found if isinstance(one, Case)}
    assert masks["sub-02"] == "bids/derivatives/labels/sub-02/anat/sub-02_dseg.nii.gz"
    assert masks["sub-01"] == masks["sub-03"] == ""


def test_bids_settings_that_say_nothing_certain_are_refused(brains: Path) -> None:
    with pytest.raises(ValidationError, match="label or mask"):
        in_bids(brains, label=None)
    with pytest.raises(ValidationError, match="together"):
        in_bids(brains, mask="dseg")
    with pytest.raises(ConfigError, match="participant is the patient"):
        list(bids.rows(Bids.model_validate(BIDS), directory=brains, patient_is="case"))
    with pytest.raises(DataError, match="found none"):
        in_bids(brains, directory="absent")


def test_digest_of_folders_changes_with_the_names_of_files(classes: Path) -> None:
    asked = Folders.model_validate(FOLDERS)
    before = listing.digest(asked, directory=classes)
    assert listing.digest(asked, directory=classes) == before
    touch(classes, "images/1_ill/P9_a.png")
    assert listing.digest(asked, directory=classes) != before


def test_folders_behind_links_are_followed_and_not_round_in_circles(classes: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    touch(elsewhere, "P7_a.png", "deep/P8_a.png")
    (classes / "images/1_ill/more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(classes / "images/1_ill")
    patient = r"(^|/)(?P<patient>[^_/]+)_"
    found = {row.image for row in in_folders(classes, patient=patient) if isinstance(row, Case)}
    assert {"images/1_ill/more/P7_a.png", "images/1_ill/more/deep/P8_a.png"} < found and len(found) == 5
    before = digest_of(classes)
    touch(elsewhere, "P9_a.png")
    assert digest_of(classes) != before


def test_participants_and_sessions_behind_links_are_found(tmp_path: Path) -> None:
    touch(tmp_path, *(f"store/ses-1/anat/sub-1_ses-1_{kind}.nii.gz" for kind in ("T1w", "T2w")))
    touch(tmp_path, "bids/sub-2/ses-1/anat/x")
    (tmp_path / "bids/sub-1").symlink_to(tmp_path / "store")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tdiagnosis\tage\nsub-1\tAD\t70\n")
    (found,) = in_bids(tmp_path)
    assert isinstance(found, Case) and found.patient == "sub-1" and found.labels == ("ill",)
    (tmp_path / "bids/sub-2/ses-1/anat/x").unlink()
    (tmp_path / "bids/sub-2/ses-1/anat").rmdir()
    (tmp_path / "bids/sub-2/ses-1/anat").symlink_to(tmp_path / "store/ses-1/anat")
    assert [row.patient for row in in_bids(tmp_path) if isinstance(row, Case)] == ["sub-1", "sub-2"]


def digest_of(root: Path, **changes: Any) -> str:
    return listing.digest(Folders.model_validate(FOLDERS | changes), directory=root)


def test_changed_mapping_or_participants_is_a_changed_listing(classes: Path) -> None:
    assert digest_of(classes) == digest_of(classes)
    assert digest_of(classes, classes={"0_normal": "ill", "1_ill": "normal"}) != digest_of(classes)
    touch(classes, "bids/sub-1/anat/sub-1_T1w.nii", "cases.csv")
    said = []
    for text in ("AD", "HC"):
        (classes / "bids/participants.tsv").write_text(f"participant_id\tdiagnosis\nsub-1\t{text}\n")
        said.append(listing.digest(Bids.model_validate(BIDS), directory=classes))
    assert said[0] != said[1]
    usual = skeleton_cases("north")
    one, other = (
        listing.digest(Table.model_validate(usual | {"classes": classes_of}), directory=classes)
        for classes_of in ({}, {"0": "normal"})
    )
    assert one != other
