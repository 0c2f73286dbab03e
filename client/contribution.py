"""What the patients of a batch contribute to the gradient of one parameter.

Clipping needs two things of it: its part of each patient's squared norm, and the sum over patients weighted
by their clip factors. Neither needs all per-patient gradients in memory, where these are products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from client import gram
from client.product import columns, product, products

GRAM_COST: Final = {False: 2.0, True: 4.0}
"""Of a number of two Gram matrices, which are in double precision, over one of the gradients; True: where
these are in bfloat16."""


class _OfCases(Protocol):
    """Knows whose the cases are: ``owners``, ``shares`` and ``num_patients`` as of ``Products``."""

    @property
    def owners(self) -> Tensor: ...
    @property
    def shares(self) -> Tensor: ...
    @property
    def num_patients(self) -> int: ...


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
        return _lengths(self.values, self.values.dtype).square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return (weights @ flat(self.values)).view(self.values.shape[1:])

    def without(self, patients: Tensor) -> Rows:
        kept = ~patients.reshape(-1, *[1] * (self.values.dim() - 1))
        return Rows(torch.where(kept, self.values, 0.0))


@dataclass(frozen=True)
class Postponed:
    """Gradients that are computed when they are asked for, of what takes less memory than they."""

    compute: Callable[[], Tensor]
    needs_rows = True

    def rows(self) -> Tensor:
        return self.compute()

    def squared_norms(self) -> Tensor:
        return Rows(self.rows()).squared_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return Rows(self.rows()).weighted_sum(weights)

    def without(self, patients: Tensor) -> Rows:
        return Rows(self.rows()).without(patients)


@dataclass(frozen=True)
class Products:
    """Gradients of a matrix that are sums of outer products, one for each position of each case.

    ``left``: (cases, rows of the matrix, positions); ``right``: (cases, columns of the matrix, positions);
    what belongs to a case is the product of both over its positions. ``shape``: of the parameter.
    ``owners``: int64, (cases,), ascending; ``shares``: (cases,), one over the number of the owner's cases.
    The sides may be in a coarser type than the shares, in whose type everything is computed.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    owners: Tensor
    shares: Tensor
    num_patients: int

    def rows(self) -> Tensor:
        if self.num_patients == len(self.left):
            return products(self.left, self.right).to(self.shares.dtype).view(-1, *self.shape)
        rows = self.shares.new_zeros(self.num_patients, self.left.shape[1], self.right.shape[1])
        for patients, left, right in by_patient(self.left, self.right, of=self):
            rows[patients] = self._summed(_positions(left), _positions(right))
        return rows.view(-1, *self.shape)

    @property
    def needs_rows(self) -> bool:
        """Says whether norms are had by way of the rows, so that sums might as well."""
        positions = self.left.shape[2] * len(self.left) / self.num_patients
        cost = GRAM_COST[self.left.dtype == torch.bfloat16]
        sizes = self.left.shape[1], self.right.shape[1]
        return positions > 1 and not _are_grams_cheaper(*sizes, positions, cost=cost)

    @property
    def are_norms_grams(self) -> bool:
        """Says whether norms are had by way of one Gram matrix of each side for each case."""
        return self.left.shape[2] > 1 and self.num_patients == self.left.shape[0] and not self.needs_rows

    def squared_norms(self) -> Tensor:
        squares = self.shares.new_zeros(self.num_patients)
        for patients, left, right in by_patient(self.left, self.right, of=self):
            squares[patients] = self._of_patients(_positions(left), _positions(right))
        return squares

    def _summed(self, left: Tensor, right: Tensor) -> Tensor:
        """left: (patients, rows, positions of all cases of each); right: (patients, columns, likewise)."""
        dtype = self.shares.dtype
        return products(left.to(dtype), right.to(dtype))

    def _of_patients(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: as for the sum."""
        dtype, positions = self.shares.dtype, left.shape[2]
        if positions > 1 and _are_grams_cheaper(left.shape[1], right.shape[1], positions):
            return gram.squared_norms(gram.gram(left), gram.gram(right), dtype=dtype)
        lengths = _lengths(left, dtype) * _lengths(right, dtype)  # Cauchy, Schwarz: no less than the terms'
        if positions == 1:
            return lengths.square()
        return gram.cautious(_lengths(self._summed(left, right), dtype).square(), lengths, dtype=dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self.left.shape[2] > 1:
            return AlikeProducts([self]).weighted_sums(weights)[0].view(self.shape)
        scaled = self.left[:, :, 0] * by_case(weights, of=self)[:, None]
        right = self.right[:, :, 0].to(scaled.dtype)
        return product(scaled.T.contiguous(), right).view(self.shape)  # else it takes twice the time

    def without(self, patients: Tensor) -> Products:
        kept = ~patients[self.owners][:, None, None]
        left, right = (torch.where(kept, side, 0.0) for side in (self.left, self.right))
        return replace(self, left=left, right=right)


@dataclass(frozen=True)
class AlikeProducts:
    """Those of several layers whose left sides have the same shape, for the same patients.

    One call does for all of them what would be many small ones.
    """

    layers: Sequence[Products]

    def squared_norms(self) -> Tensor:
        """Returns the sums over the layers, of patients with one case: (num_patients,)."""
        left = gram.gram(torch.cat([one.left for one in self.layers]))
        right = torch.cat([gram.gram(one.right) for one in self.layers])
        squares = gram.squared_norms(left, right, dtype=self.layers[0].shares.dtype)
        return squares.view(len(self.layers), -1).sum(dim=0)

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        """Returns one for each layer, flat."""
        by_all = by_case(weights, of=self.layers[0])[:, None, None]
        scaled = torch.stack([one.left for one in self.layers]) * by_all
        lefts = scaled.transpose(1, 2).flatten(2)  # (layers, rows, cases x positions)
        return [
            (left @ columns(one.right, dtype=lefts.dtype).T).view(-1)
            for left, one in zip(lefts, self.layers, strict=True)
        ]


def by_case(weights: Tensor, *, of: _OfCases) -> Tensor:
    """Returns the weight of each case of patients with these weights."""
    return weights if of.num_patients == of.owners.numel() else weights[of.owners] * of.shares


def by_patient(left: Tensor, right: Tensor, *, of: _OfCases) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yields patients that have equally many cases, and what is theirs of both sides: (patients, cases, ...).

    The right one is multiplied with the shares.
    """
    if of.num_patients == len(left):
        yield slice(None), left[:, None], right[:, None]
        return
    counts = torch.bincount(of.owners, minlength=of.num_patients)
    firsts = counts.cumsum(0) - counts
    shares = of.shares.reshape(-1, *[1] * (right.dim() - 1))
    for count in sorted({*counts.tolist()} - {0}):
        patients = (counts == count).nonzero()[:, 0]
        cases = firsts[patients][:, None] + torch.arange(count)
        yield patients, left[cases], right[cases] * shares[cases]


def _lengths(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(patients, ...) -> (patients,)"""
    lengths: Tensor = torch.linalg.vector_norm(flat(values), dim=1, dtype=dtype)
    return lengths


def flat(values: Tensor) -> Tensor:
    """(patients, ...) -> (patients, numbers)"""
    return values.reshape(values.shape[0], -1)  # len() of a tensor is slow


def _positions(values: Tensor) -> Tensor:
    """(patients, cases, rows, positions) -> (patients, rows, positions of all cases)"""
    return values.transpose(1, 2).flatten(2)


def _are_grams_cheaper(rows: int, columns: int, positions: float, *, cost: float = GRAM_COST[False]) -> bool:
    return rows * columns >= cost * positions * (rows + columns)


def smaller(products: Products) -> Contribution:
    """Returns products, or their rows where those are smaller, as Bu et al. choose."""
    matrix = products.left.shape[1] * products.right.shape[1]
    return products if 2 * products.left.shape[2] ** 2 <= matrix else Rows(products.rows())
