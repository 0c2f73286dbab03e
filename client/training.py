"""Local DP-SGD where the unit is the patient.

Each step samples patients by Poisson sampling; every sampled patient contributes the average gradient
over at most ``cases_per_patient`` of its cases, clipped once to ``max_grad_norm``; Gaussian noise is
added to the sum; the sum is divided by the plan's expected batch, a public constant.

Source: Abadi et al. (2016), Deep Learning with Differential Privacy; for several records of one person,
Levy et al. (2021), Learning with User-Level Privacy. Proximal term: Li et al. (2020), FedProx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import nn
from torch.nn import functional
from torch.optim.sgd import sgd

from client import segmentation
from client.augmentation import UNCHANGED, Augmenter, augmenter_of
from client.cohort import Part
from client.gaussian import Gaussian
from client.noise import Key
from client.precision import compute_type, memory_format
from common import model as models
from common.calibration import Mechanism
from common.model import FlatArray
from common.plan import DpSgd, NoPrivacy, Plan, Training

Cases = np.ndarray[Any, np.dtype[Any]]
"""Indices of cases in a part: int64, (cases,)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The cases of the sampled patients of one step, grouped by patient; a copy of a case is a case here.

    images: float32, (cases, channels, *size), in [0, 1]. values: float32, (cases, features); clinical values.
    targets: (cases, ...), as those of ``cohort.Part``.
    owners: int64, (cases,), index of the patient within the batch, ascending. num_patients: int.
    """

    images: torch.Tensor
    values: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    num_patients: int

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return network_inputs(self.images, self.values)

    def laid_out(self, memory_format: torch.memory_format) -> Batch:
        """Returns the batch with flat images in this order of memory, which convolutions then keep."""
        if memory_format == torch.contiguous_format or self.images.dim() != 4:
            return self
        # with the strides of that order also for one channel, where both orders are the same
        images = torch.empty_like(self.images, memory_format=memory_format).copy_(self.images)
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one round of local training yields. update: float32, (num_parameters,). train_loss: a noised
    mean over sampled patients of their loss (exact without privacy); None if no step was made."""

    update: FlatArray
    train_loss: float | None


class Gradient(Protocol):
    """Adds up patients' gradients over the batches of one step, then writes ``p.grad`` once."""

    def accumulate(self, batch: Batch) -> float:
        """Adds the patients of a batch; returns the sum of their (bounded) losses."""
        ...

    def finish(self) -> float:
        """Writes ``p.grad`` from all that was added since the last call; returns the loss sum's noise."""
        ...

    def close(self) -> None:
        """Takes off the network what was hooked to it."""
        ...


class Sampler(Protocol):
    """Draws the patients of one step."""

    def __call__(self, patients: Sequence[Cases]) -> list[Cases]:
        """Returns, for each patient drawn, the cases that it contributes; ``patients``: the cases of each."""
        ...


def train(
    network: nn.Module,
    part: Part,
    *,
    training: Training,
    sampler: Sampler,
    gradient: Gradient,
    augmenter: Augmenter = UNCHANGED,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Trained:
    """Trains the network in place for one round and returns its change.

    Guarantee: with a ``PoissonSampler`` and a ``PrivateGradient``, the update and the loss together are one
    release of ``local_steps`` Poisson-subsampled Gaussian mechanisms with their rate and noise multiplier.
    An empty batch is a legal step and adds noise like any other.
    """
    start = models.flatten(network)
    network.train()
    descent = Descent(network, training=training)
    anchor = [parameter.detach().clone() for parameter in network.parameters()]
    loss_sum = 0.0
    try:
        for step in range(training.local_steps):
            network.zero_grad()
            drawn = sampler(part.patients)
            for batch in batches(part, drawn, physical_batch=training.physical_batch, augmenter=augmenter):
                loss_sum += gradient.accumulate(batch)
            loss_sum += gradient.finish()
            _add_proximal_term(network, anchor, mu=training.proximal_mu)
            descent.step()
            on_step(step + 1, training.local_steps)
    finally:
        gradient.close()  # the network is used again, also after a failure
    divisor = training.expected_batch * training.local_steps
    return Trained(update=models.flatten(network) - start, train_loss=loss_sum / divisor if divisor else None)


def train_by_plan(
    network: nn.Module,
    part: Part,
    *,
    plan: Plan,
    mechanism: Mechanism,
    key: Key,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Trained:
    """Trains one round with the sampler, the gradient, the copies and the noise of a plan; see ``train``."""
    sampler = PoissonSampler(
        sample_rate=mechanism.sample_rate,
        cases_per_patient=plan.training.cases_per_patient,
        sampling=key.stream("sampling"),
        choosing=key.stream("cases"),
    )
    gradient = gradient_of(network, plan=plan, mechanism=mechanism, noise=Gaussian(key.derived("noise")))
    augmenter = augmenter_of(plan.training.augmentation, key=key)
    return train(
        network,
        part,
        training=plan.training,
        sampler=sampler,
        gradient=gradient,
        augmenter=augmenter,
        on_step=on_step,
    )


class PoissonSampler:
    """Draws each patient independently with one probability, and at most so many of its cases at random."""

    def __init__(
        self, *, sample_rate: float, cases_per_patient: int, sampling: Generator, choosing: Generator
    ) -> None:
        self._sample_rate = sample_rate
        self._cases_per_patient = cases_per_patient
        self._sampling, self._choosing = sampling, choosing

    def __call__(self, patients: Sequence[Cases]) -> list[Cases]:
        drawn = np.flatnonzero(self._sampling.random(len(patients)) < self._sample_rate)
        return [self._chosen(patients[int(patient)]) for patient in drawn]

    def _chosen(self, cases: Cases) -> Cases:
        if len(cases) <= self._cases_per_patient:
            return cases
        return np.sort(self._choosing.choice(cases, self._cases_per_patient, replace=False))


def batches(
    part: Part, drawn: Sequence[Cases], *, physical_batch: int, augmenter: Augmenter = UNCHANGED
) -> Iterator[Batch]:
    """Cuts the patients drawn into batches of at most ``physical_batch`` cases, copies of cases counted.

    A patient is never cut.
    """
    room = physical_batch // augmenter.copies
    group: list[Cases] = []
    for cases in drawn:
        if group and sum(map(len, group)) + len(cases) > room:
            yield _batch(part, group, augmenter)
            group = []
        group.append(cases)
    if group:
        yield _batch(part, group, augmenter)


def _batch(part: Part, group: list[Cases], augmenter: Augmenter) -> Batch:
    cases = np.concatenate(group)
    owners = np.repeat(np.arange(len(group)), [len(own) for own in group])
    images, targets = augmenter(to_input(part.images[cases]), torch.from_numpy(part.targets[cases]))
    return Batch(
        images=images,
        values=torch.from_numpy(np.repeat(part.values[cases], augmenter.copies, axis=0)),
        targets=targets,
        owners=torch.from_numpy(np.repeat(owners, augmenter.copies)),
        num_patients=len(group),
    )


def to_input(images: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    """Returns uint8 or float16 cases as the network's input: float32 in [0, 1]."""
    values = images.astype(np.float32)
    return torch.from_numpy(values / np.float32(255) if images.dtype == np.uint8 else values)


def network_inputs(images: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns what a network takes: the images, and the clinical values where the plan asks for some."""
    return (images, values) if values.shape[1] else (images,)


def case_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of each case: float32, (cases,).

    Sigmoid for one output; for several labels the mean over their sigmoids; else softmax. Masks: see
    ``segmentation.case_losses``.
    """
    if outputs.dim() > 2:
        return segmentation.case_losses(outputs, targets)
    if targets.dim() == 2:
        by_label = functional.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="none"
        )
        return by_label.mean(dim=1)
    if outputs.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(
            outputs[:, 0], targets.to(outputs.dtype), reduction="none"
        )
    return functional.cross_entropy(outputs, targets, reduction="none")


def patient_means(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Averages rows over each patient's cases: (cases, ...) -> (num_patients, ...)."""
    counts = torch.bincount(batch.owners, minlength=batch.num_patients).to(values.dtype)
    if batch.num_patients == len(values):
        return values
    sums = values.new_zeros((batch.num_patients, *values.shape[1:])).index_add_(0, batch.owners, values)
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


def _add_proximal_term(network: nn.Module, anchor: list[torch.Tensor], *, mu: float) -> None:
    """Adds mu (w - w_received) after the noise: it depends on released values only."""
    if mu:
        for parameter, origin in zip(network.parameters(), anchor, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def gradient_of(network: nn.Module, *, plan: Plan, mechanism: Mechanism, noise: Gaussian) -> Gradient:
    """Returns the gradient of the plan's privacy mechanism; both kinds have one interface."""
    compute = compute_type(plan)
    match plan.privacy:
        case NoPrivacy():
            return PlainGradient(network, expected_batch=plan.training.expected_batch, compute=compute)
        case DpSgd() as privacy:
            from client.clipping import PrivateGradient  # Opacus takes seconds to import

            return PrivateGradient(
                network,
                privacy=privacy,
                noise_multiplier=mechanism.noise_multiplier,
                expected_batch=plan.training.expected_batch,
                noise=noise,
                compute=compute,
            )


class Descent:
    """Stochastic gradient descent with momentum and weight decay, by torch's functional form.

    The optimizer objects of torch import its compiler when they are made: a second, and 100 MB, per process.
    """

    def __init__(self, network: nn.Module, *, training: Training) -> None:
        self._parameters: list[torch.Tensor] = list(network.parameters())
        self._momenta: list[torch.Tensor | None] = [None for _ in self._parameters]
        self._training = training

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters against ``p.grad``, which every one of them has."""
        sgd(
            self._parameters,
            [parameter.grad for parameter in self._parameters if parameter.grad is not None],
            self._momenta,
            lr=self._training.learning_rate,
            momentum=self._training.momentum,
            weight_decay=self._training.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            foreach=False,
        )


class PlainGradient:
    """The gradient of the mean over patients by ordinary backpropagation: no clipping, no noise.

    ``compute``: the type in which layers of many products are computed; None for that of the parameters.
    """

    def __init__(
        self, network: nn.Module, *, expected_batch: int, compute: torch.dtype | None = None
    ) -> None:
        self._network = network
        self._parameters = list(network.parameters())
        self._compute = compute
        self._memory_format = memory_format(network, compute)
        self._expected_batch = expected_batch

    def accumulate(self, batch: Batch) -> float:
        with torch.autocast("cpu", self._compute, enabled=self._compute is not None):
            outputs = self._network(*batch.laid_out(self._memory_format).inputs)
        outputs = outputs if self._compute is None else outputs.float()
        losses = patient_means(case_losses(outputs, batch.targets), batch)
        (losses.sum() / self._expected_batch).backward()  # type: ignore[no-untyped-call]
        return float(losses.detach().double().sum())

    def finish(self) -> float:
        for parameter in self._parameters:
            if parameter.grad is None:  # nobody was sampled
                parameter.grad = torch.zeros_like(parameter)
        return 0.0

    def close(self) -> None:
        return None
