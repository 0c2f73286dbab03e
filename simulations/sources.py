"""Where simulated sites come from: phantoms, a MedMNIST file, a folder of cases, or sites that exist."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.case import Case
from common.errors import DataError
from simulations import anatomy, medmnist, phantom
from simulations.listed import ListedSource
from simulations.site_files import settings, split_key_of, write_site

# Changes with every change of what is written here, so that older sites are remade.
VERSION = 4

__all__ = [
    "DirectorySource",
    "ListedSource",
    "MedMnistSource",
    "PhantomSource",
    "Source",
    "WrittenSource",
]

EVALUATION_SITE = "official-test"
# Probabilities of one, two, three and four images of a phantom patient.
NUM_IMAGES_PROBS = (0.5, 0.3, 0.15, 0.05)
# The largest site has 1.4 times, the smallest 0.6 times as many patients as the average.
SIZE_SPREAD = 0.4
PREVALENCE = (0.35, 0.60)


@dataclass(frozen=True, kw_only=True)
class PhantomSource:
    """Hospitals with synthetic chest radiographs, each with a scanner of its own.

    Sites differ in size, ``patients_per_site`` on average, and in prevalence. ``image_size`` is what rows and
    columns of an image are near to; every scanner has its own pixel size.

    With a ``marker_effect`` patients have a clinical value ``marker``, normal with standard deviation 1 about
    0 if they are healthy and about the effect if not; alone it ranks them with an AUROC of
    Phi(effect / sqrt(2)). It is missing for ``marker_missing_fraction`` of the patients.
    """

    num_sites: int
    patients_per_site: int
    seed: int
    image_size: int
    marker_effect: float | None
    marker_missing_fraction: float
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
        scanner = self.scanner(rng, index=index)
        prevalence = rng.uniform(*PREVALENCE)
        num_patients = self.num_patients(index)
        (directory / "images").mkdir(parents=True)
        cases = [
            case
            for number in range(num_patients)
            for case in _write_phantom(
                directory,
                patient_id=f"{index + 1:02d}{number:05d}",
                prevalence=prevalence,
                scanner=scanner,
                # numpy takes [seed, index] and [seed, index, 0] for the same seed
                rng=np.random.default_rng([self.seed, index, number + 1]),
                study=f"{self.seed}.{index}.{number}",
            )
        ]
        written = settings(
            name=name, num_patients=num_patients, max_epsilon=self.max_epsilon, delta=self.delta
        )
        if self.marker_effect is not None:
            cases = self._with_markers(cases, index=index)
            written["cases"] |= {"values": {"marker": "marker"}}
        write_site(directory, settings=written, cases=cases, split_key=split_key_of(self.seed, name))

    def scanner(self, rng: np.random.Generator, *, index: int) -> phantom.Scanner:
        """Draws the device of a site."""
        return phantom.random_scanner(rng, index=index, image_size=self.image_size)

    def _with_markers(self, cases: list[Case], *, index: int) -> list[Case]:
        rng = np.random.default_rng([self.seed, index, 0, 1])  # of its own: images are the same without it
        markers: dict[str, str] = {}
        for case in cases:
            mean = (self.marker_effect or 0.0) * (case.labels == (phantom.CLASS_NAMES[1],))
            drawn, is_missing = rng.normal(mean), rng.random() < self.marker_missing_fraction
            markers.setdefault(case.patient, "" if is_missing else f"{drawn:.4f}")
        return [replace(case, values=(markers[case.patient],)) for case in cases]

    def num_patients(self, index: int) -> int:
        """Returns the number of patients of a site: the first is the largest, the last the smallest."""
        place = 0.5 if self.num_sites == 1 else index / (self.num_sites - 1)
        return max(1, round(self.patients_per_site * (1 + SIZE_SPREAD * (1 - 2 * place))))


@dataclass(frozen=True, kw_only=True)
class MedMnistSource:
    """A MedMNIST file divided over training sites; each image is its own patient, and ``site.yaml`` says so.

    The file's train and val parts together are divided; each site makes its own parts of what it gets. Its
    official test part is in no training site. With ``evaluation_site`` it is a site of its own, of public
    data.
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
        _ = replace(self)._parts  # of a copy, which goes: whoever only compares has no use for the images
        with self.file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"source": "medmnist", "version": VERSION, **asdict(self), "file": content}

    def write(self, directory: Path, *, name: str) -> None:
        """Writes one site."""
        is_training = name != EVALUATION_SITE
        part = self._training_cases(self.names().index(name)) if is_training else self._parts["test"]
        cases = _write_images(directory, part, class_names=self.class_names)
        written = settings(name=name, num_patients=len(cases), max_epsilon=self.max_epsilon, delta=self.delta)
        written |= {"patient_is": "case"}
        written |= self._split_settings(len(cases)) if is_training else _EVALUATION
        write_site(directory, settings=written, cases=cases, split_key=split_key_of(self.seed, name))

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
        offered, chosen = self._offered, self._division[index]
        return medmnist.Part(images=offered.images[chosen], labels=offered.labels[chosen])

    @cached_property
    def _offered(self) -> medmnist.Part:
        parts = [self._parts["train"], self._parts["val"]]
        return medmnist.Part(
            images=np.concatenate([part.images for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )

    @cached_property
    def _division(self) -> list[NDArray[np.int64]]:
        return self.divided(self._offered.labels)

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
    """Site directories that exist already; nothing is written into them here.

    With ``from_pacs`` each site first fetches what its ``site.yaml`` asks of its PACS.
    """

    directory: Path
    from_pacs: bool

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


WrittenSource = PhantomSource | MedMnistSource | ListedSource
Source = WrittenSource | DirectorySource


def _numbered(num_sites: int) -> list[str]:
    width = len(str(num_sites))
    return [f"site-{number:0{width}d}" for number in range(1, num_sites + 1)]


_EVALUATION: dict[str, object] = {
    "role": "evaluation",
    "data": "public",
    "split": {"train": 0.0, "validation": 0.0, "test": 1.0},
}


def _write_phantom(
    directory: Path,
    *,
    patient_id: str,
    prevalence: float,
    scanner: phantom.Scanner,
    rng: np.random.Generator,
    study: str,
) -> list[Case]:
    """Writes the images of one patient, all of one study."""
    from simulations import (
        dicom_file,
    )  # pydicom takes 0.2 s to import, and most runs find their sites written

    diseased = bool(rng.random() < prevalence)
    patient = anatomy.random_anatomy(rng, diseased=diseased, difficulty=anatomy.Difficulty())
    num_images = 1 + int(rng.choice(len(NUM_IMAGES_PROBS), p=NUM_IMAGES_PROBS))
    cases = []
    for instance in range(1, num_images + 1):
        image = f"images/{patient_id}-{instance}.dcm"
        dicom_file.write(
            directory / image,
            phantom.draw(patient, scanner, rng),
            scanner=scanner,
            patient_id=patient_id,
            study=study,
            instance=instance,
        )
        cases.append(Case(images=(image,), labels=(phantom.CLASS_NAMES[diseased],), patient=patient_id))
    return cases


def _write_images(directory: Path, part: medmnist.Part, *, class_names: tuple[str, ...]) -> list[Case]:
    """Writes every image as a PNG file, every volume as a NIfTI file."""
    (directory / "images").mkdir(parents=True)
    ending, write = (".nii.gz", _write_volume) if part.is_volumes else (".png", _write_raster)
    cases = []
    for number, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
        image = f"images/{number:06d}{ending}"
        write(directory / image, pixels)
        cases.append(Case(images=(image,), labels=(class_names[label],), patient=f"{number:06d}"))
    return cases


def _write_raster(path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(path)


def _write_volume(path: Path, voxels: NDArray[np.uint8]) -> None:
    """Writes voxels of 1 mm; the file says nothing of the patient's sides, so any will do."""
    import nibabel

    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
