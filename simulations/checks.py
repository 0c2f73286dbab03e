"""Tests of the mechanism itself: is the noise what is charged, is a patient's influence bounded, are patients
drawn independently. They look at what an implementation does, not at how.

An audit sees only whether epsilon as a whole can be true; these see much smaller faults, one kind each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.clipping import split_noise
from client.cohort import Part
from client.noise import Key
from client.training import PoissonSampler
from common import model
from common.calibration import Mechanism
from common.model import FlatArray
from common.plan import DpSgd, Plan
from simulations.canaries import Canaries, nobody
from simulations.implementation import Implementation

Floats = NDArray[np.float64]

_ROUNDING = 1e-3  # single precision, over a sum of dozens of patients and thousands of parameters
_NUM_OTHERS, _NUM_PROBES = 24, 8
_NUM_STEPS = 200
_RATE_WHERE_ALL_ARE_DRAWN = 0.2  # where a plan draws everybody, independence could not be seen


@dataclass(frozen=True, kw_only=True)
class Check:
    """A test of the mechanism and what it found. ``at_least``: ``limit`` is a lower one."""

    name: str
    meaning: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Says whether nothing is wrong; a value that is not a number never passes."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


class Silence:
    """Draws zeros, in place of the random stream of the noise."""

    def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Any:
        return 0.0 if size is None else np.zeros(size, dtype=dtype)

    def add_to(self, arrays: Sequence[FlatArray], *, std: float, threads: int) -> None:
        """Adds nothing."""


def noise_scale(
    plan: Plan,
    part: Part,
    *,
    implementation: Implementation,
    mechanism: Mechanism,
    canaries: Canaries,
    key: Key,
    level: float,
) -> Check:
    """Compares a released update, less the same without noise, with the Gaussian that is charged.

    One step, since later ones depend on the noise of earlier ones.

    Args:
        level: probability of a false alarm.
    """
    assert isinstance(plan.privacy, DpSgd)
    one_step = _changed(plan, local_steps=1)
    silent = _with_noise(implementation, Silence())
    noised, known = (
        how.train(
            model.build(plan), part, plan=one_step, mechanism=mechanism, canaries=canaries, key=key
        ).update.astype(np.float64)
        for how in (implementation, silent)
    )
    multiplier, _ = split_noise(mechanism.noise_multiplier, loss_noise_ratio=plan.privacy.loss_noise_ratio)
    step = plan.training.learning_rate / plan.training.expected_batch
    distance = kolmogorov(noised - known, std=step * multiplier * plan.privacy.max_grad_norm)
    return Check(
        name="noise",
        meaning="Distance of the released noise from the Gaussian that is charged (Kolmogorov-Smirnov)",
        measured=distance,
        limit=kolmogorov_limit(level),
    )


def sensitivity(plan: Plan, part: Part, *, implementation: Implementation, key: Key) -> Check:
    """Adds one patient and looks how far the sum without noise moves: by ``max_grad_norm`` at most.

    The patients added are real ones, and canaries with as many cases as a patient may contribute.
    """
    assert isinstance(plan.privacy, DpSgd)
    first_label = len(plan.classes)
    quiet = _with_noise(_drawing_all(implementation), Silence())
    book = _changed(plan, local_steps=1, expected_batch=1, learning_rate=1.0)
    book = book.model_copy(update={"training": book.training.model_copy(update=_NO_MEMORY)})
    mechanism = Mechanism(sample_rate=1.0, noise_multiplier=1.0, evaluation_noise_multiplier={})

    def total(asked: Part, canaries: Canaries) -> Floats:
        network = model.build(plan)
        trained = quiet.train(network, asked, plan=book, mechanism=mechanism, canaries=canaries, key=key)
        return trained.update.astype(np.float64)

    absent = nobody(first_label=first_label)
    others, probes = part.patients[:_NUM_OTHERS], part.patients[_NUM_OTHERS:][:_NUM_PROBES]
    alone = _part(part, others)
    without = total(alone, absent)
    moved = [total(_part(part, (*others, probe)), absent) - without for probe in probes]
    for cases_each in {1, plan.training.cases_per_patient}:
        canary = Canaries(
            coordinates=np.array([0]),
            included=np.array([True]),
            first_label=first_label,
            cases_each=cases_each,
        )
        moved.append(total(canary.joined(alone), canary) - without)
    largest = max(float(np.linalg.norm(one)) for one in moved) / plan.privacy.max_grad_norm
    return Check(
        name="sensitivity",
        meaning="How far one patient moves the sum without noise, over the clipping bound",
        measured=largest,
        limit=1 + _ROUNDING,
    )


def participation(
    plan: Plan, part: Part, *, implementation: Implementation, mechanism: Mechanism, key: Key, level: float
) -> Check:
    """Compares sizes of batches and participations of patients with the binomial numbers that are charged.

    Args:
        level: probability of a false alarm; it holds for enough patients and steps, since sums of squares are
            taken for chi-square.
    """
    rate = mechanism.sample_rate if mechanism.sample_rate < 1 else _RATE_WHERE_ALL_ARE_DRAWN
    asked = Mechanism(sample_rate=rate, noise_multiplier=1.0, evaluation_noise_multiplier={})
    sampler = implementation.sampler_of(plan, asked, key=key)
    owner = {int(case): number for number, own in enumerate(part.patients) for case in own}
    drawn = np.zeros((_NUM_STEPS, len(part.patients)), dtype=np.int64)
    for step in range(_NUM_STEPS):
        for cases in sampler(part.patients):
            drawn[step, owner[int(cases[0])]] += 1
    p_values = [dispersion(drawn.sum(axis=1), trials=len(part.patients), rate=rate)]
    p_values.append(dispersion(drawn.sum(axis=0), trials=_NUM_STEPS, rate=rate))
    smallest = min(1.0, len(p_values) * min(p_values))
    return Check(
        name="participation",
        meaning="Probability of such batch sizes and participations if patients are drawn independently",
        measured=smallest,
        limit=level,
        at_least=True,
    )


def kolmogorov(values: NDArray[np.floating], *, std: float) -> float:
    """Returns the Kolmogorov-Smirnov distance of values to N(0, std^2), times the root of their number."""
    ordered = torch.from_numpy(np.sort(values.astype(np.float64)) / std)
    normal = torch.special.ndtr(ordered).numpy()
    steps = np.arange(len(normal) + 1) / len(normal)
    distance = max((normal - steps[:-1]).max(), (steps[1:] - normal).max())
    return float(distance * math.sqrt(len(normal)))


def kolmogorov_limit(level: float) -> float:
    """Returns what the distance exceeds with probability ``level`` at most, for many values.

    The first term of Kolmogorov's series, which overstates the probability.

    >>> round(kolmogorov_limit(1e-3), 2)
    1.95
    """
    return math.sqrt(math.log(2 / level) / 2)


def dispersion(counts: NDArray[np.int64], *, trials: int, rate: float) -> float:
    """Returns the two-sided p-value of the spread of counts that should be Binomial(trials, rate).

    Numbers that vary too little are as suspicious as those that vary too much.
    """
    statistic = float(((counts - trials * rate) ** 2).sum() / (trials * rate * (1 - rate)))
    half = torch.tensor(len(counts) / 2, dtype=torch.float64)
    place = torch.tensor(statistic / 2, dtype=torch.float64)
    tails = (torch.special.gammainc(half, place), torch.special.gammaincc(half, place))
    return min(1.0, 2 * min(float(tail) for tail in tails))


_NO_MEMORY = {"momentum": 0.0, "weight_decay": 0.0}


def _changed(plan: Plan, **training: Any) -> Plan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=training)})


def _part(part: Part, patients: Sequence[NDArray[np.int64]]) -> Part:
    return replace(part, patients=tuple(patients))


def _with_noise(implementation: Implementation, noise: Silence) -> Implementation:
    return Implementation(
        sampler=implementation.sampler,
        gradient=implementation.gradient,
        noise=lambda stream: noise,
        book=implementation.book,
    )


def _drawing_all(implementation: Implementation) -> Implementation:
    """How patients are drawn is another check's business."""
    return Implementation(
        sampler=PoissonSampler, gradient=implementation.gradient, noise=implementation.noise
    )
