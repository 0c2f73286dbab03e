from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import intervals, metrics
from common.bins import bin_centres, bin_edges, bin_indices
from common.metrics import Histogram, Scores
from common.ranking import Classes


def binary(scores, targets, weights=None):
    weights = np.ones(len(scores)) if weights is None else weights
    return Scores(scores=np.array(scores)[:, None], targets=np.array(targets)[:, None], weights=weights)


def random_scores(rng, *, cases=60, heads=1, decimals=2):
    return Scores(
        scores=rng.random((cases, heads)).round(decimals),
        targets=rng.integers(0, 2, (cases, heads)),
        weights=rng.choice([1.0, 0.5, 0.25], cases),
    )


def counted_pairs(statistic, head=0):
    """AUROC by looking at every pair of a positive and a negative."""
    right = total = 0.0
    cases = list(zip(statistic.scores[:, head], statistic.targets[:, head], statistic.weights, strict=True))
    for score, target, weight in cases:
        for other, other_target, other_weight in cases:
            if target == 1 and other_target == 0:
                total += weight * other_weight
                right += weight * other_weight * (1.0 if score > other else 0.5 if score == other else 0.0)
    return right / total


def all_metrics(statistic):
    return [
        metrics.auroc(statistic),
        metrics.accuracy(statistic),
        metrics.sensitivity(statistic),
        metrics.specificity(statistic),
        metrics.calibration_error(statistic, bins=10),
        metrics.log_loss(statistic),
        metrics.interval(statistic),
        metrics.accuracy_interval(statistic),
        metrics.sensitivity_interval(statistic),
        metrics.specificity_interval(statistic),
        metrics.calibration_error_interval(statistic, bins=10),
    ]


# --- statistics ---------------------------------------------------------------------------------------------


def test_histogram_counts_each_score_in_its_bin_and_an_edge_in_the_bin_above():
    statistic = binary([0.0, 0.25, 0.49999997, 0.5, 1.0], [0, 0, 0, 1, 1])
    assert statistic.histogram(4).counts[0].tolist() == [[1, 2, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("bins", [2, 3, 10, 37, 1000])
def test_bins_cover_all_scores_between_edges_that_are_symmetric(bins):
    edges = bin_edges(bins)
    np.testing.assert_allclose(edges + edges[::-1], 1, atol=1e-12)
    assert (np.diff(edges) > 0).all() and edges[0] == 0 and edges[-1] == 1
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.random(2000), 1 / (1 + np.exp(-8 * rng.normal(size=2000)))])
    index = bin_indices(scores, bins)
    assert (edges[index] <= scores + 1e-12).all() and (scores <= edges[index + 1] + 1e-12).all()
    assert bin_indices(bin_centres(bins), bins).tolist() == list(range(bins))
    assert bin_indices([0.0, 1.0], bins).tolist() == [0, bins - 1]


def test_edges_of_ten_bins_are_where_the_comment_says():
    logits = np.log(bin_edges(10)[5:-1] / (1 - bin_edges(10)[5:-1]))
    assert logits.round(1).tolist() == [0.0, 0.8, 1.8, 3.2, 5.4]


def test_score_just_below_one_half_stays_below_it_for_every_even_number_of_bins():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    for bins in range(2, 200, 2):
        counts = binary([below, 0.5], [1, 1]).histogram(bins).counts[0, 1]
        assert counts[bins // 2 - 1] == 1 and counts[bins // 2] == 1


@pytest.mark.parametrize("counts", [np.zeros((1, 3, 4)), np.zeros((2, 4)), np.zeros((1, 2, 1))])
def test_histogram_of_another_shape_is_refused(counts):
    with pytest.raises(ValueError, match="expected counts of shape"):
        Histogram(counts=counts)


def test_histogram_with_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Histogram(counts=np.full((1, 2, 4), np.nan))


@pytest.mark.parametrize(
    ("scores", "targets", "weights", "words"),
    [
        ([1.5], [1], [1.0], r"scores in \[0, 1\]"),
        ([np.nan], [1], [1.0], r"scores in \[0, 1\]"),
        ([0.5], [2], [1.0], "targets of 0 and 1"),
        ([0.5], [1], [-1.0], "weights >= 0"),
        ([0.5], [1], [np.inf], "weights >= 0"),
        ([0.5], [1], [1.0, 1.0], "expected weights of shape"),
    ],
)
def test_scores_out_of_range_are_refused(scores, targets, weights, words):
    with pytest.raises(ValueError, match=words):
        binary(scores, targets, np.array(weights))


def test_statistics_cannot_be_changed_afterwards():
    source = np.ones((1, 2, 4))
    histogram = Histogram(counts=source)
    source[:] = 7
    assert histogram.counts.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0, 0, 0] = 1


def test_patient_moves_a_histogram_by_at_most_the_stated_sensitivity():
    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 9):
        outputs = 1 if num_classes == 2 else num_classes
        label, cases = rng.integers(num_classes), 4
        for spread in (0.0, 3.0):  # 0: all the patient's cases in one cell, the worst case
            patient = metrics.score_statistics(
                rng.normal(size=(1, outputs)) + spread * rng.normal(size=(cases, outputs)),
                targets=np.full(cases, label),
                weights=metrics.patient_weights([np.arange(cases)], num_cases=cases),
            )
            moved = np.linalg.norm(patient.histogram(10).counts)
            assert moved <= metrics.l2_sensitivity(outputs) + 1e-12
            if spread == 0.0:
                assert moved == pytest.approx(metrics.l2_sensitivity(outputs))


def test_binary_logits_become_probabilities_of_class_one():
    statistic = metrics.score_statistics(
        [[0.0], [math.log(3)], [-1e9], [np.inf], [np.nan]],
        targets=[0, 1, 0, 1, 1],
        weights=np.ones(5),
    )
    assert statistic.scores[:, 0].tolist() == pytest.approx([0.5, 0.75, 0.0, 1.0, 0.5])
    assert statistic.targets[:, 0].tolist() == [0, 1, 0, 1, 1]


def test_logits_of_three_classes_become_three_heads_and_the_top_one():
    statistic = metrics.score_statistics(
        np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), targets=[0, 1], weights=np.ones(2)
    )
    assert statistic.scores.tolist() == [
        pytest.approx([0.7, 0.2, 0.1, 0.7]),
        pytest.approx([0.1, 0.3, 0.6, 0.6]),
    ]
    assert statistic.targets.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]
    assert metrics.accuracy(statistic) == 0.5
    assert metrics.log_loss(statistic) == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)


def test_logits_of_three_labels_become_a_head_each_and_one_of_all_of_them():
    statistic = metrics.score_statistics(
        [[0.0, math.log(3), -math.log(4)], [1e9, -1e9, math.log(9)]],
        targets=[[1, 1, 0], [1, 0, 0]],
        weights=np.ones(2),
    )
    assert statistic.scores[0].tolist() == pytest.approx([0.5, 0.75, 0.2, 0.5 * 0.75 * 0.8])
    assert statistic.scores[1].tolist() == pytest.approx([1.0, 0.0, 0.9, 0.9])
    assert statistic.targets.tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert metrics.accuracy(statistic) == 0.5
    losses = [-(math.log(0.5) + math.log(0.75) + math.log(0.8)) / 3, -math.log(0.1) / 3]
    assert metrics.log_loss(statistic, several_labels=True) == pytest.approx(np.mean(losses), rel=1e-6)


def test_patient_of_several_labels_moves_a_histogram_by_at_most_the_stated_sensitivity():
    rng = np.random.default_rng(0)
    for labels in (2, 5):
        patient = metrics.score_statistics(
            rng.normal(size=(1, labels)), targets=rng.integers(0, 2, (1, labels)), weights=[1.0]
        )
        moved = np.linalg.norm(patient.histogram(10).counts)
        assert moved == pytest.approx(metrics.l2_sensitivity(labels)) == pytest.approx(math.sqrt(labels + 1))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [([1.0], [0]), ([[1.0]], [2]), ([[1.0]], [-1]), ([[1.0]], [0, 1]), ([[1.0, 2.0]], [[0, 2]])],
)
def test_logits_that_do_not_fit_the_task_are_refused(logits, labels):
    with pytest.raises(ValueError, match="expected"):
        metrics.score_statistics(logits, targets=labels, weights=np.ones(len(labels)))


# --- merging ------------------------------------------------------------------------------------------------

histograms = st.lists(
    st.lists(st.integers(-50, 1000).map(lambda n: n / 4), min_size=8, max_size=8), min_size=3, max_size=3
).map(lambda rows: [Histogram(counts=np.reshape(row, (1, 2, 4))) for row in rows])


@given(histograms)
def test_merging_histograms_is_associative_and_commutative(three):
    first, second, third = three
    expected = ((first + second) + third).counts
    assert (expected == (first + (second + third)).counts).all()
    assert (expected == (third + first + second).counts).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(2, 21))
def test_merged_statistics_equal_those_of_the_pooled_cases(sizes, seed, bins):
    rng = np.random.default_rng(seed)
    parts = [random_scores(rng, cases=size, heads=2) for size in sizes]
    pooled = Scores(
        scores=np.concatenate([part.scores for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
    )
    merged = metrics.merge(parts)
    assert isinstance(merged, Scores) and (merged.scores == pooled.scores).all()
    binned = metrics.merge([part.histogram(bins) for part in parts])
    mixed = metrics.merge([parts[0].histogram(bins), *parts[1:]])
    assert (binned.counts == pooled.histogram(bins).counts).all()
    assert (mixed.counts == binned.counts).all()


def test_statistics_of_different_tasks_do_not_merge():
    with pytest.raises(ValueError, match="expected counts of shape"):
        metrics.merge([Histogram(counts=np.zeros((1, 2, 4))), Histogram(counts=np.zeros((1, 2, 5)))])
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="heads"):
        metrics.merge([random_scores(rng, heads=1), random_scores(rng, heads=4)])
    with pytest.raises(ValueError, match="at least one"):
        metrics.merge([])


# --- metrics ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_auroc_equals_the_count_over_all_pairs(seed, decimals):
    statistic = random_scores(np.random.default_rng(seed), cases=30, decimals=decimals)
    if len(set(statistic.targets[:, 0])) == 2:
        assert metrics.auroc(statistic) == pytest.approx(counted_pairs(statistic))


def test_auroc_of_a_histogram_counts_pairs_of_adjacent_bins_a_twelfth_more():
    statistic = random_scores(np.random.default_rng(3))
    index = bin_indices(statistic.scores[:, 0], 10)
    positive = np.flatnonzero(statistic.targets[:, 0])
    negative = np.flatnonzero(statistic.targets[:, 0] == 0)
    value = {0: 0.5, 1: 13 / 12, -1: -1 / 12}
    right = total = 0.0
    for one in positive:
        for other in negative:
            weight, step = statistic.weights[one] * statistic.weights[other], index[one] - index[other]
            right += weight * value.get(int(step), float(step > 0))
            total += weight
    assert metrics.auroc(statistic.histogram(10)) == pytest.approx(right / total)


def test_auroc_of_a_histogram_turns_over_with_the_classes():
    statistic = random_scores(np.random.default_rng(3)).histogram(10)
    other = Histogram(counts=statistic.counts[:, ::-1])
    assert metrics.auroc(statistic) + metrics.auroc(other) == pytest.approx(1)
    low, high = metrics.interval(statistic, noise_std=0.5)
    assert metrics.interval(other, noise_std=0.5) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_error_of_bins_falls_with_the_fourth_power_of_their_width_and_with_ties_by_the_second():
    places = (np.arange(4096) + 0.5) / 4096
    negatives, positives = places**3 * (1 - places) ** 5, places**5 * (1 - places) ** 3

    def error(bins, *, neighbour):
        counts = [density.reshape(bins, -1).sum(axis=1) for density in (negatives, positives)]
        classes = Classes(negatives=counts[0], positives=counts[1], neighbour=neighbour)
        exact = Classes(negatives=negatives, positives=positives, neighbour=0.0)
        return abs(classes.ordered_pairs / classes.num_pairs - exact.ordered_pairs / exact.num_pairs)

    assert error(8, neighbour=0.0) / error(16, neighbour=0.0) == pytest.approx(4, rel=0.1)
    assert error(8, neighbour=1 / 12) / error(16, neighbour=1 / 12) == pytest.approx(16, rel=0.2)
    assert error(8, neighbour=1 / 12) < 0.12 * error(8, neighbour=0.0)


def test_auroc_of_three_classes_is_the_mean_over_one_versus_rest():
    rng = np.random.default_rng(1)
    statistic = metrics.score_statistics(
        rng.normal(size=(40, 3)), targets=np.arange(40) % 3, weights=np.ones(40)
    )
    heads = [counted_pairs(statistic, head) for head in range(3)]
    assert metrics.auroc(statistic) == pytest.approx(np.mean(heads))


def test_noised_pair_counts_have_the_exact_ones_as_their_mean():
    rng = np.random.default_rng(0)
    counts = np.array([[30.0, 20, 10, 5], [5, 5, 20, 40]])
    kernel = np.tril(np.ones((4, 4)), -1) + np.eye(4) / 2 + (np.eye(4, k=-1) - np.eye(4, k=1)) / 12
    noised = counts + 6 * rng.normal(size=(40_000, 2, 4))
    draws = np.einsum("di,ij,dj->d", noised[:, 1], kernel, noised[:, 0])
    exact = counts[1] @ kernel @ counts[0]
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(len(draws))
    one = Histogram(counts=noised[:1])
    assert metrics.auroc(one) == pytest.approx(draws[0] / noised[0].sum(axis=1).prod())
    assert metrics.auroc(Histogram(counts=counts[None])) == pytest.approx(exact / counts.sum(axis=1).prod())


@pytest.mark.parametrize("value", [0.5, 0.9])
def test_variance_that_noise_gives_to_the_pair_sum_is_estimated_without_bias(value):
    """From noised counts, of which the squares are too large by the noise."""
    rng = np.random.default_rng(0)
    counts = 4 * np.array([[30.0, 20, 10, 5, 3, 1, 1, 0, 0, 0], [0, 1, 1, 2, 3, 5, 8, 15, 20, 25]])
    sums, estimates = [], []
    for _ in range(6000):
        negatives, positives = counts + 20 * rng.normal(size=counts.shape)
        classes = Classes(negatives=negatives, positives=positives, neighbour=1 / 12)
        sums.append(classes.ordered_pairs - value * classes.num_pairs)
        estimates.append(float(intervals._noise_variance(np.array([value]), classes, 20.0)[0]))
    assert np.mean(estimates) == pytest.approx(np.var(sums), rel=0.06)
    kernel = np.tril(np.ones((10, 10)), -1) + np.eye(10) / 2 + (np.eye(10, k=-1) - np.eye(10, k=1)) / 12
    nobody = Classes(negatives=np.zeros(10), positives=np.zeros(10), neighbour=1 / 12)
    floor = intervals._noise_variance(np.array([value]), nobody, 20.0)[0]
    assert floor == pytest.approx(20.0**4 * np.square(kernel - value).sum())


def test_threshold_metrics_equal_counting_by_hand():
    statistic = binary([0.1, 0.6, 0.5, 0.4, 0.9, 0.7], [0, 0, 0, 1, 1, 1], [1, 1, 0.5, 0.5, 1, 1])
    for found in (statistic, statistic.histogram(10)):
        assert metrics.sensitivity(found) == pytest.approx(2 / 2.5)
        assert metrics.specificity(found) == pytest.approx(1 / 2.5)
        assert metrics.accuracy(found) == pytest.approx(3 / 5)


def test_odd_number_of_bins_splits_the_middle_bin():
    histogram = Histogram(counts=np.array([[[4.0, 2, 0], [0, 4, 6]]]))
    assert metrics.specificity(histogram) == pytest.approx(5 / 6)
    assert metrics.sensitivity(histogram) == pytest.approx(8 / 10)
    assert metrics.accuracy(histogram) == pytest.approx(13 / 16)


def test_sensitivity_and_specificity_are_for_two_classes_only():
    statistic = random_scores(np.random.default_rng(0), heads=4)
    assert metrics.sensitivity(statistic) is None and metrics.specificity(statistic) is None


def test_calibration_error_is_the_gap_between_stated_and_observed():
    statistic = binary([0.2] * 10 + [0.8] * 10, [1] * 3 + [0] * 7 + [1] * 6 + [0] * 4)
    assert metrics.calibration_error(statistic, bins=10) == pytest.approx((0.1 + 0.2) / 2)
    # bins of a histogram stand for their centres
    low, high = bin_centres(10)[[3, 6]]
    assert low == pytest.approx(0.226, abs=1e-3) and high == pytest.approx(0.774, abs=1e-3)
    released = metrics.calibration_error(statistic.histogram(10), bins=10)
    assert released == pytest.approx((0.3 - low + high - 0.6) / 2)


def test_number_of_bins_is_that_of_the_calibration_error_of_exact_scores():
    statistic = binary([0.6] * 10 + [0.65] * 10, [1] * 3 + [0] * 7 + [1] * 10)
    assert bin_indices([0.6, 0.65], 10).tolist() == [5, 5] and bin_indices([0.6, 0.65], 30).tolist() == [
        16,
        17,
    ]
    assert metrics.calibration_error(statistic, bins=10) == pytest.approx(0.65 - 0.625)
    assert metrics.calibration_error(statistic, bins=30) == pytest.approx((0.3 + 0.35) / 2)


def test_calibration_error_does_not_grow_with_the_noise():
    rng = np.random.default_rng(5)
    centres = bin_centres(10)
    counts = 100 * np.stack([1 - centres, centres])[None]
    draws = [Histogram(counts=counts + 10 * rng.normal(size=counts.shape)) for _ in range(200)]
    plain = np.mean([metrics.calibration_error(draw, bins=10) for draw in draws])
    without_noise = np.mean([metrics.calibration_error(draw, bins=10, noise_std=10) for draw in draws])
    assert metrics.calibration_error(Histogram(counts=counts), bins=10) == pytest.approx(0, abs=1e-12)
    assert without_noise < 0.6 * plain


def test_log_loss_equals_the_closed_form_and_is_finite_for_a_saturated_error():
    statistic = binary([0.25, 0.5], [0, 1], [1.0, 3.0])
    assert metrics.log_loss(statistic) == pytest.approx((-math.log(0.75) - 3 * math.log(0.5)) / 4)
    assert metrics.log_loss(binary([1.0], [0])) == pytest.approx(-math.log(2.0**-24))
    assert metrics.log_loss(statistic.histogram(10)) is None


def test_metrics_without_cases_are_none():
    empty = binary(np.zeros(0), np.zeros(0, int))
    for statistic in (empty, empty.histogram(10), Histogram(counts=np.full((1, 2, 10), -1.0))):
        assert set(all_metrics(statistic)) == {None}
        assert metrics.roc(statistic) == []


def test_metrics_that_need_both_classes_are_none_with_one():
    statistic = binary([0.2, 0.8], [1, 1])
    assert metrics.auroc(statistic) is None and metrics.interval(statistic) is None
    assert metrics.specificity(statistic) is None
    assert metrics.sensitivity(statistic) == 0.5 and metrics.accuracy(statistic) == 0.5


def test_roc_has_the_auroc_as_its_area_and_is_drawn_straight_over_a_bin():
    statistic = random_scores(np.random.default_rng(2))
    rates = np.array(metrics.roc(statistic))
    assert np.trapezoid(rates[:, 1], rates[:, 0]) == pytest.approx(metrics.auroc(statistic))
    binned = statistic.histogram(10)
    rates, counts = np.array(metrics.roc(binned)), binned.counts[0]
    tied = counts[1] @ (np.cumsum(counts[0]) - counts[0] / 2) / counts.sum(axis=1).prod()
    assert np.trapezoid(rates[:, 1], rates[:, 0]) == pytest.approx(tied)


def test_roc_of_noised_counts_still_rises_from_corner_to_corner():
    rng = np.random.default_rng(7)
    for heads in (1, 4):
        histogram = Histogram(counts=10 + 8 * rng.normal(size=(heads, 2, 20)))
        rates = np.array(metrics.roc(histogram))
        assert rates[0].tolist() == [0, 0] and rates[-1].tolist() == [1, 1]
        assert (np.diff(rates, axis=0) >= 0).all()


def test_roc_of_many_cases_is_thinned_to_the_points_asked_for():
    statistic = random_scores(np.random.default_rng(2), cases=3000, decimals=8)
    rates = np.array(metrics.roc(statistic, num_points=201))
    assert len(rates) == 201
    assert np.trapezoid(rates[:, 1], rates[:, 0]) == pytest.approx(metrics.auroc(statistic), abs=0.005)


# --- interval -----------------------------------------------------------------------------------------------


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


# --- intervals of rates and of the calibration error --------------------------------------------------------


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
