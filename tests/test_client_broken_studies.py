"""A site of 2,000 studies of which 60 are broken in twelve ways, beside one that never had the 60."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG4HP41

from simulations.hospitals import PhantomSource, prepare_sites

NUM_STUDIES, NUM_BROKEN = 2000, 60
COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))


def header(**changes: Any) -> Callable[[bytes], bytes]:
    """Returns what changes tags of a DICOM file."""

    def changed(content: bytes) -> bytes:
        dataset = pydicom.dcmread(BytesIO(content))
        dataset.update(changes)
        written = BytesIO()
        dataset.save_as(written)
        return written.getvalue()

    return changed


def without_pixels(content: bytes) -> bytes:
    dataset = pydicom.dcmread(BytesIO(content))
    del dataset.PixelData
    written = BytesIO()
    dataset.save_as(written)
    return written.getvalue()


def of_one_value(content: bytes) -> bytes:
    dataset = pydicom.dcmread(BytesIO(content))
    return header(PixelData=b"\1\0" * (dataset.Rows * dataset.Columns))(content)


def as_film(content: bytes) -> bytes:
    dataset = pydicom.dcmread(BytesIO(content))
    dataset.file_meta.TransferSyntaxUID = MPEG4HP41
    dataset.PixelData = encapsulate([b"\0" * 64])
    written = BytesIO()
    pydicom.dcmwrite(written, dataset, implicit_vr=False, little_endian=True, enforce_file_format=False)
    return written.getvalue()


def as_cine(content: bytes) -> bytes:
    dataset = pydicom.dcmread(BytesIO(content))
    return header(NumberOfFrames=3, PixelData=3 * dataset.PixelData)(content)


WAYS: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "file gone": ("missing_file", None),
    "file empty": ("empty_file", lambda content: b""),
    "file cut off": ("truncated", lambda content: content[: len(content) * 2 // 3]),
    "another file": ("unknown_format", lambda content: b"<html>404</html>"),
    "header without an image": ("no_pixel_data", without_pixels),
    "one value": ("constant", of_one_value),
    "more rows than pixels": ("truncated", header(Rows=4000)),
    "a film": ("unsupported_transfer_syntax", as_film),
    "several frames": ("multi_frame", as_cine),
    "rescale by zero": ("bad_rescale", header(RescaleSlope=0, RescaleIntercept=0)),
    "window of no width": ("bad_window", header(WindowCenter=100, WindowWidth=0)),
    "another kind of colours": ("unsupported_photometric", header(PhotometricInterpretation="HSV")),
}


def rows_of(site: Path) -> list[dict[str, str]]:
    with (site / "cases.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def write_rows(site: Path, rows: list[dict[str, str]]) -> None:
    with (site / "cases.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def break_studies(site: Path) -> tuple[set[str], Counter[str]]:
    """Breaks every study of 60 patients; returns the patients, and the number of images by code."""
    rows = rows_of(site)
    patients = sorted({row["patient_id"] for row in rows})
    chosen = patients[:: len(patients) // NUM_BROKEN][:NUM_BROKEN]
    ways = list(WAYS.values())
    expected: Counter[str] = Counter()
    for row in rows:
        if row["patient_id"] in chosen:
            code, broken = ways[chosen.index(row["patient_id"]) % len(ways)]
            path = site / row["image"]
            path.unlink() if broken is None else path.write_bytes(broken(path.read_bytes()))
            expected[code] += 1
    return set(chosen), expected


def simulate(place: Path) -> dict[str, Any]:
    options = [
        *("data=directory", "data.directory=sites", "data.classes=[normal,opacity]", "state=keep"),
        *("plan.sites=1", "plan.quorum=1", "plan.rounds=2", "plan.randomness=seeded", "engine.workers=1"),
        *("preprocessing=grey28", "training.expected_batch=100", "hydra.run.dir=run"),
    ]
    done = subprocess.run([COMMAND, *options], cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((place / "run" / "report.json").read_text())
    return report


def site_report(site: Path) -> dict[str, Any]:
    """Returns what the hospital itself is told of its only run."""
    (run,) = [path.name for path in (site / "private" / "runs").iterdir() if path.is_dir()]
    command = [str(Path(COMMAND).with_name("feverfew-client")), "used", str(site), "--run", run, "--json"]
    (told,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return dict(told)


@pytest.mark.slow
def test_site_with_sixty_broken_studies_trains_the_model_of_one_that_never_had_them(tmp_path: Path) -> None:
    source = PhantomSource(
        num_sites=1,
        patients_per_site=NUM_STUDIES,
        seed=0,
        image_size=32,
        marker_effect=None,
        marker_missing_fraction=0.0,
        max_epsilon=10.0,
        delta=1e-4,
    )
    (whole,) = prepare_sites(tmp_path / "broken" / "sites", source=source)
    clean = tmp_path / "clean" / "sites" / whole.name
    shutil.copytree(whole, clean)
    broken, expected = break_studies(whole)
    assert len(broken) == NUM_BROKEN and len(set(WAYS)) == 12
    kept = [row for row in rows_of(clean) if row["patient_id"] not in broken]
    write_rows(clean, kept)
    with_broken, without = simulate(tmp_path / "broken"), simulate(tmp_path / "clean")
    told, of_clean = site_report(whole), site_report(clean)
    assert told["quarantined"] == expected and of_clean["quarantined"] == {}
    assert told["offered"] == told["used"] + expected.total() == len(rows_of(whole))
    assert told["used"] == len(kept) == of_clean["used"] == of_clean["offered"]
    harness = with_broken["participation"][whole.name]
    assert (harness["offered"], harness["used"], harness["reasons"]) == tuple(
        told[name] for name in ("offered", "used", "quarantined")
    )
    assert without["participation"][clean.name]["used"] == len(kept)
    with (whole / "private" / "quarantine.csv").open(newline="") as stream:
        assert Counter(row["code"] for row in csv.DictReader(stream)) == expected
    model, other = (tmp_path / name / "run" / "model.safetensors" for name in ("broken", "clean"))
    assert model.read_bytes() == other.read_bytes()
