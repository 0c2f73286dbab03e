"""What the patients of a batch contribute to the gradient of one parameter.

Clipping needs two things of it: its part of each patient's squared norm, and the sum over patients weighted
by their clip factors. Neither needs all per-patient gradients in memory, where these are products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

GRAM_COST = 2.0
"""Of a number of two Gram matrices, which are in double precision, over that of one of the gradients."""
ROUNDING = 4.0
"""In units of the last place: a sum of products is not longer than its norm says by more than rounding."""


class Contribution(Protocol):
    """Gradients of one parameter by patient, of which each is the mean over the patient's cases."""

    def rows(self) -> Tensor:
        """Returns the gradients themselves: (num_patients, *parameter.shape)."""
        ...

    def squared_norms(self) -> Tensor:
        """Returns the squared Euclidean norm of each patient's gradient, never too small: (num_patients,)."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Returns the sum over patients; weights: (num_patients,). (*parameter.shape)."""
        ...

    def without(self, patients: Tensor) -> Contribution:
        """Returns the contribution with zero for some patients, whatever theirs is; bool, (num_patients,)."""
        ...


@dataclass(frozen=True)
class Rows:
    """The gradients one by one. values: (num_patients, *parameter.shape)."""

    values: Tensor

    def rows(self) -> Tensor:
        return self.values

    def squared_norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.values.reshape(len(self.values), -1), dim=1)
        return norms.square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return (weights @ self.values.reshape(len(self.values), -1)).view(self.values.shape[1:])

    def without(self, patients: Tensor) -> Rows:
        kept = ~patients.reshape(-1, *[1] * (self.values.dim() - 1))
        return Rows(torch.where(kept, self.values, 0.0))


@dataclass(frozen=True)
class Products:
    """Gradients of a matrix that are sums of outer products, one for each position of each case.

    ``left``: (cases, rows of the matrix, positions); ``right``: (cases, columns of the matrix, positions);
    what belongs to a case is the product of both over its positions. ``shape``: of the parameter.
    ``owners``: int64, (cases,), ascending; ``shares``: (cases,), one over the number of the owner's cases.

    Source: the norm from products is that of Goodfellow (2015), Efficient Per-Example Gradient Computations;
    over positions, that of Li et al. (2022), Large Language Models Can Be Strong Differentially Private
    Learners.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    owners: Tensor
    shares: Tensor
    num_patients: int

    def rows(self) -> Tensor:
        by_case = torch.bmm(self.left, self.right.transpose(1, 2)) * self.shares[:, None, None]
        if self.num_patients == len(by_case):
            return by_case.view(-1, *self.shape)
        zeros = by_case.new_zeros(self.num_patients, *by_case.shape[1:])
        return zeros.index_add_(0, self.owners, by_case).view(-1, *self.shape)

    def squared_norms(self) -> Tensor:
        if self.num_patients == len(self.left):
            return self._of_patients(self.left, self.right)
        counts = torch.bincount(self.owners, minlength=self.num_patients)
        firsts = counts.cumsum(0) - counts
        squares = self.left.new_zeros(self.num_patients)
        for count in sorted({*counts.tolist()} - {0}):  # those of equally many cases are done together
            patients = (counts == count).nonzero()[:, 0]
            cases = firsts[patients][:, None] + torch.arange(count)
            shared = self.right[cases] * self.shares[cases][:, :, None, None]
            left, right = (side.transpose(1, 2).flatten(2) for side in (self.left[cases], shared))
            squares[patients] = self._of_patients(left, right)
        return squares

    def _of_patients(self, left: Tensor, right: Tensor) -> Tensor:
        """left: (patients, rows, positions of all cases of each); right: (patients, columns, likewise)."""
        lengths = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
        magnitudes: Tensor = lengths.sum(dim=1)
        rows, columns, positions = left.shape[1], right.shape[1], left.shape[2]
        if positions == 1:
            return magnitudes.square()
        if rows * columns < GRAM_COST * positions * (rows + columns):
            by_patient = torch.bmm(left, right.transpose(1, 2)).flatten(1)
            return self._cautious(torch.linalg.vector_norm(by_patient, dim=1).square(), magnitudes)
        left, right = left.double(), right.double()  # the terms may cancel
        gram = torch.bmm(left.transpose(1, 2), left) * torch.bmm(right.transpose(1, 2), right)
        return self._cautious(gram.sum(dim=(1, 2)), magnitudes)

    def _cautious(self, squares: Tensor, magnitudes: Tensor) -> Tensor:
        """Adds what rounding may add to the sum of products, in the parameter's precision."""
        precision = torch.finfo(self.left.dtype).eps
        return (squares.clamp(min=0).sqrt() + ROUNDING * precision * magnitudes).square().to(self.left.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.left * (weights[self.owners] * self.shares)[:, None, None]
        if self.left.shape[2] == 1:  # contiguous: the product takes half the time
            return (scaled[:, :, 0].T.contiguous() @ self.right[:, :, 0]).view(self.shape)
        together = scaled.transpose(0, 1).flatten(1)  # (rows, cases x positions)
        return (together @ self.right.transpose(0, 1).flatten(1).T).view(self.shape)

    def without(self, patients: Tensor) -> Products:
        kept = ~patients[self.owners][:, None, None]
        left, right = (torch.where(kept, side, 0.0) for side in (self.left, self.right))
        return replace(self, left=left, right=right)


@dataclass(frozen=True)
class Patches:
    """Gradients of a flat convolution's weights, as what went in and the gradient of what came out.

    The patches under the kernel, which ``Products`` multiplies, are several times as large as the input;
    they are cut when the norm is taken, and not kept. ``outer``: (cases, channels, height, width);
    ``inputs``: likewise; ``geometry``: stride, padding, dilation. Else as ``Products``.
    """

    outer: Tensor
    inputs: Tensor
    geometry: tuple[Any, Any, Any]
    shape: torch.Size
    owners: Tensor
    shares: Tensor
    num_patients: int

    def rows(self) -> Tensor:
        return self._products().rows()

    def squared_norms(self) -> Tensor:
        return self._products().squared_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.outer * (weights[self.owners] * self.shares)[:, None, None, None]
        settings = (*self.geometry, False, (0, 0), 1)
        summed: Tensor = torch.ops.aten.convolution_backward(
            scaled, self.inputs, scaled.new_empty(self.shape), None, *settings, [False, True, False]
        )[1]
        return summed.contiguous()

    def without(self, patients: Tensor) -> Patches:
        kept = ~patients[self.owners][:, None, None, None]
        outer, inputs = (torch.where(kept, side, 0.0) for side in (self.outer, self.inputs))
        return replace(self, outer=outer, inputs=inputs)

    def _products(self) -> Products:
        stride, padding, dilation = self.geometry
        patches = functional.unfold(self.inputs, self.shape[2:], dilation, padding, stride)
        return Products(
            self.outer.flatten(2), patches, self.shape, self.owners, self.shares, self.num_patients
        )


def smaller(products: Products) -> Contribution:
    """Returns products, or their rows where those are smaller, as Bu et al. choose."""
    matrix = products.left.shape[1] * products.right.shape[1]
    return products if 2 * products.left.shape[2] ** 2 <= matrix else Rows(products.rows())


def clip_factors(contributions: list[Contribution], *, bound: float) -> tuple[Tensor, list[Contribution]]:
    """Returns the factor that brings each patient's gradient to the bound, and what it is a factor of.

    A patient of whom anything is not finite, or whose norm is not, counts as nothing: it could not be
    clipped. Other patients are not changed, so the sensitivity of the weighted sum stays the bound.
    """
    norms = torch.stack([one.squared_norms() for one in contributions]).sum(dim=0).sqrt()
    lost = ~norms.isfinite()
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    if not bool(lost.any()):
        return factors, contributions
    return torch.where(lost, 0.0, factors), [one.without(lost) for one in contributions]
