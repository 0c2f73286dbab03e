"""A real PACS for tests: Orthanc with its DICOMweb plugin, on loopback, with its own storage and images."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from pydicom import dcmread

from client.site import Site, open_site
from simulations import anatomy, dicom_file, phantom
from tests.ports import free_port
from tests.scans import dicom
from tests.sites import write_site

PROGRAM = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PLUGINS = [
    path
    for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
    for path in sorted(Path(folder).glob("libOrthancDicomWeb.so*"))
]
needs_orthanc = pytest.mark.skipif(
    PROGRAM is None or not PLUGINS, reason="needs the Debian packages orthanc and orthanc-dicomweb"
)
START_SECONDS = 30
BATCH = 50
BOUNDARY = "feverfew-stow"


class Orthanc:
    """One server; ``start`` again after ``kill`` finds the port and the storage as they were."""

    def __init__(self, directory: Path, *, user: str = "", password: str = "") -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.port = free_port()
        self.auth = (user, password) if user else None
        self.process: subprocess.Popen[bytes] | None = None
        self._write_settings()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def _write_settings(self) -> None:
        settings: dict[str, Any] = {
            "Name": "Feverfew tests",
            "StorageDirectory": str(self.directory / "storage"),
            "IndexDirectory": str(self.directory / "storage"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,  # who is not on this machine is refused
            "AuthenticationEnabled": self.auth is not None,
            "RegisteredUsers": dict([self.auth]) if self.auth else {},
            "MaximumStorageCacheSize": 0,  # what is gone from the disk is gone
            "Plugins": [str(PLUGINS[0])],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
        }
        (self.directory / "orthanc.json").write_text(json.dumps(settings))

    def start(self) -> None:
        """Starts the server and returns when it answers."""
        assert PROGRAM is not None and self.process is None
        with (self.directory / "log").open("ab") as log:
            command = [PROGRAM, str(self.directory / "orthanc.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return client.get("/studies", params={"limit": 1}).is_success
        except httpx.TransportError:
            return False

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, auth=self.auth, timeout=30)

    def kill(self) -> None:
        """Ends the server as a power failure would."""
        self._end(lambda process: process.kill())

    def stop(self) -> None:
        self._end(lambda process: process.terminate())

    def _end(self, how: Any) -> None:
        if self.process is not None:
            how(self.process)
            self.process.wait(timeout=START_SECONDS)
            self.process = None

    def store(self, files: Iterable[bytes]) -> None:
        """Stores DICOM files over STOW-RS."""
        every = list(files)
        with self.client() as client:
            for start in range(0, len(every), BATCH):
                answer = client.post(
                    "/studies", content=_multipart(every[start : start + BATCH]), headers=STOW
                )
                answer.raise_for_status()
                assert "00081198" not in answer.json() or not answer.json()["00081198"].get("Value")

    def forget(self, content: bytes) -> Path:
        """Removes a file from the disk of the server, which goes on listing it; returns where it was."""
        found = [path for path in (self.directory / "storage").rglob("*") if _holds(path, content)]
        assert len(found) == 1
        found[0].unlink()
        return found[0]

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")


STOW = {
    "Content-Type": f'multipart/related; type="application/dicom"; boundary={BOUNDARY}',
    "Accept": "application/dicom+json",
}


def _multipart(files: Iterable[bytes]) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    return b"".join(head + content + b"\r\n" for content in files) + f"--{BOUNDARY}--\r\n".encode()


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


@contextmanager
def running(directory: Path, **options: Any) -> Iterator[Orthanc]:
    """A server for as long as the block lasts."""
    server = Orthanc(directory, **options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def scan(patient: int, *, slices: int = 3, **tags: Any) -> list[bytes]:
    """Returns the files of a small CT series of a study of its own, with a name in them."""
    study = f"1.2.826.0.1.3680043.10.1.{patient}"
    described = {
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.1",
        "PatientID": f"P{patient}",
        "AccessionNumber": f"A{patient}",
        "Modality": "CT",
        "StudyDate": "20240101",
        "StudyDescription": "CT Thorax",
        "SeriesDescription": "axial",
        "BodyPartExamined": "CHEST",
    } | tags
    rng = np.random.default_rng(patient)
    return [
        dicom(
            rng.integers(0, 4096, (16, 12)).astype(np.uint16),
            SOPInstanceUID=f"{described['SeriesInstanceUID']}.{number}",
            InstanceNumber=number,
            **described,
        )
        for number in range(1, slices + 1)
    ]


@dataclass(frozen=True, kw_only=True)
class Radiograph:
    """What a hospital's table would say of one."""

    accession: str
    patient: str
    label: str


def radiographs(directory: Path, *, num_patients: int, image_size: int = 64) -> list[Radiograph]:
    """Writes a phantom radiograph of each patient as a DICOM file, every second one with an opacity."""
    rng = np.random.default_rng(0)
    scanner = phantom.random_scanner(rng, index=0, image_size=image_size)
    directory.mkdir(parents=True)
    written = []
    for number in range(num_patients):
        patient, path = f"R{number:04d}", directory / f"{number:04d}.dcm"
        body = anatomy.random_anatomy(rng, diseased=number % 2 == 1, difficulty=anatomy.Difficulty())
        pixels = phantom.draw(body, scanner, rng)
        dicom_file.write(path, pixels, scanner=scanner, patient_id=patient, study=patient, instance=1)
        accession = str(dcmread(path, stop_before_pixels=True).AccessionNumber)
        written.append(
            Radiograph(accession=accession, patient=patient, label=phantom.CLASS_NAMES[number % 2])
        )
    return written


EVERYTHING = {
    "modalities": [],
    "body_part": None,
    "study_description": None,
    "series_description": None,
    "date_from": None,
    "date_to": None,
}


def site_of(directory: Path, url: str, *, query: dict[str, Any] | None = None, **changes: Any) -> Site:
    """Writes a site that fetches from a PACS, in a hurry and with little patience."""
    pacs = {
        "url": url,
        "query": EVERYTHING | (query or {}),
        "authentication": {"kind": "none"},
        "ca_certificate": None,
        "unsafe_allow_plain_http": False,
        "max_requests_per_second": 1000,
        "connections": 2,
        "timeout_seconds": 10,
        "patience_seconds": 20,
    }
    name = changes.pop("name", "north")
    return write_site(directory, name=name, num_patients=1, pacs=pacs | changes)


def changed(site: Site, **changes: Any) -> Site:
    """Returns the site with other settings of its PACS."""
    path = site.directory / "site.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["pacs"] |= changes
    path.write_text(yaml.safe_dump(tree))
    return open_site(site.directory)
