"""Intensities of the cases of a part, over patients: histograms of landmarks, and what of them may leave."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from client.cohort import Part
from common import landmarks
from common.asked import Preprocessing
from common.landmarks import Floats, LandmarkHistograms


def histograms(part: Part, preprocessing: Preprocessing, *, wanted: LandmarkHistograms) -> Floats:
    """Returns float64 (landmarks, bins): how many patients of a part have each landmark in each bin.

    A patient's landmark is the mean over the patient's cases.
    """
    cases = by_case(part.images, inputs=len(preprocessing.inputs), percentiles=wanted.percentiles)
    patients = [cases[own].mean(axis=0) for own in part.patients]
    return landmarks.histograms(
        np.array(patients).reshape(len(patients), len(wanted.percentiles)), bins=wanted.bins
    )


def by_case(images: np.ndarray, *, inputs: int, percentiles: tuple[float, ...]) -> Floats:
    """Returns float64 (cases, landmarks): percentiles of each image of a case, as a mean over its images.

    Args:
        images: uint8, of which 255 stands for 1, or float16; (cases, inputs * channels, *size).
    """
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    found = np.zeros((len(images), len(percentiles)))
    for place, image in enumerate(images):  # one at a time: volumes are large
        each = np.asarray(image, np.float32).reshape(inputs, -1)
        found[place] = np.percentile(each, percentiles, axis=1).mean(axis=1) / scale
    return found


def noised(counts: Floats, *, noise_multiplier: float, noise: Generator) -> Floats:
    """Returns what may leave instead of exact histograms of landmarks.

    Guarantee: one Gaussian mechanism with ``noise_multiplier`` at patient level (add or remove one
    patient), of the sensitivity that ``landmarks.l2_sensitivity`` gives.
    """
    std = noise_multiplier * landmarks.l2_sensitivity(len(counts))
    return np.asarray(counts + noise.standard_normal(counts.shape) * std)
