"""Evaluation of a model on one part of the cohort, and what of it may leave."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.random import Generator
from torch import nn

from client import segmentation
from client.cohort import Part
from client.training import network_inputs, to_input
from common import measure
from common.asked import Asked
from common.dice import DiceScores, DiceSums
from common.measure import Exact, Noised
from common.metrics import Histogram, Scores, patient_weights, score_statistics

_BATCH = 256
_VALUES = 2**23  # of the images of a batch: 32 MB, so that volumes come a few at a time


def exact(network: nn.Module, part: Part, *, asked: Asked) -> Exact:
    """Returns what the model answers to every case of a part, by patient.

    Scores of classes and labels, where a patient's cases weigh 1 together; of masks every patient's mean
    Dice.
    """
    return (
        _dice(network, part, asked=asked) if asked.target == "mask" else _scores(network, part, asked=asked)
    )


def _scores(network: nn.Module, part: Part, *, asked: Asked) -> Scores:
    logits = [output.numpy() for _, output in _answers(network, part)]
    return score_statistics(
        np.concatenate([np.zeros((0, asked.num_outputs), dtype=np.float32), *logits]),
        targets=part.targets,
        weights=patient_weights(part.patients, num_cases=len(part.images)),
    )


def _dice(network: nn.Module, part: Part, *, asked: Asked) -> DiceScores:
    found = [np.zeros((0, len(asked.classes) - 1))]
    for cases, output in _answers(network, part):
        found.append(segmentation.case_dice(output, torch.from_numpy(part.targets[cases].copy())))
    return segmentation.patient_dice(np.concatenate(found), patients=part.patients)


def _answers(network: nn.Module, part: Part) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the model's outputs of a few cases at a time, with their places in the part."""
    network.eval()
    size = max(1, min(_BATCH, _VALUES // max(1, part.images[:1].size)))
    for start in range(0, len(part.images), size):
        cases = slice(start, start + size)
        values = torch.from_numpy(part.values[cases].copy())
        with torch.no_grad():
            yield cases, network(*network_inputs(to_input(part.images[cases]), values))


def noised(exact: Exact, *, asked: Asked, bins: int, noise_multiplier: float, noise: Generator) -> Noised:
    """Returns what may leave instead of exact scores.

    Guarantee: one Gaussian mechanism with ``noise_multiplier`` at patient level (add or remove one
    patient), of the sensitivity that ``measure.l2_sensitivity`` gives.
    """
    std = noise_multiplier * measure.l2_sensitivity(asked)
    released = measure.noised(exact, bins=bins)

    def with_noise(values: np.ndarray) -> np.ndarray:
        return values + noise.standard_normal(values.shape) * std

    if isinstance(released, DiceSums):
        return DiceSums(sums=with_noise(released.sums))
    return Histogram(counts=with_noise(released.counts))
