"""What the patients of a batch contribute to the gradient of one parameter.

Clipping needs two things of it: its part of each patient's squared norm, and the sum over patients weighted
by their clip factors. Neither needs all per-patient gradients in memory, where these are products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from client import processor
from client.product import product

GRAM_COST = 2.0
"""Of a number of two Gram matrices, which are in double precision, over that of one of the gradients."""
ROUNDING = 4.0
"""In units of the last place: a sum of products is not longer than its norm says by more than rounding."""

LARGE = 1 << 20
"""Numbers of a matrix times the positions of a case, from which a product over all cases is faster as the
gradient of a convolution, where that shares the work out better among threads."""
_POINTWISE = (1, 1), (0, 0), (1, 1)
"""Stride, padding and dilation."""
SHORT = 4096
"""Numbers of a row, up to which those of all parameters are done together: a call costs more than they."""


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
        return _lengths(self.values).square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return (weights @ _flat(self.values)).view(self.values.shape[1:])

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
        squares = self.left.new_zeros(self.num_patients)
        for patients, left, right in _by_patient(self.left, self.right, of=self):
            squares[patients] = self._of_patients(
                left.transpose(1, 2).flatten(2), right.transpose(1, 2).flatten(2)
            )
        return squares

    def _of_patients(self, left: Tensor, right: Tensor) -> Tensor:
        """left: (patients, rows, positions of all cases of each); right: (patients, columns, likewise)."""
        rows, columns, positions = left.shape[1], right.shape[1], left.shape[2]
        if positions == 1 or rows * columns < GRAM_COST * positions * (rows + columns):
            lengths = _lengths(left) * _lengths(right)  # Cauchy, Schwarz: never less than the terms' lengths
            if positions == 1:
                return lengths.square()
            products = torch.bmm(left, right.transpose(1, 2))
            return _cautious(_lengths(products).square(), lengths, dtype=left.dtype)
        return _from_grams(_gram(left), _gram(right), dtype=left.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.left * _by_case(weights, of=self)[:, None, None]
        if self.left.shape[2] == 1:  # contiguous: the product takes half the time
            return product(scaled[:, :, 0].T.contiguous(), self.right[:, :, 0]).view(self.shape)
        if self._is_convolved:
            sides = scaled[..., None], self.right[..., None]
            shape = torch.Size((*(side.shape[1] for side in sides), 1, 1))
            return _of_weights(*sides, geometry=_POINTWISE, shape=shape).view(self.shape)
        together = scaled.transpose(0, 1).flatten(1)  # (rows, cases x positions)
        return (together @ self.right.transpose(0, 1).flatten(1).T).view(self.shape)

    @property
    def _is_convolved(self) -> bool:
        are_images = self.left.is_contiguous() and self.right.is_contiguous()  # unlike sequences
        is_large = self.shape.numel() * self.left.shape[2] >= LARGE
        is_better = is_large and not processor.shares_out_products()
        return are_images and is_better and self.left.dtype == torch.float32

    def without(self, patients: Tensor) -> Products:
        kept = ~patients[self.owners][:, None, None]
        left, right = (torch.where(kept, side, 0.0) for side in (self.left, self.right))
        return replace(self, left=left, right=right)


@dataclass(frozen=True)
class Patches:
    """Gradients of a flat convolution's weights, as what went in and the gradient of what came out.

    The patches under the kernel, which ``Products`` multiplies, are several times as large as the input. No
    norm needs them, unless a patient has so many positions that Gram matrices would be larger.
    ``outer``: (cases, channels, height, width); ``inputs``: likewise; ``geometry``: stride, padding,
    dilation. Else as ``Products``.
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
        if not self._has_small_grams():
            return self._products().squared_norms()
        squares = self.outer.new_zeros(self.num_patients)
        for patients, outer, inputs in _by_patient(self.outer, self.inputs, of=self):
            squares[patients] = self._of_patients(outer.transpose(1, 2), inputs.transpose(1, 2))
        return squares

    def _has_small_grams(self) -> bool:
        """Says whether those of all shifts, in double precision, are no larger than the gradients."""
        most_cases = int(torch.bincount(self.owners).max())
        positions = most_cases * self.outer[0, 0].numel()
        return 2 * self.shape[2:].numel() * positions**2 <= self.shape.numel()

    def _of_patients(self, outer: Tensor, inputs: Tensor) -> Tensor:
        """outer, inputs: (patients, channels, cases of each, height, width)."""
        of_patches = self._summed_over_kernel(
            _gram(inputs.flatten(2)).view(len(inputs), *inputs.shape[2:], *inputs.shape[2:]),
            size=outer.shape[2:],
        )
        left = _gram(outer.flatten(2))
        return _from_grams(left, of_patches.view(left.shape), dtype=outer.dtype)

    def _summed_over_kernel(self, gram: Tensor, *, size: torch.Size) -> Tensor:
        """Returns the Gram matrices of patches: the product of the patches at two positions is the sum, over
        the kernel, of those of the pixels that it covers at both.

        Args:
            gram: of pixels, (patients, cases, height, width, cases, height, width).
            size: cases, height and width of the positions.
        """
        stride, padding, dilation = self.geometry
        around = [width for width in reversed(padding) for _ in range(2)]
        padded = functional.pad(gram, [*around, 0, 0, *around])
        patient, *steps = padded.stride()
        one, other = steps[:3], steps[3:]
        moves = [step * (a + b) for step, a, b in zip(dilation, one[1:], other[1:], strict=True)]
        places = [
            step for case, row, column in (one, other) for step in (case, stride[0] * row, stride[1] * column)
        ]
        every = padded.as_strided((len(gram), *self.shape[2:], *size, *size), (patient, *moves, *places))
        return every.reshape(len(gram), -1, size.numel() ** 2).sum(dim=1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.outer * _by_case(weights, of=self)[:, None, None, None]
        return _of_weights(scaled, self.inputs, geometry=self.geometry, shape=self.shape)

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


def _of_weights(outer: Tensor, inputs: Tensor, *, geometry: Any, shape: torch.Size) -> Tensor:
    """Returns the gradient of a flat convolution's weights over all cases; geometry as of ``Patches``."""
    weight = outer.new_empty(shape)  # its values are not read
    summed: Tensor = torch.ops.aten.convolution_backward(
        outer, inputs, weight, None, *geometry, False, (0, 0), 1, [False, True, False]
    )[1]
    return summed.contiguous()


def _by_case(weights: Tensor, *, of: Products | Patches) -> Tensor:
    """Returns the weight of each case of patients with these weights."""
    return weights if of.num_patients == of.owners.numel() else weights[of.owners] * of.shares


def _by_patient(
    left: Tensor, right: Tensor, *, of: Products | Patches
) -> Iterator[tuple[Any, Tensor, Tensor]]:
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


def _lengths(values: Tensor) -> Tensor:
    """(patients, ...) -> (patients,)"""
    lengths: Tensor = torch.linalg.vector_norm(_flat(values), dim=1)
    return lengths


def _flat(values: Tensor) -> Tensor:
    """(patients, ...) -> (patients, numbers)"""
    return values.reshape(values.shape[0], -1)  # len() of a tensor is slow


def _gram(values: Tensor) -> Tensor:
    """(patients, rows, positions) -> (patients, positions, positions); in double precision, as products
    of two of them may cancel when they are added."""
    values = values.double()
    return torch.bmm(values.transpose(1, 2), values)


def _from_grams(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Returns the squared norms of sums over positions of outer products, by the Gram matrices of both."""
    lengths = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(dim=1)
    return _cautious((left * right).sum(dim=(1, 2)), lengths, dtype=dtype)


def _cautious(squares: Tensor, lengths: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Adds what rounding may add to a sum of products; ``lengths``: of its terms together, at least."""
    longer = squares.clamp(min=0).sqrt() + ROUNDING * torch.finfo(dtype).eps * lengths
    return longer.square().to(dtype)


def smaller(products: Products) -> Contribution:
    """Returns products, or their rows where those are smaller, as Bu et al. choose."""
    matrix = products.left.shape[1] * products.right.shape[1]
    return products if 2 * products.left.shape[2] ** 2 <= matrix else Rows(products.rows())


def _is_short(contribution: Contribution) -> TypeGuard[Rows]:
    if not isinstance(contribution, Rows):
        return False
    values = contribution.values
    return values.numel() <= SHORT * values.shape[0]


def _side_by_side(rows: list[Rows]) -> Tensor:
    return torch.cat([_flat(one.values) for one in rows], dim=1)


def weighted_sums(contributions: list[Contribution], weights: Tensor) -> list[Tensor]:
    """Returns the weighted sum of each, flat; empties the list, so that memory is free again at once."""
    short = {place: one for place, one in enumerate(contributions) if _is_short(one)}
    found: dict[int, Tensor] = {}
    if short:
        summed = weights @ _side_by_side(list(short.values()))
        sizes = [one.values.shape[1:].numel() for one in short.values()]
        found = dict(zip(short, torch.split(summed, sizes), strict=True))
    for place in reversed(range(len(contributions))):
        one = contributions.pop()
        if place not in found:
            found[place] = one.weighted_sum(weights).view(-1)
    return [found[place] for place in range(len(found))]


def clip_factors(contributions: list[Contribution], *, bound: float) -> tuple[Tensor, list[Contribution]]:
    """Returns the factor that brings each patient's gradient to the bound, and what it is a factor of.

    A patient of whom anything is not finite, or whose norm is not, counts as nothing: it could not be
    clipped. Other patients are not changed, so the sensitivity of the weighted sum stays the bound.
    """
    short = [one for one in contributions if _is_short(one)]
    others = [one for one in contributions if not _is_short(one)]
    together = [Rows(_side_by_side(short)), *others] if short else others
    norms = torch.stack([one.squared_norms() for one in together]).sum(dim=0).sqrt()
    lost = ~norms.isfinite()
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    if not bool(lost.any()):
        return factors, contributions
    return torch.where(lost, 0.0, factors), [one.without(lost) for one in contributions]
