"""Clipped per-patient gradients with noise, by Opacus' hooks and optimizer."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from client.training import Batch, case_losses, patient_means
from common.plan import DpSgd


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with noise from a cryptographic stream instead of torch's generator."""

    def __init__(self, optimizer: Any, *, noise: Generator, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._noise = noise

    @property
    def accumulated_iterations(self) -> int:
        """One: batches of a step are parts of one logical batch, divided by its expected size once."""
        return 1

    def add_noise(self) -> None:
        """Writes the noised sum of clipped gradients to ``p.grad``; a sum of nobody is zero."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            drawn = self._noise.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.grad = torch.from_numpy(drawn).mul_(std)
            if parameter.summed_grad is not None:
                parameter.grad += parameter.summed_grad.view_as(parameter)


class PrivateGradient:
    """Per-sample gradients from Opacus' hooks, averaged per patient, clipped once, noised.

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
        noise: Generator,
    ) -> None:
        gradient_multiplier, loss_multiplier = split_noise(
            noise_multiplier, loss_noise_ratio=privacy.loss_noise_ratio
        )
        self._hooked = GradSampleModule(network, batch_first=True, loss_reduction="sum", strict=True)
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

    def accumulate(self, batch: Batch) -> float:
        rows, losses = self.patients(batch)
        for parameter, row in zip(self._optimizer.params, finite_patients(rows), strict=True):
            parameter.grad_sample = row
        self._optimizer.clip_and_accumulate()
        for parameter in self._optimizer.params:
            parameter.grad_sample = None
        bounded = losses.nan_to_num(nan=self._loss_bound)
        return float(bounded.clamp(0, self._loss_bound).double().sum())

    def patients(self, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns what each patient contributes, before any of it is bounded.

        Returns:
            For each parameter the patients' mean gradients, (num_patients, *parameter.shape), and the
            patients' mean losses, (num_patients,); both float32.
        """
        losses = case_losses(self._hooked(*batch.inputs), batch.targets)
        with warnings.catch_warnings():
            # true of every first layer, since images need no gradient; the hooks need none of them either
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        rows = [patient_means(parameter.grad_sample, batch) for parameter in self._optimizer.params]
        return rows, patient_means(losses.detach(), batch)

    def finish(self) -> float:
        self._optimizer.add_noise()
        self._optimizer.scale_grad()
        for parameter in self._optimizer.params:
            parameter.summed_grad = None
        return float(self._noise.standard_normal()) * self._loss_std

    def close(self) -> None:
        self._hooked.to_standard_module()


def finite_patients(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sets the gradient of a patient to zero where any of it is not finite; it could not be clipped.

    Other patients are not changed, so the sensitivity of the sum stays the clipping bound.
    """
    finite = torch.stack([row.reshape(len(row), -1).isfinite().all(dim=1) for row in rows]).all(dim=0)
    if bool(finite.all()):
        return rows
    return [torch.where(finite.reshape(-1, *[1] * (row.dim() - 1)), row, 0.0) for row in rows]


def split_noise(noise_multiplier: float, *, loss_noise_ratio: float) -> tuple[float, float]:
    """Returns the noise multipliers of gradient and loss that together cost ``noise_multiplier``.

    >>> gradient, loss = split_noise(1.0, loss_noise_ratio=10.0)
    >>> round(gradient, 4), round(loss, 3), round(gradient**-2 + loss**-2, 12)
    (1.005, 10.05, 1.0)
    """
    gradient = float(noise_multiplier * (1 + loss_noise_ratio**-2) ** 0.5)
    return gradient, gradient * loss_noise_ratio
