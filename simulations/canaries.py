"""Canaries: patients whose contribution to the gradient an auditor chooses, to find them again afterwards.

A canary's gradient is one coordinate of the parameters, its own, and longer than the clipping bound. So the
clip makes it exactly as long as the bound allows, and no other canary stands in its way. All else that
happens to it is what happens to any patient: sampling, clip, sum, noise.

Source: Nasr et al. (2023), Tight Auditing of Differentially Private Machine Learning (Dirac canaries).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client import clinical
from client.clipping import PrivateGradient
from client.cohort import Part
from client.contribution import Contribution, Rows
from client.noise import Key
from client.training import Batch

LENGTH_OVER_BOUND = 10.0
"""Norm of a canary's gradient over ``max_grad_norm``: what a forgotten clip would let through."""


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Who might be in the data, and who is.

    Attributes:
        coordinates: int64, (canaries,), distinct places in the flat array of parameters.
        included: bool, (canaries,), one fair coin each.
        first_label: a case with this label or a higher one is that of canary number label - first_label.
        cases_each: cases of a canary.
    """

    coordinates: NDArray[np.int64]
    included: NDArray[np.bool_]
    first_label: int
    cases_each: int = 1

    def joined(self, part: Part) -> Part:
        """Returns a part with its patients and, after them, the canaries that are included. Their images
        are black and never looked at."""
        numbers = np.repeat(np.flatnonzero(self.included), self.cases_each)
        start, end = len(part.targets), len(part.targets) + len(numbers)
        black = np.zeros((len(numbers), *part.images.shape[1:]), dtype=np.uint8)
        cases = np.arange(start, end).reshape(-1, self.cases_each)
        return Part(
            images=np.concatenate([part.images, black]),
            targets=np.concatenate([part.targets, self.first_label + numbers]),
            values=clinical.none(end),
            patients=(*part.patients, *cases),
        )

    def scores(self, change: NDArray[np.floating]) -> NDArray[np.floating]:
        """Returns how far a change of the parameters goes down each canary's gradient: (canaries,)."""
        return -change[self.coordinates]


def toss(num_canaries: int, *, ranking: NDArray[np.floating], first_label: int, key: Key) -> Canaries:
    """Tosses the coins and gives each canary a coordinate: those that ``ranking`` puts first, shuffled.

    Args:
        ranking: (num_parameters,), how much real patients would move each parameter; the least is best.
    """
    stream = key.stream("canaries")
    quiet = np.argsort(ranking, kind="stable")[:num_canaries].astype(np.int64)
    return Canaries(
        coordinates=stream.permutation(quiet),
        included=stream.random(num_canaries) < 0.5,
        first_label=first_label,
    )


def nobody(*, first_label: int) -> Canaries:
    """Returns no canaries, for the sites that are not audited."""
    nothing = np.zeros(0, dtype=np.int64)
    return Canaries(coordinates=nothing, included=nothing.astype(np.bool_), first_label=first_label)


class CanaryGradient(PrivateGradient):
    """The product's gradient function, with the canaries' gradients put in before the clip."""

    def __init__(self, network: nn.Module, *, canaries: Canaries, **settings: Any) -> None:
        super().__init__(network, **settings)
        self._canaries = canaries
        self._shapes = [parameter.shape for parameter in network.parameters()]
        self._length = LENGTH_OVER_BOUND * settings["privacy"].max_grad_norm

    def contributions(self, batch: Batch) -> tuple[list[Contribution], torch.Tensor]:
        is_canary = batch.targets >= self._canaries.first_label
        if not bool(is_canary.any()):
            return super().contributions(batch)
        rows = [torch.zeros((batch.num_patients, *shape)) for shape in self._shapes]
        losses = torch.zeros(batch.num_patients)
        if not bool(is_canary.all()):
            present, own = _without(batch, is_canary)
            found, losses[present] = super().contributions(own)
            for row, real in zip(rows, found, strict=True):
                row[present] = real.rows()
        numbers = batch.targets[is_canary].numpy() - self._canaries.first_label
        self._put(rows, batch.owners[is_canary].numpy(), self._canaries.coordinates[numbers])
        return [Rows(row) for row in rows], losses

    def _put(
        self, rows: list[torch.Tensor], owners: NDArray[np.int64], coordinates: NDArray[np.int64]
    ) -> None:
        start = 0
        for row in rows:
            size = row[0].numel()
            here = (start <= coordinates) & (coordinates < start + size)
            row.view(len(row), size)[owners[here], coordinates[here] - start] = self._length
            start += size


def _without(batch: Batch, is_canary: torch.Tensor) -> tuple[torch.Tensor, Batch]:
    """Returns the positions of the real patients in a batch, and a batch of them alone."""
    kept = ~is_canary
    present, owners = torch.unique(batch.owners[kept], return_inverse=True)
    own = Batch(
        images=batch.images[kept],
        values=batch.values[kept],
        targets=batch.targets[kept],
        owners=owners,
        num_patients=len(present),
    )
    return present, own
