"""Classes of which a site has too few patients to learn, to show through the noise, or to be measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from client.findings import Finding
from client.site import SiteSettings
from common.calibration import measure_noise_std, mechanism
from common.errors import PrivacyTargetError
from common.plan import DpSgd, Plan

LEAST_PATIENTS = 10
"""In the training part; fewer patients are remembered rather than learned from, and protected the worst:
all that is released of the class is about them."""


def rare(
    settings: SiteSettings,
    *,
    patients: Mapping[str, Mapping[str, int]],
    plan: Plan | None,
) -> list[Finding]:
    """Returns a finding for each rule that some class breaks.

    Args:
        patients: by part and class, the number of patients.
        plan: only with it is it known how much noise there will be.
    """
    found = list(_rare_to_learn(settings, patients["train"]))
    if plan is None or not isinstance(plan.privacy, DpSgd) or settings.data == "public":
        return found
    try:
        return [
            *found,
            *_drowned(settings, patients["train"], plan),
            *_untested(settings, patients["test"], plan),
        ]
    except PrivacyTargetError:  # the plan cannot be run here at all, which inspection says
        return found


def _rare_to_learn(settings: SiteSettings, patients: Mapping[str, int]) -> Iterator[Finding]:
    if settings.role != "training":
        return
    for name, number in patients.items():
        if number < LEAST_PATIENTS:
            yield _finding("rare_to_learn", name, number, f"fewer than {LEAST_PATIENTS}")


def _drowned(settings: SiteSettings, patients: Mapping[str, int], plan: Plan) -> Iterator[Finding]:
    """A class can move the sum of a step by at most its expected number of drawn patients, in units of
    ``max_grad_norm``; over all steps the noise in any one direction is the noise multiplier times the root
    of their number. Below that the class is not heard from this site."""
    if settings.role != "training" or plan.num_steps == 0 or plan.landmarks is not None:
        return
    chosen = mechanism(plan, nominal_patients=settings.nominal_patients)
    needed = chosen.noise_multiplier / (chosen.sample_rate * math.sqrt(plan.num_steps))
    for name, number in patients.items():
        if 0 < number < needed:
            yield _finding("drowned", name, number, f"the noise is as strong as {needed:.0f}")


def _untested(settings: SiteSettings, patients: Mapping[str, int], plan: Plan) -> Iterator[Finding]:
    """Compares the patients of a class with the noise in the sum of what is released about the class."""
    if not plan.evaluation.test_at_end or "test" not in settings.split.parts:
        return
    std = measure_noise_std(plan, nominal_patients=settings.nominal_patients, part="test")
    noise = std * math.sqrt(1 if plan.target == "mask" else plan.evaluation.bins)
    for name, number in patients.items():
        if number < noise:
            yield _finding("rare_to_test", name, number, f"the noise is as large as {noise:.0f}")


def _finding(code: str, name: str, number: int, why: str) -> Finding:
    noun = "patient" if number == 1 else "patients"
    return Finding(code=code, level="warning", cases=0, example=name, note=f"{name}: {number} {noun}, {why}")
