from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from client.noise import seeded_key
from common.errors import ConfigError
from common.plan import Plan
from simulations import membership
from simulations.membership import accuracy, attack, key_of, likelihood_ratios
from simulations.patients import phantom_part
from simulations.trials import MembershipTrial, changed, without_privacy
from tests.plans import plan

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

SMALL: dict[str, Any] = {"randomness": "seeded", "model__channels": (8, 16), "model__groups": 8}
TRIAL = MembershipTrial(
    num_patients=40,
    num_models=6,
    image_size=16,
    wrong_label_fraction=0.3,
    local_steps=120,
    expected_batch=12,
    learning_rate=0.05,
    momentum=0.9,
)


def auc_by_pairs(scores: Floats, is_member: Flags) -> float:
    """The share of pairs in the right order, ties counted half; by the definition."""
    pairs = scores[is_member][:, None] - scores[~is_member][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        is_member = rng.random(60) < 0.4
        scores = rng.integers(0, 12, 60) + 2.0 * is_member
        assert attack(scores, is_member=is_member).auc == pytest.approx(auc_by_pairs(scores, is_member))


def test_figures_of_two_normal_distributions_are_those_of_their_closed_forms() -> None:
    """Apart by d standard deviations: the area is Phi(d / sqrt 2), the rate at 1 % is Phi(d - 2.326)."""
    rng = np.random.default_rng(2)
    is_member = np.arange(40_000) < 20_000
    found = attack(rng.standard_normal(40_000) + 1.5 * is_member, is_member=is_member)
    assert found.auc == pytest.approx(0.8556, abs=0.01)
    assert found.tpr_at_1_percent == pytest.approx(0.2043, abs=0.025)
    assert (found.num_members, found.num_non_members) == (20_000, 20_000)


def test_rate_at_one_percent_counted_by_hand() -> None:
    """Of 200 others two may be above the threshold: the third highest, 197, is not passed by a tie."""
    others, members = np.arange(200.0), np.array([196.0, 197.0, 197.5, 198.0, 300.0])
    flags = np.arange(205) >= 200
    found = attack(np.concatenate([others, members]), is_member=flags)
    assert found.tpr_at_1_percent == pytest.approx(3 / 5)


def test_fewer_than_a_hundred_others_allow_no_false_positive() -> None:
    others, members = np.arange(99.0), np.array([97.5, 98.0, 98.5, 99.0])
    flags = np.arange(103) >= 99
    assert attack(np.concatenate([others, members]), is_member=flags).tpr_at_1_percent == 0.5


def test_scores_that_know_nothing_are_guesses() -> None:
    rng = np.random.default_rng(3)
    is_member = rng.random((50, 200)) < 0.5
    found = attack(rng.standard_normal((50, 200)), is_member=is_member)
    assert abs(found.auc - 0.5) < 4 * np.sqrt(1 / 12 / 5000 * 2)
    assert abs(found.tpr_at_1_percent - 0.01) < 4 * np.sqrt(0.01 * 0.99 / 5000 * 2)
    same = attack(np.zeros((50, 200)), is_member=is_member)
    assert (same.auc, same.tpr_at_1_percent) == (0.5, 0.0)


def told(rng: np.random.Generator, is_member: Flags, *, effect: float) -> Floats:
    """What models say of patients: each patient has a level of their own, far more apart than the effect."""
    levels = 10 * rng.standard_normal(is_member.shape[1])
    noise: Floats = rng.standard_normal(is_member.shape)
    return levels + effect * is_member + noise


def test_likelihood_ratio_of_a_model_that_ignores_membership_is_a_guess() -> None:
    """Also where few models are known: counts do not give away whether the judged one had a patient."""
    rng = np.random.default_rng(4)
    areas = []
    for _ in range(40):
        is_member = rng.random((6, 200)) < 0.5
        ratios = likelihood_ratios(told(rng, is_member, effect=0.0), is_member=is_member)
        areas.append(attack(ratios, is_member=is_member).auc)
    assert abs(np.mean(areas) - 0.5) < 4 * np.std(areas) / np.sqrt(len(areas))


def test_likelihood_ratio_finds_members_that_one_threshold_for_all_cannot() -> None:
    rng = np.random.default_rng(5)
    is_member = rng.random((30, 300)) < 0.5
    confidence = told(rng, is_member, effect=3.0)
    plain = attack(confidence, is_member=is_member)
    sharp = attack(likelihood_ratios(confidence, is_member=is_member), is_member=is_member)
    assert plain.auc < 0.62
    assert sharp.auc == pytest.approx(0.983, abs=0.01), "Phi(3 / sqrt 2), as if the levels were known"


def test_likelihood_ratio_approaches_that_of_known_normal_distributions() -> None:
    rng = np.random.default_rng(6)
    is_member = rng.random((400, 20)) < 0.5
    spread = np.where(is_member, 0.5, 2.0)
    confidence = 4.0 * is_member + spread * rng.standard_normal(is_member.shape)
    found = likelihood_ratios(confidence, is_member=is_member)
    known = np.log(2.0 / 0.5) + (confidence / 2) ** 2 / 2 - ((confidence - 4) / 0.5) ** 2 / 2
    assert np.median(np.abs(found - known) / (1 + np.abs(known))) < 0.1


def test_patient_whom_the_others_cannot_judge_gets_no_score() -> None:
    """With one other model trained without the patient there is no mean to speak of."""
    is_member = np.array([[True], [True], [True], [True], [False]])
    ratios = likelihood_ratios(np.arange(5.0)[:, None], is_member=is_member)
    assert ratios[:, 0].tolist() == [0.0] * 5


@pytest.fixture(scope="module")
def found() -> membership.Membership:
    return membership.run(plan(**SMALL), trial=TRIAL)


@pytest.mark.slow
def test_model_without_privacy_is_found_out_and_the_private_one_is_less(found: membership.Membership) -> None:
    assert found.none.loss_threshold.auc > 0.65
    assert found.none.likelihood_ratio.auc > 0.65
    for name in ("loss_threshold", "likelihood_ratio"):
        plain, private = getattr(found.none, name), getattr(found.private, name)
        assert private.auc < plain.auc - 0.05
        assert private.tpr_at_1_percent <= np.exp(3) * 0.01 + 1e-4 + 0.05, "what epsilon 3 allows, and chance"
        assert plain.num_members + plain.num_non_members == 40 * 6
        assert (private.num_members, private.num_non_members) == (plain.num_members, plain.num_non_members)
    assert 2.97 < (found.private.epsilon or 0) <= 3.0
    assert found.none.epsilon is None


def test_models_are_judged_by_true_labels_on_patients_they_have_not_seen() -> None:
    """The first has not seen patients 1 and 2, the second not 0: right twice, once against the table."""
    confidence = np.array([[-9.0, 2.0, -1.0], [-0.5, -9.0, -9.0]])
    is_member = np.array([[True, False, False], [False, True, True]])
    is_wrong = np.array([False, False, True])
    assert accuracy(confidence, is_wrong=is_wrong, is_member=is_member) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_model_without_privacy_has_learned_something(found: membership.Membership) -> None:
    assert 0.6 < found.none.accuracy < 1


@pytest.mark.slow
def test_same_seed_gives_the_same_figures() -> None:
    brief = TRIAL.model_copy(update={"local_steps": 2, "num_models": 5})
    told_models: list[tuple[int, int]] = []
    first, again = (
        membership.run(
            plan(**SMALL), trial=brief, on_model=lambda done, total: told_models.append((done, total))
        )
        for _ in range(2)
    )
    assert first == again
    assert told_models[:10] == [(done, 10) for done in range(1, 11)]
    assert membership.run(plan(**SMALL, seed=1), trial=brief) != first


def test_trial_changes_nothing_but_size_training_and_rounds() -> None:
    asked = plan(**SMALL, seed=5, privacy__target_epsilon=2.0)
    made = changed(asked, image_size=24, local_steps=7, expected_batch=3, learning_rate=0.01, momentum=0.5)
    assert (made.num_steps, made.training.expected_batch, made.preprocessing.size) == (7, 3, (24, 24))
    assert (made.model, made.privacy, made.seed) == (asked.model, asked.privacy, asked.seed)
    plain = without_privacy(made)
    assert plain.privacy.mechanism == "none"
    assert (plain.training, plain.model, plain.seed) == (made.training, made.model, made.seed)
    assert Plan.from_json(plain.to_json()) == plain


def test_keys_are_fresh_unless_the_plan_is_seeded() -> None:
    seeded, secure = plan(**SMALL), plan(randomness="secure")
    assert key_of(seeded, number=3) == seeded_key(
        seed=seeded.seed, plan_hash=seeded.hash, server_round=3, site="attack"
    )
    assert key_of(seeded, number=3) != key_of(seeded, number=4)
    assert key_of(secure, number=3) != key_of(secure, number=3)


def test_phantom_patients_are_as_a_site_would_have_them() -> None:
    asked = plan(preprocessing__size=(16, 16)).asked
    part = phantom_part(30, cases_per_patient=2, asked=asked, image_size=32, seed=1)
    assert part.images.shape == (60, 1, 16, 16) and part.images.dtype == np.uint8
    assert [own.tolist() for own in part.patients] == [[2 * n, 2 * n + 1] for n in range(30)]
    labels = part.targets.reshape(30, 2)
    assert (labels[:, 0] == labels[:, 1]).all() and 5 < labels[:, 0].sum() < 25
    again = phantom_part(30, cases_per_patient=2, asked=asked, image_size=32, seed=1)
    assert np.array_equal(part.images, again.images)
    other = phantom_part(30, cases_per_patient=2, asked=asked, image_size=32, seed=2)
    assert not np.array_equal(part.images, other.images)


def test_plan_without_privacy_has_nothing_to_attack() -> None:
    with pytest.raises(ConfigError, match="privacy=dp_sgd"):
        membership.run(plan(privacy="none"), trial=TRIAL)
