"""Evaluation of a model on one part of the cohort, and what of it may leave."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from torch import nn

from client.cohort import Part
from client.training import to_input
from common.metrics import Histogram, Scores, l2_sensitivity, patient_weights, score_statistics

_BATCH = 256


def scores(network: nn.Module, part: Part, *, num_classes: int) -> Scores:
    """Returns the exact scores of every case; a patient's cases weigh 1 together."""
    network.eval()
    outputs = [np.zeros((0, 1 if num_classes == 2 else num_classes), dtype=np.float32)]
    with torch.no_grad():
        for start in range(0, len(part.labels), _BATCH):
            images = np.asarray(part.images[start : start + _BATCH])
            outputs.append(network(to_input(images)).numpy())
    return score_statistics(
        np.concatenate(outputs),
        labels=part.labels,
        weights=patient_weights(part.patients, num_cases=len(part.labels)),
        num_classes=num_classes,
    )


def noised_histogram(
    exact: Scores, *, bins: int, num_classes: int, noise_multiplier: float, noise: Generator
) -> Histogram:
    """Returns the histogram that may leave.

    Guarantee: one Gaussian mechanism with ``noise_multiplier`` at patient level (add or remove one
    patient): a patient's cases weigh 1 together, so the counts move by at most sqrt(heads).
    """
    std = noise_multiplier * l2_sensitivity(num_classes)
    counts = exact.histogram(bins).counts
    return Histogram(counts=counts + noise.standard_normal(counts.shape) * std)
