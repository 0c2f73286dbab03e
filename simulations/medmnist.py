"""Reads MedMNIST ``.npz`` files and divides cases over sites."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

REMEDY = "download it again from medmnist.com"
MAX_DRAWS = 1000

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Labelled images: uint8, (cases, rows, columns), (cases, rows, columns, 3), or volumes (cases, a, b, c);
    labels (cases,)."""

    images: Images
    labels: Labels

    @property
    def is_volumes(self) -> bool:
        return self.images.ndim == 4 and self.images.shape[-1] != 3


def read(file: Path, *, num_classes: int) -> dict[str, Part]:
    """Returns the official parts ``train``, ``val`` and ``test``.

    Raises:
        DataError: the file is missing, or is not a single-label MedMNIST file of ``num_classes`` classes.
    """
    names = ("train", "val", "test")
    arrays = _arrays(file, names=[f"{part}_{kind}" for part in names for kind in ("images", "labels")])
    parts = {name: _part(file, name=name, arrays=arrays, num_classes=num_classes) for name in names}
    if len({part.images.shape[1:] for part in parts.values()}) > 1:
        raise DataError(f"Expected images of one shape in {file}, found several; {REMEDY}.")
    return parts


def divide_evenly(labels: Labels, *, num_sites: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Returns the cases of each site, drawn at random; sizes differ by one at most (IID)."""
    return [np.sort(cases) for cases in np.array_split(rng.permutation(len(labels)), num_sites)]


def divide_by_label(
    labels: Labels, *, num_sites: int, alpha: float, min_cases: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Returns the cases of each site; each class is spread by its own Dirichlet(``alpha``) proportions.

    Small ``alpha`` gives sites that differ much, in size too. Proportions are drawn again until every site
    has ``min_cases``.

    Raises:
        DataError: no draw had ``min_cases`` at every site.

    Source: Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution; drawing again
    as Yurochkin et al. (2019), Bayesian Nonparametric Federated Learning of Neural Networks.
    """
    for _ in range(MAX_DRAWS):
        sites = _divided_once(labels, num_sites=num_sites, alpha=alpha, rng=rng)
        smallest = min(len(cases) for cases in sites)
        if smallest >= min_cases:
            return sites
    raise DataError(
        f"Expected at least {min_cases} cases at each of {num_sites} sites, found {smallest} in the last of "
        f"{MAX_DRAWS} draws with alpha {alpha}; raise alpha, or lower the number of sites or the minimum."
    )


def _divided_once(
    labels: Labels, *, num_sites: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    shares: list[list[NDArray[np.int64]]] = [[] for _ in range(num_sites)]
    for label in np.unique(labels):
        cases = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_sites, alpha)))[:-1] * len(cases)
        for share, piece in zip(shares, np.split(cases, ends.astype(np.int64)), strict=True):
            share.append(piece)
    return [np.sort(np.concatenate(share)) for share in shares]


def _arrays(file: Path, *, names: list[str]) -> dict[str, NDArray[Any]]:
    if not file.is_file():
        raise DataError(f"Expected a MedMNIST file at {file}, found none; {REMEDY}, or set data.file.")
    try:
        # opened here, since numpy leaves a file open that is no archive
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(f"Expected the array {missing[0]} in {file}, found none; {REMEDY}.")
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise anything on damaged bytes
        raise DataError(
            f"Expected a MedMNIST .npz file, found {file} unreadable ({type(error).__name__}: {error}); "
            f"{REMEDY}."
        ) from None


def _part(file: Path, *, name: str, arrays: dict[str, NDArray[Any]], num_classes: int) -> Part:
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"Expected {name}_images of uint8 with two or three axes a case, found {images.dtype}, "
            f"{images.shape} in {file}; use a MedMNIST file."
        )
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu":
        raise DataError(
            f"Expected one whole number for each of {len(images)} images as {name}_labels, found "
            f"{labels.dtype}, {labels.shape} in {file}; use a single-label MedMNIST file."
        )
    flat = labels.reshape(-1).astype(np.int64)
    if len(flat) and not (flat.min() >= 0 and flat.max() < num_classes):
        raise DataError(
            f"Expected labels from 0 to {num_classes - 1}, found {flat.min()} to {flat.max()} in {file}; "
            "name all classes in data.classes."
        )
    return Part(images=images, labels=flat)
