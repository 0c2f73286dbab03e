"""Phantom patients in memory, preprocessed as a site does it: what the attacks are tried on."""

from __future__ import annotations

import numpy as np

from client import clinical, preprocessing
from client.cohort import Part
from client.images import Image
from common.asked import Asked
from simulations import anatomy, phantom

_PREVALENCE = 0.5


def phantom_part(
    num_patients: int, *, cases_per_patient: int, asked: Asked, image_size: int, seed: int
) -> Part:
    """Returns patients of one scanner with the same number of cases each; labels as phantoms' classes.

    Args:
        image_size: about the rows and columns of an image before preprocessing.
    """
    rng = np.random.default_rng(seed)
    scanner = phantom.random_scanner(rng, index=0, image_size=image_size)
    diseased = rng.random(num_patients) < _PREVALENCE
    images = []
    for is_diseased in diseased:
        patient = anatomy.random_anatomy(rng, diseased=bool(is_diseased), difficulty=anatomy.Difficulty())
        for _ in range(cases_per_patient):
            pixels = phantom.draw(patient, scanner, rng).astype(np.float32)
            image = Image(array=pixels[None], spacing_mm=None)
            images.append(preprocessing.apply([image], asked)["image"])
    cases = np.arange(num_patients * cases_per_patient).reshape(num_patients, cases_per_patient)
    return Part(
        images=np.stack(images),
        targets=np.repeat(diseased.astype(np.int64), cases_per_patient),
        values=clinical.none(len(images)),
        patients=tuple(cases),
    )
