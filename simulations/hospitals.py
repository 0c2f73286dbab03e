"""Writes site directories: phantoms as DICOM files, or a MedMNIST file divided over sites.

A simulated hospital is a directory in exactly the layout of a real one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from common import keys
from common.errors import DataError
from simulations import anatomy, medmnist, phantom

# Changes with every change of what is written here, so that older sites are remade.
VERSION = 1

RECORD = "source.json"
EVALUATION_SITE = "official-test"
SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2}
# Probabilities of one, two, three and four images of a phantom patient.
NUM_IMAGES_PROBS = (0.5, 0.3, 0.15, 0.05)
# The largest site has 1.4 times, the smallest 0.6 times as many patients as the average.
SIZE_SPREAD = 0.4
PREVALENCE = (0.35, 0.60)


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """A row of ``cases.csv``; ``image`` is relative to the site directory."""

    image: str
    label: str
    patient_id: str


@dataclass(frozen=True, kw_only=True)
class PhantomSource:
    """Hospitals with synthetic chest radiographs, each with a scanner of its own.

    Sites differ in size, ``patients_per_site`` on average, and in prevalence. ``image_size`` is what rows and
    columns of an image are near to; every scanner has its own pixel size.
    """

    num_sites: int
    patients_per_site: int
    seed: int
    image_size: int
    max_epsilon: float
    delta: float

    def names(self) -> list[str]:
        """Returns the names of the sites, in order."""
        return _numbered(self.num_sites)

    def parameters(self) -> dict[str, object]:
        """Returns all that decides what is written."""
        return {"source": "phantoms", "versions": [VERSION, phantom.VERSION], **asdict(self)}

    def write(self, directory: Path, *, name: str) -> None:
        """Writes one site."""
        index = self.names().index(name)
        rng = np.random.default_rng([self.seed, index])
        scanner = phantom.random_scanner(rng, index=index, image_size=self.image_size)
        prevalence = rng.uniform(*PREVALENCE)
        num_patients = self.num_patients(index)
        (directory / "images").mkdir(parents=True)
        rows = [
            row
            for number in range(num_patients)
            for row in _write_phantom(
                directory,
                patient_id=f"{index + 1:02d}{number:05d}",
                prevalence=prevalence,
                scanner=scanner,
                rng=np.random.default_rng([self.seed, index, number]),
                study=f"{self.seed}.{index}.{number}",
            )
        ]
        settings = _settings(
            name=name, num_patients=num_patients, max_epsilon=self.max_epsilon, delta=self.delta
        )
        write_site(directory, settings=settings, rows=rows, split_key=_split_key(self.seed, name))

    def num_patients(self, index: int) -> int:
        """Returns the number of patients of a site: the first is the largest, the last the smallest."""
        place = 0.5 if self.num_sites == 1 else index / (self.num_sites - 1)
        return max(1, round(self.patients_per_site * (1 + SIZE_SPREAD * (1 - 2 * place))))


@dataclass(frozen=True, kw_only=True)
class MedMnistSource:
    """A MedMNIST file divided over training sites; each image is its own patient, and ``site.yaml`` says so.

    The file's train and val parts together are divided; each site makes its own parts of what it gets. Its
    official test part is in no training site. With ``evaluation_site`` it is a site of its own, of public data.
    """

    file: Path
    class_names: tuple[str, ...]
    num_sites: int
    partition: Literal["iid", "dirichlet"]
    alpha: float
    min_cases: int
    evaluation_site: bool
    train_fraction: float
    validation_fraction: float
    seed: int
    max_epsilon: float
    delta: float

    def names(self) -> list[str]:
        """Returns the names of the sites, in order; the evaluation site is the last."""
        return _numbered(self.num_sites) + [EVALUATION_SITE] * self.evaluation_site

    def parameters(self) -> dict[str, object]:
        """Returns all that decides what is written; the file counts by its content.

        Raises:
            DataError: there is no such file, or it cannot be used.
        """
        _ = self._parts
        content = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return {"source": "medmnist", "version": VERSION, **asdict(self), "file": content}

    def write(self, directory: Path, *, name: str) -> None:
        """Writes one site."""
        is_training = name != EVALUATION_SITE
        cases = self._training_cases(self.names().index(name)) if is_training else self._parts["test"]
        rows = _write_rasters(directory, cases, class_names=self.class_names)
        settings = _settings(
            name=name, num_patients=len(rows), max_epsilon=self.max_epsilon, delta=self.delta
        ) | {"patient_is": "case"}
        settings |= self._split_settings(len(rows)) if is_training else _EVALUATION
        write_site(directory, settings=settings, rows=rows, split_key=_split_key(self.seed, name))

    def _split_settings(self, num_cases: int) -> dict[str, object]:
        test_fraction = round(1 - self.train_fraction - self.validation_fraction, 9)
        return {
            "nominal_patients": max(1, round(num_cases * self.train_fraction)),
            "split": {
                "train": self.train_fraction,
                "validation": self.validation_fraction,
                "test": test_fraction,
            },
        }

    @cached_property
    def _parts(self) -> dict[str, medmnist.Part]:
        return medmnist.read(self.file, num_classes=len(self.class_names))

    def _training_cases(self, index: int) -> medmnist.Part:
        parts = [self._parts["train"], self._parts["val"]]
        images = np.concatenate([part.images for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        chosen = self.divided(labels)[index]
        return medmnist.Part(images=images[chosen], labels=labels[chosen])

    def divided(self, labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Returns the cases of each training site.

        Raises:
            DataError: the smallest site would be too small.
        """
        rng = np.random.default_rng(self.seed)
        if self.partition == "iid":
            return medmnist.divide_evenly(labels, num_sites=self.num_sites, rng=rng)
        return medmnist.divide_by_label(
            labels, num_sites=self.num_sites, alpha=self.alpha, min_cases=self.min_cases, rng=rng
        )


@dataclass(frozen=True, kw_only=True)
class DirectorySource:
    """Site directories that exist already; nothing is written into them here."""

    directory: Path

    def sites(self) -> list[Path]:
        """Returns the site directories by name.

        Raises:
            DataError: there are none.
        """
        sites = sorted(path.parent for path in self.directory.glob("*/site.yaml"))
        if not sites:
            raise DataError(
                f"Expected folders with a site.yaml in {self.directory}, found none; make one for each site "
                "with feverfew-client init."
            )
        return sites


Source = PhantomSource | MedMnistSource | DirectorySource


def prepare_sites(directory: Path, *, source: Source, num_workers: int | None = None) -> list[Path]:
    """Returns the site directories of a source, writing them into ``directory`` where they are not there yet.

    What an equal source wrote before is used again; what another source wrote is replaced as a whole. A
    half-written set is never seen, whenever the process ends.

    Args:
        directory: the folder of the sites; a ``DirectorySource`` has its own.
        source: where sites come from.
        num_workers: processes that write; by default one for each processor. The result does not depend on it.

    Raises:
        DataError: ``directory`` holds something that no source wrote, or the source cannot be used.
    """
    if isinstance(source, DirectorySource):
        return source.sites()
    directory = directory.absolute()
    record = _record(source)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if not _is_made(directory, record=record, names=source.names()):
            _make(directory, source=source, record=record, num_workers=num_workers)
    return [directory / name for name in source.names()]


def write_site(
    directory: Path, *, settings: Mapping[str, object], rows: Iterable[CaseRow], split_key: bytes
) -> None:
    """Writes what makes a directory of images a site: settings, case table and the key of its split.

    Args:
        directory: the site; may exist already, with its images.
        settings: the keys of ``site.yaml``.
        rows: the case table.
        split_key: 32 bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    (directory / "site.yaml").write_text(text, encoding="utf-8")
    with (directory / "cases.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "label", "patient_id"))
        writer.writerows((row.image, row.label, row.patient_id) for row in rows)
    (directory / "private").mkdir(mode=0o700)
    keys.write_secret(directory / "private" / "split.key", split_key.hex().encode("ascii"))


def _record(source: PhantomSource | MedMnistSource) -> dict[str, Any]:
    """What ``source.json`` says: the parameters, and the hash by which they are compared."""
    parameters = json.loads(json.dumps(source.parameters(), default=str))
    canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
    return {"sha256": hashlib.sha256(canonical.encode()).hexdigest(), "parameters": parameters}


def _is_made(directory: Path, *, record: Mapping[str, Any], names: list[str]) -> bool:
    if not directory.exists() or not any(directory.iterdir()):
        return False
    path = directory / RECORD
    if not path.is_file():
        raise DataError(
            f"Expected {directory} to be new or to hold simulated sites, found other files; nothing was changed, "
            "choose another sites_directory."
        )
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    complete = all((directory / name / "site.yaml").is_file() for name in names)
    return complete and isinstance(known, dict) and known.get("sha256") == record["sha256"]


def _make(
    directory: Path,
    *,
    source: PhantomSource | MedMnistSource,
    record: Mapping[str, Any],
    num_workers: int | None,
) -> None:
    """Writes all sites beside ``directory`` and renames; leftovers of a process that was killed are removed."""
    prefix = f".{directory.name}.making-"
    for leftover in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    making = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        _write_all(making, source=source, num_workers=num_workers)
        (making / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        old = directory.parent / f"{prefix}old"
        if directory.exists():
            directory.rename(old)
        making.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _write_all(directory: Path, *, source: PhantomSource | MedMnistSource, num_workers: int | None) -> None:
    names = source.names()
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(names))
    write = partial(_write_one, directory, source)
    if num_workers == 1:
        for name in names:
            write(name)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, names))


def _write_one(directory: Path, source: PhantomSource | MedMnistSource, name: str) -> None:
    source.write(directory / name, name=name)


def _numbered(num_sites: int) -> list[str]:
    width = len(str(num_sites))
    return [f"site-{number:0{width}d}" for number in range(1, num_sites + 1)]


def _split_key(seed: int, name: str) -> bytes:
    """A simulated site's secret follows from the seed, so that its split can be repeated."""
    return hashlib.sha256(f"feverfew simulated split {seed} {name}".encode()).digest()


_EVALUATION: dict[str, object] = {
    "role": "evaluation",
    "data": "public",
    "split": {"train": 0.0, "validation": 0.0, "test": 1.0},
}


def _settings(*, name: str, num_patients: int, max_epsilon: float, delta: float) -> dict[str, object]:
    return {
        "name": name,
        "role": "training",
        "data": "private",
        "nominal_patients": max(1, round(num_patients * SPLIT["train"])),
        "patient_is": "column",
        "split": dict(SPLIT),
        "max_epsilon": max_epsilon,
        "delta": delta,
        "unsafe_allow_seeded_noise": True,
        "approve": "all",
        "max_repeats": 2,
        "threads": 1,
    }


def _write_phantom(
    directory: Path,
    *,
    patient_id: str,
    prevalence: float,
    scanner: phantom.Scanner,
    rng: np.random.Generator,
    study: str,
) -> list[CaseRow]:
    """Writes the images of one patient, all of one study."""
    diseased = bool(rng.random() < prevalence)
    patient = anatomy.random_anatomy(rng, diseased=diseased, difficulty=anatomy.Difficulty())
    num_images = 1 + int(rng.choice(len(NUM_IMAGES_PROBS), p=NUM_IMAGES_PROBS))
    rows = []
    for instance in range(1, num_images + 1):
        image = f"images/{patient_id}-{instance}.dcm"
        phantom.write_dicom(
            directory / image,
            phantom.draw(patient, scanner, rng),
            scanner=scanner,
            patient_id=patient_id,
            study=study,
            instance=instance,
        )
        rows.append(CaseRow(image=image, label=phantom.CLASS_NAMES[diseased], patient_id=patient_id))
    return rows


def _write_rasters(directory: Path, cases: medmnist.Part, *, class_names: tuple[str, ...]) -> list[CaseRow]:
    """Writes every case as a PNG file."""
    (directory / "images").mkdir(parents=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(cases.images, cases.labels, strict=True)):
        image = f"images/{number:06d}.png"
        Image.fromarray(pixels).save(directory / image)
        rows.append(CaseRow(image=image, label=class_names[label], patient_id=f"{number:06d}"))
    return rows
