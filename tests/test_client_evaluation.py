from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client import clinical, evaluation
from client.cohort import Part
from client.noise import Key
from common import model
from common.asked import Asked
from common.measure import l2_sensitivity
from common.metrics import Histogram, Scores
from tests.plans import TINY, asked, plan

KEY = Key(secret=bytes(range(32)))


def asked_of(num_classes: int) -> Asked:
    return asked(classes=("a", "b", "c", "d")[:num_classes])


def scores(network: nn.Module, part: Part, *, num_classes: int = 2) -> Scores:
    found = evaluation.exact(network, part, asked=asked_of(num_classes))
    assert isinstance(found, Scores)
    return found


def part_of(cases: tuple[int, ...], *, num_classes: int = 2) -> Part:
    rng = np.random.default_rng(7)
    bounds = np.cumsum((0, *cases))
    patients = tuple(np.arange(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
    images = rng.integers(0, 256, (bounds[-1], 1, 8, 8), dtype=np.uint8)
    targets = rng.integers(0, num_classes, bounds[-1])
    return Part(images=images, targets=targets, values=clinical.none(len(images)), patients=patients)


class BlackIsUndefined(nn.Module):
    """Divides by the mean of the image; infinity or NaN for a black one, by head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._numerators = torch.tensor([[0.0], [1.0], [-1.0]][: 1 if num_classes == 2 else num_classes])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self._numerators / images.flatten(1).mean(dim=1)).T


def test_scores_are_the_networks_probabilities_one_case_at_a_time() -> None:
    network, part = model.build(plan(**TINY)), part_of((1, 200, 2, 100))
    found = scores(network, part)
    for case in (0, 1, 255, 256, 302):
        image = torch.from_numpy(part.images[case] / np.float32(255))
        logit = network(image[None]).item()
        assert found.scores[case, 0] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-5)
    np.testing.assert_array_equal(found.targets[:, 0], part.targets)


def test_cases_of_a_patient_weigh_one_together() -> None:
    found = scores(model.build(plan(**TINY)), part_of((1, 4, 2)))
    assert found.weights.tolist() == [1.0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_case_without_a_finite_output_is_scored_all_the_same(num_classes: int) -> None:
    """An error would tell that it is there; whoever chooses the parameters could ask for that."""
    network = BlackIsUndefined(num_classes)
    part = part_of((1, 1, 1), num_classes=num_classes)
    part.images[1] = 0
    found = scores(network, part, num_classes=num_classes)
    others = scores(network, part_of((1, 1, 1), num_classes=num_classes), num_classes=num_classes)
    assert np.isfinite(found.scores).all()
    np.testing.assert_array_equal(found.scores[[0, 2]], others.scores[[0, 2]])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_part_without_patients_has_scores_of_nobody(num_classes: int) -> None:
    classes = ("a", "b", "c")[:num_classes]
    network = model.build(plan(**TINY, classes=classes))
    found = scores(network, part_of((), num_classes=num_classes), num_classes=num_classes)
    assert len(found.scores) == len(found.targets) == len(found.weights) == 0
    assert found.histogram(10).counts.shape[1:] == (2, 10)
    assert not found.histogram(10).counts.any()


def test_evaluation_leaves_the_parameters_and_makes_no_gradients() -> None:
    network = model.build(plan(**TINY))
    before = model.flatten(network)
    scores(network, part_of((3, 2)))
    assert model.flatten(network).tobytes() == before.tobytes()
    assert all(parameter.grad is None for parameter in network.parameters())


def exact_scores(cases: tuple[int, ...], *, num_classes: int) -> Scores:
    classes = ("a", "b", "c", "d")[:num_classes]
    part = part_of(cases, num_classes=num_classes)
    return scores(model.build(plan(**TINY, classes=classes)), part, num_classes=num_classes)


def noised(exact: Scores, *, num_classes: int, noise_multiplier: float, bins: int = 10) -> Any:
    stream = KEY.stream("evaluation/test")
    released = evaluation.noised(
        exact, asked=asked_of(num_classes), bins=bins, noise_multiplier=noise_multiplier, noise=stream
    )
    assert isinstance(released, Histogram)
    return released.counts


@pytest.mark.parametrize("num_classes", [2, 3])
def test_noise_has_the_announced_scale_times_the_sensitivity(num_classes: int) -> None:
    exact = exact_scores((1, 2, 3), num_classes=num_classes)
    counts = noised(exact, num_classes=num_classes, noise_multiplier=2.5, bins=1000)
    std = 2.5 * l2_sensitivity(asked_of(num_classes))
    noise = np.sort((counts - exact.histogram(1000).counts).reshape(-1)) / std
    normal = torch.special.ndtr(torch.from_numpy(noise)).numpy()
    distance = np.abs(normal - (np.arange(len(noise)) + 0.5) / len(noise)).max()
    assert distance * math.sqrt(len(noise)) < 1.95, "the 0.1 % quantile of Kolmogorov's distribution"
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * len(noise))


def test_histogram_without_noise_is_the_exact_one() -> None:
    exact = exact_scores((1, 2, 3), num_classes=2)
    counts = noised(exact, num_classes=2, noise_multiplier=1e-12)
    np.testing.assert_allclose(counts, exact.histogram(10).counts, atol=1e-9)


def test_every_bin_is_noised_also_where_nobody_is() -> None:
    counts = noised(exact_scores((), num_classes=2), num_classes=2, noise_multiplier=1.0)
    assert (counts != 0).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=5), st.integers(1, 6), st.sampled_from([2, 3, 4]))
def test_one_patient_more_moves_the_histogram_by_the_sensitivity_at_most(
    others: list[int], cases: int, num_classes: int
) -> None:
    exact = exact_scores((*others, cases), num_classes=num_classes)
    kept = slice(0, sum(others))
    without = Scores(scores=exact.scores[kept], targets=exact.targets[kept], weights=exact.weights[kept])
    moved = exact.histogram(10).counts - without.histogram(10).counts
    assert np.linalg.norm(moved) <= l2_sensitivity(asked_of(num_classes)) * (1 + 1e-12)


def test_sensitivity_is_the_root_of_the_number_of_heads_and_is_reached_by_a_patient_of_one_case() -> None:
    for num_classes, heads in ((2, 1), (3, 4), (4, 5)):
        assert l2_sensitivity(asked_of(num_classes)) == math.sqrt(heads)
        moved = exact_scores((1,), num_classes=num_classes).histogram(10).counts
        assert np.linalg.norm(moved) == pytest.approx(l2_sensitivity(asked_of(num_classes)))
