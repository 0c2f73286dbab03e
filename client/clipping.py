"""Clipped and noised gradients, by Opacus' optimizer; ``privacy.clipping`` says how they are had."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from client.bookkeeping import BookKeeping, NotSupported
from client.contribution import Contribution
from client.factors import Group, clip_factors, weighted_sums
from client.gaussian import Gaussian
from client.hooked import ExpandedWeights, Ghost, Hooks
from client.training import Batch
from common.plan import DpSgd

logger = logging.getLogger("feverfew.worker")

Clipping = Literal["auto", "bookkeeping", "hooks", "ghost", "ew"]


class PatientGradients(Protocol):
    """Says what the patients of a batch contribute to the gradient of each parameter."""

    def contributions(self, batch: Batch) -> tuple[list[Contribution], torch.Tensor]:
        """Returns this in the order of the network's parameters, and the patients' mean losses."""
        ...

    def detach(self) -> None:
        """Takes off the network what was put on it."""
        ...


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with noise from a cryptographic stream instead of torch's generator.

    What is summed, patients and noise alike, is divided by the expected batch before it is added: afterwards
    it would be one more pass over as many numbers as the network has.
    """

    def __init__(self, optimizer: Any, *, noise: Gaussian, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._noise = noise

    @property
    def accumulated_iterations(self) -> int:
        """One: batches of a step are parts of one logical batch, divided by its expected size once."""
        return 1

    def accumulate(self, factors: torch.Tensor, groups: list[Group]) -> None:
        """Adds a batch's sums of clipped gradients; empties the list, so that its memory is free again."""
        sums = weighted_sums(groups, factors / self.expected_batch_size)
        for parameter, clipped in zip(self.params, sums, strict=True):
            former = parameter.summed_grad
            parameter.summed_grad = clipped if former is None else former + clipped

    def add_noise(self) -> None:
        """Writes the noised sum of clipped gradients, over the expected batch, to ``p.grad``; a sum of nobody
        is zero.
        """
        flat = [self._taken(parameter) for parameter in self.params]
        for parameter, summed in zip(self.params, flat, strict=True):
            parameter.grad = summed.view_as(parameter)
        self._noise.add_to(
            [summed.numpy() for summed in flat],
            std=self.noise_multiplier * self.max_grad_norm / self.expected_batch_size,
            threads=torch.get_num_threads(),
        )

    def _taken(self, parameter: Any) -> torch.Tensor:
        """Returns the sum that a parameter has, flat, and takes it from there."""
        summed, parameter.summed_grad = parameter.summed_grad, None
        return torch.zeros(parameter.numel(), dtype=parameter.dtype) if summed is None else summed

    def scale_grad(self) -> None:
        """Does nothing: all that was added is divided already."""


def patient_gradients(
    network: nn.Module, *, clipping: Clipping, compute: torch.dtype | None = None
) -> PatientGradients:
    """Returns the way to per-patient gradients that is asked for; "auto" is the fastest that is exact.

    That is book-keeping, on every network that it knows all modules of; else Opacus' hooks.

    Args:
        compute: see ``BookKeeping``; the other ways compute in the type of the parameters.

    Raises:
        NotSupported: book-keeping is asked for, and does not know a module.
    """
    match clipping:
        case "hooks":
            return Hooks(network)
        case "ew":
            return ExpandedWeights(network)
        case "ghost":
            return Ghost(network)
        case "bookkeeping":
            return BookKeeping(network, compute=compute)
    try:
        found: PatientGradients = BookKeeping(network, compute=compute)
    except NotSupported as reason:
        logger.info("clipping=auto is by Opacus' hooks: %s", reason)
        return Hooks(network)
    logger.info("clipping=auto is by book-keeping")
    return found


class PrivateGradient:
    """Gradients of patients, each averaged over the patient's cases, clipped once; their sum is noised.

    The noise of the released loss and that of the gradient are chosen so that both together cost what
    ``noise_multiplier`` says: 1/s_gradient^2 + 1/s_loss^2 = 1/noise_multiplier^2.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        privacy: DpSgd,
        noise_multiplier: float,
        expected_batch: int,
        noise: Gaussian,
        compute: torch.dtype | None = None,
    ) -> None:
        gradient_multiplier, loss_multiplier = split_noise(
            noise_multiplier, loss_noise_ratio=privacy.loss_noise_ratio
        )
        self._gradients = patient_gradients(network, clipping=privacy.clipping, compute=compute)
        self._optimizer = PatientOptimizer(
            # Opacus takes the parameters from it and it never steps; a real one would import torch's compiler
            SimpleNamespace(param_groups=[{"params": list(network.parameters())}], defaults={}, state={}),
            noise=noise,
            noise_multiplier=gradient_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        self._noise = noise
        self._loss_std = loss_multiplier * privacy.loss_bound
        self._loss_bound = privacy.loss_bound
        self._max_grad_norm = privacy.max_grad_norm

    def accumulate(self, batch: Batch) -> float:
        contributions, losses = self.contributions(batch)
        factors, groups = clip_factors(contributions, bound=self._max_grad_norm)
        self._optimizer.accumulate(factors, groups)
        bounded = losses.nan_to_num(nan=self._loss_bound)
        return float(bounded.clamp(0, self._loss_bound).double().sum())

    def contributions(self, batch: Batch) -> tuple[list[Contribution], torch.Tensor]:
        """Returns what each patient contributes, before any of it is bounded.

        Returns:
            For each parameter the patients' mean gradients, and the patients' mean losses, float32,
            (num_patients,).
        """
        return self._gradients.contributions(batch)

    def finish(self) -> float:
        self._optimizer.add_noise()
        self._optimizer.scale_grad()
        return float(self._noise.standard_normal()) * self._loss_std

    def close(self) -> None:
        self._gradients.detach()


def split_noise(noise_multiplier: float, *, loss_noise_ratio: float) -> tuple[float, float]:
    """Returns the noise multipliers of gradient and loss that together cost ``noise_multiplier``.

    >>> gradient, loss = split_noise(1.0, loss_noise_ratio=10.0)
    >>> round(gradient, 4), round(loss, 3), round(gradient**-2 + loss**-2, 12)
    (1.005, 10.05, 1.0)
    """
    gradient = float(noise_multiplier * (1 + loss_noise_ratio**-2) ** 0.5)
    return gradient, gradient * loss_noise_ratio
