"""A folder of cases, listed as a hospital's own ``site.yaml`` lists them, divided by patient over sites."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from client import listing
from client.case import Case, PatientIs
from client.listing import Listing
from common.errors import DataError
from simulations import site_files

VERSION = 1
DATA = "data"


@dataclass(frozen=True, kw_only=True)
class ListedSource:
    """Patients of one folder, divided evenly and at random over sites.

    Images are not copied: each site has a link ``data`` to the folder, and a table of its own cases.
    ``cases`` and ``patient_is`` are those of a ``site.yaml`` in that folder.
    """

    directory: Path
    cases: Listing
    patient_is: PatientIs
    class_names: tuple[str, ...]
    num_sites: int
    train_fraction: float
    validation_fraction: float
    seed: int
    max_epsilon: float
    delta: float

    def names(self) -> list[str]:
        """Returns the names of the sites, in order."""
        width = len(str(self.num_sites))
        return [f"site-{number:0{width}d}" for number in range(1, self.num_sites + 1)]

    def parameters(self) -> dict[str, object]:
        """Returns all that decides what is written; the folder counts by what lists its cases.

        Raises:
            DataError: the listing cannot be used.
        """
        _ = self._by_patient
        own = {key: value for key, value in vars(self).items() if key in self.__dataclass_fields__}
        return {
            "source": "listed",
            "version": VERSION,
            **own,
            "directory": str(self.directory.resolve()),
            "cases": self.cases.model_dump(mode="json"),
            "listing": listing.digest(self.cases, directory=self.directory),
        }

    def write(self, directory: Path, *, name: str) -> None:
        """Writes one site."""
        patients = self._divided[self.names().index(name)]
        cases = [_linked(case) for patient in patients for case in self._by_patient[patient]]
        directory.mkdir(parents=True)
        (directory / DATA).symlink_to(self.directory.resolve(), target_is_directory=True)
        site_files.write_site(
            directory,
            settings=self._settings(name, num_patients=len(patients)),
            cases=cases,
            split_key=site_files.split_key_of(self.seed, name),
        )

    def _settings(self, name: str, *, num_patients: int) -> dict[str, Any]:
        usual = site_files.settings(
            name=name, num_patients=num_patients, max_epsilon=self.max_epsilon, delta=self.delta
        )
        test_fraction = round(1 - self.train_fraction - self.validation_fraction, 9)
        split = {"train": self.train_fraction, "validation": self.validation_fraction, "test": test_fraction}
        return usual | {
            "patient_is": self.patient_is,
            "nominal_patients": max(1, round(num_patients * self.train_fraction)),
            "split": split,
            "cases": site_files.table(
                usual["cases"],
                inputs=self.cases.inputs,
                values=tuple(self.cases.values),
                targets=self.cases.targets,
                classes=self.class_names,
            ),
        }

    @cached_property
    def _by_patient(self) -> dict[str, list[Case]]:
        """The cases of each patient; rows that nobody could use are left out."""
        found: defaultdict[str, list[Case]] = defaultdict(list)
        for row in listing.rows(self.cases, directory=self.directory, patient_is=self.patient_is):
            if isinstance(row, Case):
                found[row.patient].append(row)
        if len(found) < self.num_sites:
            raise DataError(
                f"Expected a patient for each of {self.num_sites} sites in {self.directory}, found "
                f"{len(found)}; check data.cases, or lower data.num_sites."
            )
        return dict(found)

    @cached_property
    def _divided(self) -> list[list[str]]:
        patients = sorted(self._by_patient)
        shuffled = np.random.default_rng(self.seed).permutation(len(patients))
        return [[patients[place] for place in part] for part in np.array_split(shuffled, self.num_sites)]


def _linked(case: Case) -> Case:
    images = tuple(f"{DATA}/{image}" for image in case.images)
    return replace(case, images=images, mask=f"{DATA}/{case.mask}" if case.mask else "")
