"""Membership inference: was a patient's image in the training of a final model?

Many models are trained, each on about half of the same patients. Every model is attacked in two ways, by
somebody who knows the patients' images and labels, the plan and the code: by the loss alone, and by the
likelihood ratio of what models with and without the patient say, which the other models serve to learn.

Source: Yeom, Giacomelli, Fredrikson and Jha (2018), Privacy Risk in Machine Learning, for the loss; Carlini,
Chien, Nasr, Song, Terzis and Tramer (2022), Membership Inference Attacks From First Principles, for the
likelihood ratio (online, one variance for all patients) and for the true-positive rate as its measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from client.cohort import Part
from client.noise import Key, secure_key, seeded_key
from client.training import case_losses, to_input, train_by_plan
from common import calibration, model, privacy
from common.plan import DpSgd, Plan
from simulations.patients import phantom_part
from simulations.trials import MembershipTrial, changed, delta_of, without_privacy

Floats = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

MAX_FALSE_POSITIVE_RATE = 0.01
_LEAST_MODELS = 2
"""Models with and without a patient that a mean and a variance need."""

_LEAST_VARIANCE = 1e-12
"""For models that all say the same: a ratio stays a number."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How well an attack tells members from others; 0.5 and 0.01 are guesses.

    tpr_at_1_percent: the largest share of members found where at most 1 % of the others are taken for one.
    num_members, num_non_members: guesses over all models, a patient being one in each of them.
    """

    auc: float
    tpr_at_1_percent: float
    num_members: int
    num_non_members: int


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """The models of one plan under both attacks.

    accuracy: on patients that a model was not trained on, against their true labels; mean over the models.
    epsilon: what the training of one model costs a patient, None without privacy.
    """

    loss_threshold: Attack
    likelihood_ratio: Attack
    accuracy: float
    epsilon: float | None


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The same training with and without privacy."""

    private: Attacked
    none: Attacked


def run(
    plan: Plan, *, trial: MembershipTrial, on_model: Callable[[int, int], None] = lambda done, total: None
) -> Membership:
    """Trains the models with the plan's privacy and without, and attacks all of them.

    Args:
        plan: gives model, privacy, preprocessing and seed; the trial gives patients and training.
        on_model: told (done, total) of the models.

    Raises:
        ConfigError: the plan has no privacy.
    """
    delta_of(plan)
    private = changed(
        plan,
        image_size=trial.image_size,
        cases_per_patient=1,
        local_steps=trial.local_steps,
        expected_batch=trial.expected_batch,
        learning_rate=trial.learning_rate,
        momentum=trial.momentum,
    )
    group = _group(private, trial=trial)
    total = 2 * trial.num_models
    return Membership(
        none=_attacked(without_privacy(private), group, on_model=lambda done: on_model(done, total)),
        private=_attacked(private, group, on_model=lambda done: on_model(trial.num_models + done, total)),
    )


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Patients of one case each, in whose labels the wrong ones are, and who is in which model's training.

    is_wrong: bool, (patients,). is_member: bool, (models, patients).
    """

    part: Part
    is_wrong: Flags
    is_member: Flags


def _group(plan: Plan, *, trial: MembershipTrial) -> _Group:
    rng = np.random.default_rng([plan.seed, trial.num_patients])
    part = phantom_part(
        trial.num_patients,
        cases_per_patient=1,
        asked=plan.asked,
        image_size=2 * trial.image_size,
        seed=plan.seed,
    )
    is_wrong = rng.random(trial.num_patients) < trial.wrong_label_fraction
    return _Group(
        part=replace(part, targets=np.where(is_wrong, 1 - part.targets, part.targets)),
        is_wrong=is_wrong,
        is_member=rng.random((trial.num_models, trial.num_patients)) < 0.5,
    )


def _attacked(plan: Plan, group: _Group, *, on_model: Callable[[int], None]) -> Attacked:
    part, is_member = group.part, group.is_member
    nominal = max(1, len(part.patients) // 2)
    confidences, losses = [], []
    for number, included in enumerate(is_member, start=1):
        network = _trained(plan, _only(part, included), nominal_patients=nominal, number=number)
        confidence, loss = _told(network, part)
        confidences.append(confidence)
        losses.append(loss)
        on_model(number)
    confidence = np.stack(confidences)
    return Attacked(
        loss_threshold=attack(-np.stack(losses), is_member=is_member),
        likelihood_ratio=attack(likelihood_ratios(confidence, is_member=is_member), is_member=is_member),
        accuracy=accuracy(confidence, is_wrong=group.is_wrong, is_member=is_member),
        epsilon=_epsilon(plan, nominal_patients=nominal),
    )


def _only(part: Part, included: Flags) -> Part:
    patients = tuple(part.patients[int(number)] for number in np.flatnonzero(included))
    return replace(part, patients=patients)


def _trained(plan: Plan, part: Part, *, nominal_patients: int, number: int) -> nn.Module:
    network = model.build(plan)
    mechanism = calibration.mechanism(plan, nominal_patients=nominal_patients)
    train_by_plan(network, part, plan=plan, mechanism=mechanism, key=key_of(plan, number=number))
    return network


def key_of(plan: Plan, *, number: int) -> Key:
    """Returns the key of one training, as the plan's randomness has it."""
    if plan.randomness == "secure":
        return secure_key()
    return seeded_key(seed=plan.seed, plan_hash=plan.hash, server_round=number, site="attack")


def _epsilon(plan: Plan, *, nominal_patients: int) -> float | None:
    if not isinstance(plan.privacy, DpSgd):
        return None
    spend = calibration.mechanism(plan, nominal_patients=nominal_patients).training(plan.num_steps)
    return privacy.epsilon([spend], delta=plan.privacy.delta).value


def _told(network: nn.Module, part: Part) -> tuple[Floats, Floats]:
    """Returns confidence in the label (the log of its odds) and loss of each case of one."""
    with torch.no_grad():
        outputs = network.eval()(to_input(part.images)).double()
        losses = case_losses(outputs, torch.from_numpy(part.targets)).numpy()
    logits = outputs[:, 0].numpy()
    return np.where(part.targets == 1, logits, -logits), losses


def accuracy(confidence: Floats, *, is_wrong: Flags, is_member: Flags) -> float:
    """Returns how often models are right about patients that they were not trained on.

    Args:
        confidence: float64, (models, patients), log odds of the label in the case table.
        is_wrong: bool, (patients,), whether that label is not the true one.
        is_member: bool, (models, patients).
    """
    is_right = np.where(is_wrong, confidence < 0, confidence > 0)
    return float(is_right[~is_member].mean())


def likelihood_ratios(confidence: Floats, *, is_member: Flags) -> Floats:
    """Returns the log likelihood ratio of "trained with" to "trained without" for every model and patient.

    Each model is judged by all the others. What they say of a patient is taken for normal, with one mean for
    those trained with the patient, one for those trained without, and two variances for all patients. Whose
    means cannot be had is given 0: whether that happens tells nothing about the model that is judged.

    Args:
        confidence: float64, (models, patients), log odds of the patient's label.
        is_member: bool, (models, patients).

    Returns:
        float64, (models, patients).
    """
    rows = []
    for number in range(len(confidence)):
        others = np.arange(len(confidence)) != number
        known, flags = confidence[others], is_member[others]
        with_mean, with_variance = _normal(known, flags)
        without_mean, without_variance = _normal(known, ~flags)
        ratio = (confidence[number] - without_mean) ** 2 / without_variance
        ratio -= (confidence[number] - with_mean) ** 2 / with_variance
        counts = np.minimum(flags.sum(axis=0), (~flags).sum(axis=0))
        level = np.log(without_variance / with_variance)
        rows.append(np.where(counts >= _LEAST_MODELS, (ratio + level) / 2, 0.0))
    return np.stack(rows)


def _normal(values: Floats, chosen: Flags) -> tuple[Floats, float]:
    """Returns the mean of the chosen values of each column, and their variance about it over all columns."""
    counts = np.maximum(chosen.sum(axis=0), 1)
    means = (values * chosen).sum(axis=0) / counts
    squares = ((values - means) ** 2 * chosen).sum()
    freedom = max(1, int((counts - 1).sum()))
    return means, max(float(squares) / freedom, _LEAST_VARIANCE)


def attack(scores: Floats, *, is_member: Flags) -> Attack:
    """Returns how well scores tell members, who should have the higher ones, from others; ties count half.

    Both arrays have any one shape; there must be a member and another.

    >>> scores = np.array([3.0, 2.0, 1.0, 0.0])
    >>> found = attack(scores, is_member=np.array([True, False, True, False]))
    >>> found.auc, found.tpr_at_1_percent
    (0.75, 0.5)
    """
    members, others = scores[is_member], np.sort(scores[~is_member])
    below, not_above = (np.searchsorted(others, members, side=side) for side in ("left", "right"))
    allowed = int(MAX_FALSE_POSITIVE_RATE * len(others))
    threshold = others[len(others) - 1 - allowed]
    return Attack(
        auc=float(np.mean(below + not_above) / 2 / len(others)),
        tpr_at_1_percent=float((members > threshold).mean()),
        num_members=len(members),
        num_non_members=len(others),
    )
