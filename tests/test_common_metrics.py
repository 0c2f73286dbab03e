from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import intervals, metrics
from common.bins import bin_centres, bin_edges, bin_indices
from common.metrics import Histogram, Scores
from common.ranking import Classes
from tests.scores import binary


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
