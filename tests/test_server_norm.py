from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import training
from client.cohort import open_cohort
from client.noise import seeded_key
from common import model
from common.calibration import largest_noise_multiplier, mechanism, sample_rate
from common.plan import Plan
from common.quantisation import largest_gain
from server.norm import largest_norm
from tests.plans import TINY, plan
from tests.sites import write_site

FEW: dict[str, Any] = {**TINY, "rounds": 2, "training__local_steps": 4, "training__expected_batch": 8}


def parameters_of(asked: Plan) -> model.FlatArray:
    return model.flatten(model.build(asked))


def longest(asked: Plan, nominal: int = 20) -> float:
    return largest_norm(asked, nominal_patients=nominal, parameters=parameters_of(asked))


CHANGES: list[dict[str, Any]] = [
    {},
    {"training__momentum": 0.9, "training__learning_rate": 0.05},
    {"training__weight_decay": 0.1, "training__proximal_mu": 0.5},
    {"training__expected_batch": 100},
    {"privacy__target_epsilon": 1000, "privacy__max_grad_norm": 1e-3, "training__learning_rate": 5.0},
    {"privacy__loss_noise_ratio": 1.0},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.slow
def test_no_honest_update_is_longer(changes: dict[str, Any], tmp_path: Path) -> None:
    """Also where there are twice as many patients as the site says, and every gradient is clipped."""
    asked = plan(**(FEW | changes))
    site = write_site(tmp_path / "north", size=8, num_patients=60, nominal_patients=20)
    part = open_cohort(site, asked=asked.asked).parts["train"]
    assert len(part.patients) > 20
    network, norms = model.build(asked), []
    for number in range(5):
        model.load(network, parameters_of(asked))
        key = seeded_key(seed=number, plan_hash=asked.hash, server_round=1, site="north")
        chosen = mechanism(asked, nominal_patients=20)
        trained = training.train_by_plan(network, part, plan=asked, mechanism=chosen, key=key)
        norms.append(float(np.linalg.norm(trained.update)))
    assert max(norms) < longest(asked)
    assert longest(asked) < 100 * max(norms), "a bound that tells something"


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8"])
def test_the_bound_is_of_what_is_sent_and_error_feedback_lengthens_that(form: Any) -> None:
    assert longest(plan(**FEW, exchange__update=form)) == pytest.approx(
        longest(plan(**FEW)) * largest_gain(form)
    )


def test_one_step_is_the_closed_form() -> None:
    asked = plan(
        **FEW | {"training__local_steps": 1, "training__learning_rate": 0.25, "privacy__max_grad_norm": 2.0}
    )
    log = math.log(1e12)
    drawn = 16 + log / 3 + math.sqrt(log**2 / 9 + 2 * log * 16)
    sigma = largest_noise_multiplier(asked, nominal_patients=20) * math.sqrt(
        1 + asked.privacy.loss_noise_ratio**-2
    )  # type: ignore[union-attr]
    noise = sigma * (math.sqrt(len(parameters_of(asked))) + math.sqrt(2 * log))
    assert longest(asked) == pytest.approx(1.001 * 0.25 * 2.0 * (drawn + noise) / 8)


def test_without_privacy_nothing_is_known_of_an_update() -> None:
    assert longest(plan(**FEW, privacy="none")) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("nominal", [1, 8, 20, 1000, 10**7, 2**53])
def test_the_multiplier_that_is_computed_at_once_is_never_below_the_sites_own(nominal: int) -> None:
    asked = plan(**FEW)
    quick = largest_noise_multiplier(asked, nominal_patients=nominal)
    assert quick >= mechanism(asked, nominal_patients=min(nominal, 10**7)).noise_multiplier or nominal > 10**7
    assert 0 < sample_rate(asked, nominal_patients=nominal) <= 1


def test_a_plan_that_names_its_multiplier_is_taken_by_its_word() -> None:
    asked = plan(**FEW, privacy__target_epsilon=None, privacy__noise_multiplier=1.5)
    assert largest_noise_multiplier(asked, nominal_patients=20) == 1.5
