"""Opacus' own ways to per-sample gradients: hooks, expanded weights, ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from torch import Tensor, nn

from client.contribution import Contribution, Rows
from client.training import Batch, case_losses, patient_means


@contextmanager
def _without_warnings() -> Iterator[None]:
    """True of every first layer, since images need no gradient; the hooks need none of them either."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield


class Hooks:
    """Per-sample gradients by hooks around every layer."""

    def __init__(self, network: nn.Module) -> None:
        self._parameters = list(network.parameters())
        self._hooked: Any = GradSampleModule(network, batch_first=True, loss_reduction="sum", strict=True)

    def contributions(self, batch: Batch) -> tuple[list[Contribution], Tensor]:
        losses = case_losses(self._hooked(*batch.inputs), batch.targets)
        with _without_warnings():
            losses.sum().backward()  # type: ignore[no-untyped-call]
        rows: list[Contribution] = []
        for parameter in self._parameters:
            rows.append(Rows(patient_means(parameter.grad_sample, batch)))  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return rows, patient_means(losses.detach(), batch)

    def detach(self) -> None:
        self._hooked.to_standard_module()


class ExpandedWeights(Hooks):
    """Per-sample gradients by torch's expanded weights; few kinds of layers have them."""

    def __init__(self, network: nn.Module) -> None:
        self._parameters = list(network.parameters())
        self._hooked = GradSampleModuleExpandedWeights(network, batch_first=True, loss_reduction="sum")


class Ghost:
    """Norms by ghost clipping, and the weighted sum by a second backward pass; of cases, not of patients.

    Source: Li et al. (2022), Large Language Models Can Be Strong Differentially Private Learners.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = list(network.parameters())
        self._hooked: Any = GradSampleModuleFastGradientClipping(
            network, batch_first=True, loss_reduction="sum", strict=True
        )

    def contributions(self, batch: Batch) -> tuple[list[Contribution], Tensor]:
        if batch.num_patients != len(batch.targets):
            raise ValueError("expected one case a patient: ghost clipping clips cases")
        norms, losses = self._norms(*batch.inputs, targets=batch.targets)
        lost = ~torch.stack(norms).isfinite().all(dim=0)
        if bool(lost.any()):  # their weight is zero, but zero times NaN is not
            blank = [torch.where(_beside(lost, one), 0.0, one) for one in batch.inputs]
            norms, losses = self._norms(*blank, targets=batch.targets)
            norms = [torch.where(lost, torch.nan, one) for one in norms]
        second = _SecondPass(self._hooked, losses, self._parameters)
        found: list[Contribution] = [_Deferred(second, place, one) for place, one in enumerate(norms)]
        return found, torch.where(lost, torch.nan, losses.detach())

    def _norms(self, *inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        losses = case_losses(self._hooked(*inputs), targets)
        with _without_warnings():
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        norms = [parameter._norm_sample for parameter in self._parameters]  # type: ignore[attr-defined]
        for parameter in self._parameters:
            parameter.grad = None
        return norms, losses

    def detach(self) -> None:
        self._hooked.to_standard_module()


def _beside(cases: Tensor, values: Tensor) -> Tensor:
    return cases.reshape(-1, *[1] * (values.dim() - 1))


@dataclass
class _SecondPass:
    """The weighted sums over cases: one backward pass for all parameters."""

    hooked: Any
    losses: Tensor
    parameters: list[nn.Parameter]
    sums: tuple[Tensor, ...] = ()

    def of(self, place: int, weights: Tensor) -> Tensor:
        if not self.sums:
            self.hooked.disable_hooks()
            with _without_warnings():
                self.sums = torch.autograd.grad((self.losses * weights).sum(), self.parameters)
            self.hooked.enable_hooks()
        return self.sums[place]


@dataclass(frozen=True)
class _Deferred:
    """Norms are known, gradients are not."""

    second: _SecondPass
    place: int
    norms: Tensor

    def rows(self) -> Tensor:
        raise NotImplementedError("ghost clipping has no gradients of single patients")

    def squared_norms(self) -> Tensor:
        return self.norms.square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.second.of(self.place, weights)

    def without(self, patients: Tensor) -> Contribution:
        """Nothing to do: their images were blanked, and their weight is zero."""
        return self
