"""The PACS, or the fetch from it, is killed in the middle; what came is trained on in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from client import check, fetch, pacs
from client.site import Site, open_site
from common.errors import DeploymentError
from server.report import Report
from tests import plans
from tests.orthanc import Orthanc, Radiograph, changed, needs_orthanc, radiographs, running, site_of
from tests.test_client_pacs import SCANS, command, fetched_files, is_all_there, when_fetched

pytestmark = needs_orthanc


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Orthanc]:
    """A server of one test, which may be killed."""
    with running(tmp_path / "orthanc") as server:
        server.store(SCANS)
        yield server


def test_server_that_is_killed_and_restarted_in_the_middle_is_survived(own: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", own.url, max_requests_per_second=100)
    begun = time.monotonic()
    outcome = fetch.fetch(site, on_progress=when_fetched(8, partial(restarted, own)))
    assert time.monotonic() - begun > 1, "it is away for a second, and nothing can come meanwhile"
    assert (outcome.fetched, outcome.not_given) == (21, {})
    assert is_all_there(site)
    assert all(one.is_complete for one in pacs.index(site))


def test_server_that_stays_away_is_told_and_the_rest_is_fetched_later(own: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", own.url, patience_seconds=1, max_requests_per_second=100)
    with pytest.raises(DeploymentError, match="none for 1 s; .* goes on where it stopped"):
        fetch.fetch(site, on_progress=when_fetched(8, own.kill))
    num_there = len(fetched_files(site))
    assert 8 <= num_there < 21
    assert sum(one.num_instances for one in pacs.index(site)) == num_there
    assert sum(one.is_complete for one in pacs.index(site)) == sum(
        len(list((site.directory / one.directory).glob("*.dcm"))) == 3 for one in pacs.index(site)
    )
    own.start()
    outcome = fetch.fetch(site)
    assert (outcome.there, outcome.fetched) == (num_there, 21 - num_there)
    assert is_all_there(site)


@pytest.mark.slow
def test_fetch_that_is_killed_leaves_whole_files_and_goes_on(own: Orthanc, tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", own.url, max_requests_per_second=20)
    process = subprocess.Popen(command(site))
    while len(fetched_files(site)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.read_bytes() for path in fetched_files(site)}
    assert 3 <= len(there) < 21 and there < set(SCANS)
    assert sum(one.num_instances for one in pacs.index(site)) == len(there)
    outcome = fetch.fetch(changed(site, max_requests_per_second=1000))
    assert (outcome.there, outcome.fetched) == (len(there), 21 - len(there))
    assert is_all_there(site)
    assert not [path for path in (site.private / "pacs").rglob("*") if path.name.endswith(".part")]


def test_image_that_the_server_lost_is_counted_and_the_others_come(own: Orthanc, tmp_path: Path) -> None:
    lost = own.forget(SCANS[4])
    site = site_of(tmp_path / "north", own.url)
    outcome = fetch.fetch(site)
    assert (outcome.fetched, sum(outcome.not_given.values()), outcome.is_whole) == (20, 1, False)
    (lacking,) = [one for one in pacs.index(site) if not one.is_complete]
    assert (lacking.patient, lacking.num_instances, lacking.num_expected) == ("P1", 2, 3)
    assert lacking.not_given == {f"{lacking.series} at 1": "server_error"}
    lost.write_bytes(SCANS[4])
    outcome = fetch.fetch(site)
    assert (outcome.there, outcome.fetched, outcome.is_whole) == (20, 1, True)
    assert is_all_there(site) and all(one.is_complete and not one.not_given for one in pacs.index(site))


def of_the_pacs(site: Site, rows: list[Radiograph]) -> None:
    """Makes a table with accession numbers what the site lists its cases by."""
    path = site.directory / "site.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["cases"]["images"] = {"image": "accession"}
    tree["cases"]["pacs"] = {"by": "accession", "series": {"image": "*"}, "case": "instance"}
    path.write_text(yaml.safe_dump(tree | {"nominal_patients": 20}))
    lines = ["accession,label,patient_id", *(f"{row.accession},{row.label},{row.patient}" for row in rows)]
    (site.directory / "cases.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_images_of_a_pacs_that_was_killed_are_joined_with_labels_and_trained_on(
    own: Orthanc, tmp_path: Path
) -> None:
    rows = radiographs(tmp_path / "radiographs", num_patients=60)
    own.store(path.read_bytes() for path in sorted((tmp_path / "radiographs").iterdir()))
    foreign = Radiograph(accession="0815", patient="R9999", label="normal")
    query = {"modalities": ["DX", "CR"], "study_description": "chest*"}
    names = ("north", "south")
    for number, name in enumerate(names):
        site = site_of(
            tmp_path / "sites" / name, own.url, query=query, name=name, max_requests_per_second=200
        )
        outcome = fetch.fetch(site, on_progress=when_fetched(20, partial(restarted, own)))
        assert (outcome.fetched, outcome.not_given) == (60, {})
        of_the_pacs(site, [*rows[number::2], foreign])
    checked = check.check(open_site(tmp_path / "sites" / "north"), asked=plans.asked())
    assert (checked.offered, checked.used, checked.quarantined) == (31, 30, {"not_in_pacs": 1})
    told = subprocess.run(
        [*SIMULATE, f"data.directory={tmp_path / 'sites'}", f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    report = Report.read(tmp_path / "run")
    assert report.status == "completed"
    for name in names:
        part = report.participation[name]
        assert (part.rounds_valid, part.offered, part.used) == (2, 31, 30)


SIMULATE = [
    str(Path(sys.executable).with_name("feverfew-simulate")),
    "preprocessing=grey28",
    "privacy=none",
    "plan.rounds=2",
    "plan.sites=2",
    "training.local_steps=1",
    "engine.workers=1",
    "data=directory",
    "data.classes=[normal,opacity]",
    "state=keep",
]


def restarted(server: Orthanc) -> None:
    """Kills a server, and starts it again a second later."""
    server.kill()
    threading.Timer(1.0, server.start).start()


@pytest.mark.slow
def test_simulation_fetches_from_the_pacs_itself_and_trains(own: Orthanc, tmp_path: Path) -> None:
    rows = radiographs(tmp_path / "radiographs", num_patients=40)
    own.store(path.read_bytes() for path in sorted((tmp_path / "radiographs").iterdir()))
    query = {"modalities": ["DX", "CR"], "study_description": "chest*"}
    for number, name in enumerate(("north", "south")):
        of_the_pacs(site_of(tmp_path / "sites" / name, own.url, query=query, name=name), rows[number::2])
    command = [*SIMULATE, f"data.directory={tmp_path / 'sites'}", f"hydra.run.dir={tmp_path / 'run'}"]
    command[command.index("data=directory")] = "data=dicomweb"
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    participation = Report.read(tmp_path / "run").participation
    assert [(one.rounds_valid, one.used) for one in participation.values()] == [(2, 20)] * 2
