"""Planted faults of DP-SGD, each a value that takes the place of one part of training; never a flag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from client.contribution import Contribution, Rows
from client.gaussian import Gaussian
from client.training import Batch, Cases
from common.model import FlatArray
from simulations.canaries import CanaryGradient
from simulations.checks import Silence
from simulations.implementation import Implementation


class Scaled:
    """Normal numbers times a constant."""

    def __init__(self, stream: Gaussian, *, factor: float) -> None:
        self._stream, self._factor = stream, factor

    def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Any:
        drawn = self._stream.standard_normal(size, dtype=dtype)
        return drawn * dtype(self._factor)

    def add_to(self, arrays: Sequence[FlatArray], *, std: float, threads: int) -> None:
        self._stream.add_to(arrays, std=std * self._factor, threads=threads)


class ClippedAfterAveraging(CanaryGradient):
    """Clips the mean over the batch, as one does against exploding gradients: every patient stands for it."""

    def contributions(self, batch: Batch) -> tuple[list[Contribution], torch.Tensor]:
        found, losses = super().contributions(batch)
        rows = [one.rows() for one in found]
        return [Rows(row.mean(dim=0, keepdim=True).expand_as(row).contiguous()) for row in rows], losses


class ImagesClippedApart(CanaryGradient):
    """Takes every image for a patient of its own."""

    def accumulate(self, batch: Batch) -> float:
        num_cases = len(batch.targets)
        apart = Batch(
            images=batch.images,
            values=batch.values,
            targets=batch.targets,
            owners=torch.arange(num_cases),
            num_patients=num_cases,
        )
        return super().accumulate(apart)


class _Batches:
    """Takes what ``PoissonSampler`` takes."""

    def __init__(
        self, *, sample_rate: float, cases_per_patient: int, sampling: Generator, choosing: Generator
    ) -> None:
        self._rate, self._sampling = sample_rate, sampling
        self._cases_per_patient = cases_per_patient

    def _cases(self, patients: Sequence[Cases], drawn: Sequence[int]) -> list[Cases]:
        return [patients[number][: self._cases_per_patient] for number in drawn]


class FixedBatches(_Batches):
    """Draws the same number of patients in every step."""

    def __call__(self, patients: Sequence[Cases]) -> list[Cases]:
        size = round(self._rate * len(patients))
        return self._cases(patients, self._sampling.choice(len(patients), size, replace=False).tolist())


class Epochs(_Batches):
    """Shuffles the patients and goes through them: each once, before any comes again."""

    _left: Iterator[int] = iter(())

    def __call__(self, patients: Sequence[Cases]) -> list[Cases]:
        drawn = []
        for _ in range(round(self._rate * len(patients))):
            number = next(self._left, None)
            if number is None:
                self._left = iter(self._sampling.permutation(len(patients)).tolist())
                number = next(self._left)
            drawn.append(number)
        return self._cases(patients, drawn)


NO_NOISE = Implementation(noise=lambda stream: Silence())
HALF_THE_NOISE = Implementation(noise=lambda stream: Scaled(stream, factor=0.5))
CLIP_AFTER_AVERAGING = Implementation(gradient=ClippedAfterAveraging)
ACCOUNTING_RESET = Implementation(book=lambda server_round: f"ledger-{server_round}.sqlite")
FIXED_BATCHES = Implementation(sampler=FixedBatches)
EPOCHS = Implementation(sampler=Epochs)
IMAGES_CLIPPED_APART = Implementation(gradient=ImagesClippedApart)

CAUGHT_BY = {
    "no noise": (NO_NOISE, "audit"),
    "half the noise": (HALF_THE_NOISE, "noise"),
    "clip after averaging over the batch": (CLIP_AFTER_AVERAGING, "sensitivity"),
    "accounting reset each round": (ACCOUNTING_RESET, "audit"),
    "fixed batches accounted as Poisson ones": (FIXED_BATCHES, "participation"),
    "epochs accounted as Poisson batches": (EPOCHS, "participation"),
    "two images of one patient clipped apart": (IMAGES_CLIPPED_APART, "sensitivity"),
}
"""Each defect with the check that is named for it in ``docs/privacy.md``."""
