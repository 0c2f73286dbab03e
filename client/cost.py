"""What a run of a plan costs this site, before anything is charged: a function of plan and settings only."""

from __future__ import annotations

import math

from client.site import Site
from common.calibration import run_spends
from common.errors import PrivacyTargetError
from common.plan import NoPrivacy, Plan
from common.privacy import Spend, worst_epsilon


def planned_spends(site: Site, plan: Plan) -> dict[str, tuple[Spend, ...]]:
    """Returns what a run of the plan will charge this site, by part.

    Raises:
        PrivacyTargetError: no noise that the plan allows gives its target here.
    """
    settings = site.settings
    if settings.data == "public":
        return {}
    parts = [part for part in settings.split.parts if part != "train" or settings.role == "training"]
    return run_spends(plan, nominal_patients=settings.nominal_patients, parts=parts)


def run_epsilon(site: Site, plan: Plan) -> float:
    """Returns what one run of the plan costs a patient of this site alone, at the site's delta.

    Infinite where nothing bounds it: without privacy, with seeded noise, with a target out of reach. 0 for
    public data.
    """
    if site.settings.data == "public":
        return 0.0
    if isinstance(plan.privacy, NoPrivacy) or plan.randomness == "seeded":
        return math.inf
    try:
        return worst_epsilon(planned_spends(site, plan), delta=site.settings.delta).value
    except PrivacyTargetError:
        return math.inf
