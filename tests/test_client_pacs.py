"""Images come from a real PACS, whatever happens to it meanwhile; skipped where Orthanc is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import fetch, pacs
from client.dicomweb import open_archive
from client.enquiry import STUDY
from client.site import Site
from common.errors import StateError, UserError
from tests.orthanc import Orthanc, needs_orthanc, running, scan, site_of

pytestmark = needs_orthanc
NUM_STUDIES = 7
SCANS = [content for patient in range(NUM_STUDIES) for content in scan(patient)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A server with seven studies of three slices, which tests only read."""
    with running(tmp_path_factory.mktemp("pacs") / "orthanc") as server:
        server.store(SCANS)
        yield server


def fetched_files(site: Site) -> list[Path]:
    return sorted((site.private / "pacs").rglob("*.dcm"))


def is_all_there(site: Site) -> bool:
    return sorted(path.read_bytes() for path in fetched_files(site)) == sorted(SCANS)


def test_what_was_stored_is_fetched_byte_by_byte(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    outcome = fetch.fetch(site)
    assert (outcome.studies, outcome.series, outcome.instances) == (7, 7, 21)
    assert (outcome.there, outcome.fetched, outcome.not_given, outcome.untold) == (0, 21, {}, {})
    assert outcome.fetched_bytes == sum(map(len, SCANS))
    assert is_all_there(site)


def test_index_joins_by_accession_patient_and_study(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    assert pacs.index(site) == []
    fetch.fetch(site)
    assert [(one.accession, one.patient) for one in pacs.index(site)] == [
        (f"A{n}", f"P{n}") for n in range(7)
    ]
    for one in pacs.index(site):
        assert one.is_complete and one.num_instances == one.num_expected == 3
        assert (one.modality, one.description) == ("CT", "axial")
        files = (site.directory / one.directory).iterdir()
        assert {path.read_bytes() for path in files} == set(scan(int(one.patient[1:])))
        assert one.series == f"{one.study}.1"


def test_what_is_there_is_not_fetched_again(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    fetch.fetch(site)
    stamps = {path: path.stat().st_ino for path in fetched_files(site)}
    lost = fetched_files(site)[4]
    lost.unlink()
    outcome = fetch.fetch(site)
    assert (outcome.there, outcome.fetched) == (20, 1)
    assert lost.exists() and is_all_there(site)
    assert all(path.stat().st_ino == stamps[path] for path in stamps if path != lost)


def when_fetched(number: int, action: Callable[[], None]) -> fetch.OnProgress:
    """Returns an ``on_progress`` that acts once, when so many images were fetched."""
    done = []

    def told(phase: fetch.Phase, count: int, total: int) -> None:
        if phase == "fetching" and count >= number and not done:
            done.append(count)
            action()

    return told


def command(site: Site, *flags: str) -> list[str]:
    return [sys.executable, "-m", "client", "fetch", str(site.directory), *flags]


def test_one_fetch_runs_at_a_time(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    refused = []

    def again() -> None:
        with pytest.raises(UserError, match="one fetch at a time") as caught:
            fetch.fetch(site)
        refused.append(caught.value)

    fetch.fetch(site, on_progress=when_fetched(1, again))
    assert refused


@pytest.fixture(scope="module")
def various(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A server with one series of each kind; the patient's number says which."""
    with running(tmp_path_factory.mktemp("various") / "orthanc") as server:
        server.store(scan(1))
        server.store(scan(2, Modality="MR", StudyDescription="MR Kopf", BodyPartExamined="HEAD"))
        server.store(scan(3, StudyDate="20250615", SeriesDescription="Scout"))
        server.store(scan(4, BodyPartExamined=None, StudyDate="20230102"))
        second = f"{scan_uid(1)}.2"
        server.store(scan(1, SeriesInstanceUID=second, SeriesDescription="Dose Report", Modality="SR"))
        yield server


def scan_uid(patient: int) -> str:
    return f"1.2.826.0.1.3680043.10.1.{patient}"


@pytest.mark.parametrize(
    ("query", "expected", "untold"),
    [
        ({}, ["P1 CT", "P1 SR", "P2 MR", "P3 CT", "P4 CT"], {}),
        ({"modalities": ["CT"]}, ["P1 CT", "P3 CT", "P4 CT"], {}),
        ({"modalities": ["MR", "SR"]}, ["P1 SR", "P2 MR"], {}),
        ({"body_part": "chest"}, ["P1 CT", "P1 SR", "P3 CT"], {"body_part": 1}),
        ({"body_part": "CHEST", "modalities": ["MR"]}, [], {}),
        ({"study_description": "*thorax*"}, ["P1 CT", "P1 SR", "P3 CT", "P4 CT"], {}),
        ({"study_description": "thorax"}, [], {}),
        ({"series_description": "a?ial"}, ["P1 CT", "P2 MR", "P4 CT"], {}),
        ({"date_from": "2024-01-01"}, ["P1 CT", "P1 SR", "P2 MR", "P3 CT"], {}),
        ({"date_to": "2024-01-01"}, ["P1 CT", "P1 SR", "P2 MR", "P4 CT"], {}),
        ({"date_from": "2023-01-02", "date_to": "2023-01-02"}, ["P4 CT"], {}),
    ],
)
def test_query_means_what_it_says(
    various: Orthanc, tmp_path: Path, query: dict[str, Any], expected: list[str], untold: dict[str, int]
) -> None:
    site = site_of(tmp_path / "north", various.url, query=query)
    looked = fetch.look(site)
    assert not (site.private / "pacs").exists()
    outcome = fetch.fetch(site)
    assert sorted(f"{one.patient} {one.modality}" for one in pacs.index(site)) == expected
    assert (looked.studies, looked.series, looked.instances) == (
        outcome.studies,
        outcome.series,
        outcome.instances,
    )
    assert outcome.series == len(expected) and outcome.instances == 3 * len(expected)
    assert outcome.untold == looked.untold == untold


@pytest.mark.parametrize("page", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("match", [{}, {"StudyDate": "20240101-"}, {"ModalitiesInStudy": "CT"}])
def test_pages_lose_nothing(archive: Orthanc, tmp_path: Path, page: int, match: dict[str, str]) -> None:
    """Orthanc 1.10 with ModalitiesInStudy loses what lies behind the first page; see ``Archive.search``."""
    site = site_of(tmp_path / "north", archive.url)
    assert site.settings.pacs is not None
    with open_archive(site.settings.pacs, directory=site.directory) as asked:
        assert len(asked.search("/studies", key=STUDY, match=match, page=page)) == NUM_STUDIES


@pytest.mark.slow
def test_command_lists_and_fetches_for_scripts(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    looked = subprocess.run(command(site, "--list", "--json"), capture_output=True, check=True)
    assert json.loads(looked.stdout)["instances"] == 21 and fetched_files(site) == []
    told = subprocess.run(command(site), capture_output=True, check=True, text=True)
    assert "7 studies, 7 series, 21 images" in told.stdout and "21 fetched" in told.stdout


def test_what_was_fetched_is_for_the_site_alone(
    archive: Orthanc, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)
    try:
        site = site_of(tmp_path / "north", archive.url)
        assert fetch.report(site) == 0
    finally:
        os.umask(before)
    for path in [site.private / "pacs", *(site.private / "pacs").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    said = caplog.text + "".join(capfd.readouterr())
    for secret in ("Planted", "P3", "A3", scan_uid(3), "axial"):
        assert secret not in said
    index = (site.private / "pacs" / "index.jsonl").read_text()
    assert "Planted" not in index and "P3" in index


def test_damaged_index_is_told_and_costs_nothing(archive: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", archive.url)
    fetch.fetch(site)
    path = site.private / "pacs" / "index.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(StateError, match="remove it"):
        pacs.index(site)
    path.unlink()
    assert fetch.fetch(site).fetched == 0
    assert path.read_text() == whole
