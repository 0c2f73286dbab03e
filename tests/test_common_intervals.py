from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from common import metrics
from common.bins import bin_centres
from common.metrics import Histogram, Scores
from tests.scores import binary


def binormal(rng, *, auroc, positives, negatives, sharpness=1.0, shift=0.0):
    """Scores that are calibrated where both classes are equally common, unless sharpened or shifted."""
    distance = NormalDist().inv_cdf(auroc) * math.sqrt(2)
    latent = np.concatenate([rng.normal(size=negatives), rng.normal(size=positives) + distance])
    logits = sharpness * distance * (latent - distance / 2) + shift
    targets = np.repeat([0, 1], [negatives, positives])
    return binary(1 / (1 + np.exp(-logits)), targets)


def released_intervals(
    *, auroc, positives, negatives, noise_std, repetitions, seed=0, sharpness=1.0, shift=0.0, bins=10
):
    """Yields the released AUROC and its interval over many draws of patients and noise."""
    rng = np.random.default_rng(seed)
    for _ in range(repetitions):
        exact = binormal(
            rng, auroc=auroc, positives=positives, negatives=negatives, sharpness=sharpness, shift=shift
        )
        counts = exact.histogram(bins).counts
        noised = Histogram(counts=counts + noise_std * rng.normal(size=counts.shape))
        yield metrics.auroc(noised), metrics.interval(noised, noise_std=noise_std)


def coverage(*, auroc, **settings):
    """Fraction of 95 % intervals that hold the exact AUROC of the population, not that of binned scores."""
    found = [limits for _, limits in released_intervals(auroc=auroc, **settings) if limits is not None]
    return sum(low <= auroc <= high for low, high in found) / len(found)


def equally_wide_and_tied(exact, bins=10):
    """The AUROC of a histogram over equally wide bins of the score, where a bin's cases count as ties."""
    index = np.minimum(np.floor(exact.scores[:, 0].astype(float) * bins), bins - 1)
    return metrics.auroc(binary(index / bins, exact.targets[:, 0]))


@pytest.mark.parametrize(("sharpness", "shift"), [(1.0, 0.0), (2.0, 0.0), (1.0, -1.5), (3.0, 1.5)])
@pytest.mark.parametrize("auroc", [0.9, 0.95, 0.99])
def test_ten_bins_read_the_auroc_closer_than_equally_wide_ones(auroc, sharpness, shift):
    rng = np.random.default_rng(0)
    exact = binormal(rng, auroc=auroc, positives=20_000, negatives=20_000, sharpness=sharpness, shift=shift)
    truth = metrics.auroc(exact)
    bias = abs(metrics.auroc(exact.histogram(10)) - truth)
    before = abs(equally_wide_and_tied(exact) - truth)
    assert bias < 0.4 * before and bias < (0.004 if sharpness <= 1 else 0.011)


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("auroc", [0.9, 0.95, 0.99])
def test_ten_bins_read_a_good_model_within_six_thousandths(auroc, sharpness, shift):
    exact = binormal(
        np.random.default_rng(1),
        auroc=auroc, positives=40_000, negatives=40_000, sharpness=sharpness, shift=shift,
    )  # fmt: skip
    assert abs(metrics.auroc(exact.histogram(10)) - metrics.auroc(exact)) < 0.006
    if auroc == 0.95 and sharpness == 2.0:
        assert equally_wide_and_tied(exact) - metrics.auroc(exact) < -0.02


@pytest.mark.parametrize("auroc", [0.7, 0.8])
def test_ten_bins_read_a_calibrated_model_of_little_use_within_five_thousandths(auroc):
    exact = binormal(np.random.default_rng(0), auroc=auroc, positives=20_000, negatives=20_000)
    assert abs(metrics.auroc(exact.histogram(10)) - metrics.auroc(exact)) < 0.005


def test_interval_of_noised_counts_covers_the_truth_and_one_that_ignores_the_noise_does_not():
    many = coverage(auroc=0.9, positives=60, negatives=90, noise_std=3, repetitions=200, seed=1)
    assert many >= 0.90
    rng = np.random.default_rng(1)
    counts = binormal(rng, auroc=0.9, positives=60, negatives=90).histogram(10).counts
    blind = metrics.interval(Histogram(counts=counts))
    aware = metrics.interval(Histogram(counts=counts), noise_std=3)
    assert aware[1] - aware[0] > 1.5 * (blind[1] - blind[0])


def test_interval_covers_the_exact_auroc_where_equally_wide_bins_miss_it():
    """Many patients of a good, sure model: the case in which the width of the bins is what matters."""
    settings = {"auroc": 0.95, "positives": 1500, "negatives": 1500, "sharpness": 2.0}
    assert coverage(**settings, noise_std=4, repetitions=200) >= 0.93
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(40):
        before = equally_wide_and_tied(binormal(rng, **settings))
        _, (low, high) = next(released_intervals(**settings, noise_std=4, repetitions=1))
        misses += before + (high - low) / 2 < 0.95
    assert misses == 40


@pytest.mark.slow
@pytest.mark.parametrize("auroc", [0.7, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(
    ("positives", "negatives", "noise_std"),
    [(100, 100, 2), (50, 200, 4), (400, 400, 6), (2000, 2000, 10), (400, 400, 0)],
)
def test_interval_covers_the_exact_auroc_as_often_as_it_says(auroc, positives, negatives, noise_std):
    found = coverage(
        auroc=auroc, positives=positives, negatives=negatives, noise_std=noise_std, repetitions=1000
    )
    assert found >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("auroc", [0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(("sharpness", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, -1.5), (2.0, -1.5)])
def test_interval_covers_also_where_scores_are_shy_or_sure_or_to_one_side(auroc, sharpness, shift):
    found = coverage(
        auroc=auroc, positives=400, negatives=400, noise_std=6, repetitions=1000,
        sharpness=sharpness, shift=shift,
    )  # fmt: skip
    assert found >= 0.93


def test_limits_of_exact_scores_lie_where_newcombes_condition_is_an_equality():
    normal, abnormal = [33.0, 6, 6, 11, 2], [3.0, 2, 2, 11, 33]  # rating data of Hanley and McNeil 1982
    ratings = np.repeat(np.tile([0.1, 0.3, 0.5, 0.7, 0.9], 2), np.array(normal + abnormal, dtype=int))
    rated = binary(ratings, np.repeat([0, 1], [58, 51]))
    point = metrics.auroc(rated)
    assert point == pytest.approx(0.893, abs=5e-4)
    for limit in metrics.interval(rated):
        others = (58 + 51) / 2 - 1
        spread = 1 + others * (1 - limit) / (2 - limit) + others * limit / (1 + limit)
        variance = limit * (1 - limit) * spread / (58 * 51)
        assert abs(point - limit) == pytest.approx(1.959964 * math.sqrt(variance), abs=3e-4)


def test_interval_is_widened_where_the_data_vary_more_than_the_model():
    """A rare, widely spread class: DeLong's variance is the larger one."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        latent = np.concatenate([rng.normal(size=200), 2.27 + 2.5 * rng.normal(size=50)])
        low, high = metrics.interval(binary(1 / (1 + np.exp(-latent)), np.repeat([0, 1], [200, 50])))
        inside += low <= NormalDist().cdf(2.27 / math.hypot(1, 2.5)) <= high
    assert inside / 300 > 0.91


def test_interval_does_not_collapse_where_the_ranking_is_perfect():
    low, high = metrics.interval(binary([0.1] * 20 + [0.9] * 20, [0] * 20 + [1] * 20))
    assert 0.75 < low < 0.95 and high == 1.0


def test_interval_does_not_collapse_where_noise_has_put_more_pairs_in_order_than_there_are():
    draws = released_intervals(auroc=0.97, positives=14, negatives=14, noise_std=1.0, repetitions=300, seed=3)
    widths = [limits[1] - limits[0] for _, limits in draws if limits is not None]
    assert len(widths) > 250 and min(widths) > 0.05


def test_interval_is_the_whole_range_where_noise_drowns_the_cases():
    counts = np.array([[[1.0, 0, 0, 0], [0, 0, 0, 1]]])
    assert metrics.interval(Histogram(counts=counts), noise_std=10) == (0.0, 1.0)


def test_interval_shrinks_with_the_root_of_the_number_of_patients():
    rng = np.random.default_rng(0)
    few = binormal(rng, auroc=0.85, positives=200, negatives=200)
    many = Scores(scores=few.scores, targets=few.targets, weights=few.weights * 16)
    narrow, wide = metrics.interval(many), metrics.interval(few)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(4, rel=0.05)


def test_interval_counts_patients_and_not_their_images():
    rng = np.random.default_rng(0)
    once = binormal(rng, auroc=0.85, positives=50, negatives=50)
    repeated = Scores(
        scores=np.repeat(once.scores, 4, axis=0),
        targets=np.repeat(once.targets, 4, axis=0),
        weights=np.repeat(once.weights, 4) / 4,
    )
    assert metrics.interval(repeated) == pytest.approx(metrics.interval(once))


def test_interval_of_several_classes_lies_around_the_mean_and_grows_with_noise():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    logits = rng.normal(size=(300, 3)) + 1.5 * np.eye(3)[labels]
    exact = metrics.score_statistics(logits, targets=labels, weights=np.ones(300))
    histogram = exact.histogram(10)
    low, high = metrics.interval(histogram)
    noised_low, noised_high = metrics.interval(histogram, noise_std=4)
    assert noised_low < low < metrics.auroc(histogram) < high < noised_high


@pytest.mark.parametrize(
    ("noise_std", "confidence"), [(-1.0, 0.95), (math.nan, 0.95), (0.0, 0.0), (0.0, 1.0), (1.0, 0.95)]
)
def test_interval_with_an_impossible_argument_is_refused(noise_std, confidence):
    with pytest.raises(ValueError, match="expected"):
        metrics.interval(binary([0.1, 0.9], [0, 1]), noise_std=noise_std, confidence=confidence)


def wilson(right, total, quantile=1.959964):
    """Wilson's interval, by its formula."""
    rate, extra = right / total, quantile**2 / total
    centre = (rate + extra / 2) / (1 + extra)
    reach = quantile / (1 + extra) * math.sqrt(rate * (1 - rate) / total + extra / (4 * total))
    return centre - reach, centre + reach


def test_intervals_of_exact_rates_are_wilsons():
    statistic = binary([0.9] * 70 + [0.1] * 10 + [0.9] * 15 + [0.1] * 45, [1] * 80 + [0] * 60)
    for found in (statistic, statistic.histogram(10)):
        assert metrics.sensitivity_interval(found) == pytest.approx(wilson(70, 80), abs=3e-4)
        assert metrics.specificity_interval(found) == pytest.approx(wilson(45, 60), abs=3e-4)
        assert metrics.accuracy_interval(found) == pytest.approx(wilson(115, 140), abs=3e-4)


def test_interval_of_a_perfect_rate_does_not_collapse():
    statistic = binary([0.1] * 20 + [0.9] * 20, [0] * 20 + [1] * 20)
    assert metrics.sensitivity_interval(statistic) == pytest.approx(wilson(20, 20), abs=3e-4)


def test_interval_of_a_rate_is_the_whole_range_where_noise_drowns_the_cases():
    counts = np.array([[[1.0, 0, 0, 0], [0, 0, 0, 1]]])
    assert metrics.accuracy_interval(Histogram(counts=counts), noise_std=10) == (0.0, 1.0)


def test_top_one_accuracy_has_an_interval_and_several_classes_have_no_sensitivity():
    counts = np.zeros((4, 2, 10))
    counts[3, 1, 6:9], counts[3, 0, 5] = 20, 40
    statistic = Histogram(counts=counts)
    assert metrics.accuracy(statistic) == 0.6
    assert metrics.accuracy_interval(statistic) == pytest.approx(wilson(60, 100), abs=3e-4)
    assert metrics.sensitivity_interval(statistic) is None
    assert metrics.specificity_interval(statistic) is None


RATES = [
    (metrics.sensitivity_interval, NormalDist().cdf(NormalDist().inv_cdf(0.9) / math.sqrt(2))),
    (metrics.specificity_interval, NormalDist().cdf(NormalDist().inv_cdf(0.9) / math.sqrt(2))),
    (metrics.accuracy_interval, NormalDist().cdf(NormalDist().inv_cdf(0.9) / math.sqrt(2))),
]


@pytest.mark.parametrize("noise_std", [0, 4])
@pytest.mark.parametrize(("interval", "truth"), RATES)
def test_interval_of_a_rate_covers_the_truth_as_often_as_it_says(interval, truth, noise_std):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(600):
        counts = binormal(rng, auroc=0.9, positives=80, negatives=120).histogram(10).counts
        noised = Histogram(counts=counts + noise_std * rng.normal(size=counts.shape))
        low, high = interval(noised, noise_std=noise_std)
        inside += low <= truth <= high
    assert 0.92 <= inside / 600 <= 0.98


@pytest.mark.parametrize("noise_std", [0, 4])
@pytest.mark.parametrize("off", [0.0, 0.08])
def test_interval_of_the_calibration_error_covers_the_truth_at_least_as_often_as_it_says(noise_std, off):
    """The scores are the bins' centres, so that the true error is known."""
    rng = np.random.default_rng(0)
    centres = bin_centres(10)
    truth = np.abs(np.clip(centres + off, 0, 1) - centres).mean()
    inside, widths = 0, []
    for _ in range(400):
        scores = rng.choice(centres, 400)
        exact = binary(scores, rng.random(400) < np.clip(scores + off, 0, 1))
        counts = exact.histogram(10).counts
        noised = Histogram(counts=counts + noise_std * rng.normal(size=counts.shape))
        low, high = metrics.calibration_error_interval(noised, bins=10, noise_std=noise_std)
        point = metrics.calibration_error(noised, bins=10, noise_std=noise_std)
        assert 0 <= low <= point <= high <= 1
        inside += low <= truth <= high
        widths.append(high - low)
    assert inside / 400 >= 0.95
    assert np.mean(widths) < (0.16 if noise_std == 0 else 0.4)
