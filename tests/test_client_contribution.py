"""Norms and sums of what patients contribute are those of its rows, however it is kept and done together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client import factors
from client.contribution import AlikeProducts, Postponed, Products, Rows
from client.factors import SHORT, clip_factors, weighted_sums
from client.patches import AlikePatches, Patches


@settings(max_examples=60, deadline=None)
@given(
    cases=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    positions=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    shape=st.sampled_from([(4, 5), (40, 50)]),
)
def test_no_patient_of_products_is_longer_than_its_norm_says(
    cases: list[int], positions: int, seed: int, scale: float, shape: tuple[int, int]
) -> None:
    """Also where cases cancel: norms of products are differences of large numbers then. Those of the small
    shape are taken of the gradients themselves, those of the large one mostly of Gram matrices."""
    torch.manual_seed(seed)
    rows, columns = shape
    left = torch.randn(sum(cases), rows, positions) * scale
    right = torch.randn(1, columns, positions).expand(sum(cases), -1, -1) + 1e-4 * torch.randn(
        sum(cases), columns, positions
    )
    owners = torch.repeat_interleave(torch.arange(len(cases)), torch.tensor(cases))
    first = torch.searchsorted(owners, torch.arange(len(cases)))
    left[first] -= torch.zeros(len(cases), rows, positions).index_add_(
        0, owners, left
    )  # a patient's sum is 0
    shares = (1.0 / torch.tensor(cases))[owners]
    products = Products(left, right, torch.Size(shape), owners, shares, len(cases))
    told = products.squared_norms().sqrt()
    for patient in range(len(cases)):
        alone = products.weighted_sum(torch.eye(len(cases))[patient])
        assert float(alone.norm()) <= float(told[patient]) * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_patient_without_a_finite_gradient_counts_as_nothing_and_moves_no_other(bad: float) -> None:
    owners, shares = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.5, 0.5, 1.0])
    left, right = torch.rand(4, 2, 1), torch.rand(4, 3, 1)
    whole = Products(left.clone(), right, torch.Size([2, 3]), owners, shares, 3)
    expected = whole.rows()
    left[2, 0, 0] = bad
    broken = Products(left, right, torch.Size([2, 3]), owners, shares, 3)
    clipped, kept = clip_factors([broken, Rows(torch.ones(3, 1))], bound=1e6)
    assert clipped.tolist() == [1.0, 0.0, 1.0]
    of_matrix, of_number = weighted_sums(kept, clipped)
    torch.testing.assert_close(of_matrix, (expected[0] + expected[2]).flatten())
    assert of_number.tolist() == [2.0]


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3], [2, 2], [0, 3, 1]])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("rows", [4, 40])
def test_norms_of_products_and_patches_are_those_of_their_rows(
    counts: list[int], positions: int, rows: int
) -> None:
    torch.manual_seed(0)
    cases = sum(counts)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = (1.0 / torch.tensor(counts).clamp(min=1))[owners]
    of_patients = (owners, shares, len(counts))
    left, right = torch.randn(cases, rows, positions), torch.randn(cases, 50, positions)
    outer, inputs = torch.randn(cases, rows, 1, positions), torch.randn(cases, 3, 3, positions)
    geometry = ((3, 1), (1, 1), (1, 1))
    for found in (
        Products(left, right, torch.Size([rows, 50]), *of_patients),
        Patches(outer, inputs, geometry, torch.Size([rows, 3, 3, 3]), *of_patients),
    ):
        told, weights = found.rows(), torch.rand(len(counts))
        torch.testing.assert_close(
            found.squared_norms(), told.flatten(1).square().sum(dim=1), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(found.weighted_sum(weights), torch.einsum("p,p...->...", weights, told))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 7), st.integers(5, 6)),
    seed=st.integers(0, 2**31),
)
def test_norms_of_patches_are_those_of_their_rows_for_every_geometry(
    counts: list[int], kernel: Any, stride: Any, padding: Any, dilation: Any, size: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Conv2d(32, 64, kernel, stride, padding, dilation)  # large beside the Gram matrices
    inputs = torch.randn(sum(counts), 32, *size)
    outer = torch.randn_like(layer(inputs)).detach()
    found = patches_of(outer, inputs, counts, geometry=(stride, padding, dilation), shape=layer.weight.shape)
    told = found.rows().flatten(1).square().sum(dim=1)
    torch.testing.assert_close(found.squared_norms(), told, rtol=1e-4, atol=1e-4)


def test_patches_are_cut_only_where_gram_matrices_would_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []
    unfold = torch.nn.functional.unfold

    def noted(inputs: torch.Tensor, *geometry: Any) -> torch.Tensor:
        cut.append(len(inputs))
        return unfold(inputs, *geometry)

    monkeypatch.setattr(torch.nn.functional, "unfold", noted)
    geometry, shape = ((1, 1), (1, 1), (1, 1)), torch.Size([64, 64, 3, 3])
    for cases in (1, 2, 3, 30):
        sides = torch.randn(cases, 64, 4, 4), torch.randn(cases, 64, 4, 4)
        patches_of(*sides, [cases], geometry=geometry, shape=shape).squared_norms()
    assert cut == [3, 30]


def patches_of(
    outer: torch.Tensor, inputs: torch.Tensor, counts: list[int], *, geometry: Any, shape: torch.Size
) -> Patches:
    """Of patients with so many cases each, one at least."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = (1.0 / torch.tensor(counts))[owners]
    return Patches(outer, inputs, geometry, shape, owners, shares, len(counts))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_no_patient_of_patches_is_longer_than_its_norm_says_where_its_cases_cancel(scale: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1, 64, 4, 4).expand(4, -1, -1, -1) + 1e-4 * torch.randn(4, 64, 4, 4)
    outer = torch.randn(2, 64, 4, 4) * scale
    found = patches_of(
        torch.cat([outer, -outer])[[0, 2, 1, 3]],
        inputs,
        [2, 2],
        geometry=((1, 1), (1, 1), (1, 1)),
        shape=torch.Size([64, 64, 3, 3]),
    )
    for patient, told in enumerate(found.squared_norms().sqrt()):
        alone = found.weighted_sum(torch.eye(2)[patient])
        assert float(alone.norm()) <= float(told) * (1 + 1e-5)


def test_sums_done_together_are_those_of_each_parameter() -> None:
    """Short rows, rows of exactly as many numbers and of one more, and what is no rows."""
    torch.manual_seed(0)
    owners, shares = torch.arange(3), torch.ones(3)
    products = Products(torch.randn(3, 4, 2), torch.randn(3, 5, 2), torch.Size([4, 5]), owners, shares, 3)
    rows = [Rows(torch.randn(3, *shape)) for shape in ((), (2, 3), (SHORT,), (SHORT + 1,), (1, 7))]
    contributions = [rows[0], products, *rows[1:]]
    weights = torch.rand(3)
    expected = [one.weighted_sum(weights) for one in contributions]
    together = torch.cat([one.rows().reshape(3, -1) for one in contributions], dim=1).norm(dim=1)
    clipped, groups = clip_factors(contributions, bound=1.0)  # shorter than all: each norm decides
    torch.testing.assert_close(clipped, 1.0 / together, rtol=1e-5, atol=0.0)
    found = weighted_sums(groups, weights)
    assert contributions == [] and groups == [], "nothing of a batch is kept"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.flatten())


GEOMETRY = ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3]])
def test_layers_of_the_same_shapes_are_done_together_as_each_alone(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cases = sum(counts)

    def patches(channels: int) -> Patches:
        outer, inputs = torch.randn(cases, channels, 2, 2), torch.randn(cases, 64, 2, 2)
        return patches_of(outer, inputs, counts, geometry=GEOMETRY, shape=torch.Size([channels, 64, 3, 3]))

    alike = [patches(32) for _ in range(3)]
    contributions = [alike[0], patches(16), alike[1], Rows(torch.randn(3, 5)), alike[2]]
    rows = torch.cat([one.rows().flatten(1) for one in contributions], dim=1)
    weights = torch.rand(len(counts))
    expected = [torch.einsum("p,p...->...", weights, one.rows()) for one in contributions]
    together: list[int] = []

    class Noted(AlikePatches):
        def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
            together.append(len(self.layers))
            return super().weighted_sums(weights)

    monkeypatch.setattr(factors, "AlikePatches", Noted)
    found, groups = clip_factors(list(contributions), bound=1.0)
    torch.testing.assert_close(found, 1.0 / rows.norm(dim=1), rtol=1e-5, atol=0.0)
    sums = weighted_sums(groups, weights)
    assert together == [3]
    for one, other in zip(sums, expected, strict=True):
        torch.testing.assert_close(one, other.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3]])
def test_products_with_sides_of_the_same_shape_are_done_together_as_each_alone(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of patients with one case each, whose norms are had by Gram matrices; others are done alone."""
    torch.manual_seed(0)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    of_patients = owners, (1.0 / torch.tensor(counts))[owners], len(counts)

    def products(columns: int, positions: int = 3) -> Products:
        left, right = torch.randn(len(owners), 40, positions), torch.randn(len(owners), columns, positions)
        return Products(left, right, torch.Size([40, columns]), *of_patients)

    contributions = [products(50), products(60), Rows(torch.randn(3, 5)), products(50), products(50, 1)]
    rows = torch.cat([one.rows().flatten(1) for one in contributions], dim=1)
    weights = torch.rand(len(counts))
    expected = [torch.einsum("p,p...->...", weights, one.rows()) for one in contributions]
    together: list[int] = []

    class Noted(AlikeProducts):
        def squared_norms(self) -> Tensor:
            together.append(len(self.layers))
            return super().squared_norms()

    monkeypatch.setattr(factors, "AlikeProducts", Noted)
    found, groups = clip_factors(list(contributions), bound=1.0)
    torch.testing.assert_close(found, 1.0 / rows.norm(dim=1), rtol=1e-5, atol=0.0)
    sums = weighted_sums(groups, weights)
    assert together == ([3] if counts == [1, 1, 1] else [])
    for one, other in zip(sums, expected, strict=True):
        torch.testing.assert_close(one, other.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3]])
@pytest.mark.parametrize("positions", [1, 2, 30])
def test_sides_in_bfloat16_are_multiplied_in_float32_and_rows_of_one_case_rounded_once(
    counts: list[int], positions: int
) -> None:
    """Such rows are clipped and summed as they are; norms and sums without rows are those of the sides."""
    torch.manual_seed(0)
    cases = sum(counts)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    of_patients = (owners, (1.0 / torch.tensor(counts))[owners], len(counts))
    sides = torch.randn(cases, 40, positions).bfloat16(), torch.randn(cases, 50, positions).bfloat16()
    images = torch.randn(cases, 32, 2, 2).bfloat16(), torch.randn(cases, 64, 2, 2).bfloat16()
    for coarse, pair in (
        (Products(*sides, torch.Size([40, 50]), *of_patients), sides),
        (Patches(*images, GEOMETRY, torch.Size([32, 64, 3, 3]), *of_patients), images),
    ):
        names = ("left", "right") if isinstance(coarse, Products) else ("outer", "inputs")
        fine = replace(coarse, **{name: one.float() for name, one in zip(names, pair, strict=True)})
        weights = torch.rand(len(counts))
        if counts == [1, 1, 1]:
            is_same = coarse.rows() == fine.rows().bfloat16().float()
            assert is_same.float().mean() > 0.999, "but where a float32's last digit decides"
        else:
            torch.testing.assert_close(coarse.rows(), fine.rows())
        torch.testing.assert_close(coarse.squared_norms(), fine.squared_norms())
        torch.testing.assert_close(coarse.weighted_sum(weights), fine.weighted_sum(weights))


def test_rows_that_norms_need_are_made_once_and_serve_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made: list[Tensor] = []

    def rows() -> Tensor:
        made.append(torch.randn(3, 100, 100))
        return made[-1]

    sides = torch.randn(3, 80, 30), torch.randn(3, 90, 30)
    products = Products(*sides, torch.Size([80, 90]), torch.arange(3), torch.ones(3), 3)
    expected = products.rows()
    monkeypatch.setattr(Products, "weighted_sum", None)
    clipped, groups = clip_factors([Postponed(rows), products], bound=1.0)
    norms = torch.cat([made[0].flatten(1), expected.flatten(1)], dim=1).norm(dim=1)
    torch.testing.assert_close(clipped, 1.0 / norms)
    sums = weighted_sums(groups, clipped)
    for one, other in zip(sums, [made[0], expected], strict=True):
        torch.testing.assert_close(one, torch.einsum("p,p...->...", clipped, other).flatten())
    assert len(made) == 1
