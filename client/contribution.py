"""What the patients of a batch contribute to the gradient of one parameter.

Clipping needs two things of it: its part of each patient's squared norm, and the sum over patients weighted
by their clip factors. Neither needs all per-patient gradients in memory, where these are products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

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
            return self._of_single_cases()
        return self._of_several_cases()

    def _of_single_cases(self) -> Tensor:
        if self.left.shape[2] == 1:
            left, right = self.left[:, :, 0], self.right[:, :, 0]
            norms: Tensor = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
            return norms.square()
        left, right = self.left.double(), self.right.double()  # the terms may cancel
        gram = torch.bmm(left.transpose(1, 2), left) * torch.bmm(right.transpose(1, 2), right)
        return self._cautious(gram.sum(dim=(1, 2)), self._magnitudes())

    def _of_several_cases(self) -> Tensor:
        cases, _, positions = self.left.shape
        left = self.left.transpose(1, 2).flatten(0, 1).double()  # (cases x positions, rows)
        right = (self.right.transpose(1, 2) * self.shares[:, None, None]).flatten(0, 1).double()
        owners = self.owners.repeat_interleave(positions)
        together = (left @ left.T) * (right @ right.T)
        # Sums over a patient's own pairs alone; a factor of zero would let NaN of one patient reach another.
        pairs = torch.where(owners[:, None] == owners[None, :], together, 0.0).sum(dim=1)
        squares = pairs.new_zeros(self.num_patients).index_add_(0, owners, pairs)
        magnitudes = self._magnitudes() * self.shares
        summed = magnitudes.new_zeros(self.num_patients).index_add_(0, self.owners, magnitudes)
        return self._cautious(squares, summed)

    def _magnitudes(self) -> Tensor:
        """Returns for each case the sum of the norms of its products: (cases,)."""
        norms: Tensor = torch.linalg.vector_norm(self.left, dim=1) * torch.linalg.vector_norm(
            self.right, dim=1
        )
        return norms.sum(dim=1)

    def _cautious(self, squares: Tensor, magnitudes: Tensor) -> Tensor:
        """Adds what rounding may add to the sum of products, in the parameter's precision."""
        precision = torch.finfo(self.left.dtype).eps
        return (squares.clamp(min=0).sqrt() + ROUNDING * precision * magnitudes).square().to(self.left.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.left * (weights[self.owners] * self.shares)[:, None, None]
        if self.left.shape[2] == 1:
            return (scaled[:, :, 0].T @ self.right[:, :, 0]).view(self.shape)
        together = scaled.transpose(0, 1).flatten(1)  # (rows, cases x positions)
        return (together @ self.right.transpose(0, 1).flatten(1).T).view(self.shape)

    def without(self, patients: Tensor) -> Products:
        kept = ~patients[self.owners][:, None, None]
        left, right = (torch.where(kept, side, 0.0) for side in (self.left, self.right))
        return replace(self, left=left, right=right)


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
