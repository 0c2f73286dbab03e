"""Norms of sums of outer products, by Gram matrices: the gradients themselves are not needed.

Source: Goodfellow (2015), Efficient Per-Example Gradient Computations, for one position; over positions, Li
et al. (2022), Large Language Models Can Be Strong Differentially Private Learners.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

ROUNDING: Final = 4.0
"""In units of the last place: a sum of products is not longer than its norm says by more than rounding."""


def gram(values: Tensor) -> Tensor:
    """(patients, rows, positions) -> (patients, positions, positions); in double precision, as products
    of two of them may cancel when they are added."""
    values = values.double()
    return torch.bmm(values.transpose(1, 2), values)


def squared_norms(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Returns the squared norms of sums over positions of outer products, by the Gram matrices of both."""
    lengths = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(dim=1)
    return cautious((left * right).sum(dim=(1, 2)), lengths, dtype=dtype)


def cautious(squares: Tensor, lengths: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Adds what rounding may add to a sum of products; ``lengths``: of its terms together, at least."""
    longer = squares.clamp(min=0).sqrt() + ROUNDING * torch.finfo(dtype).eps * lengths
    return longer.square().to(dtype)


def of_patches(of_pixels: Tensor, *, geometry: Any, kernel: torch.Size, size: torch.Size) -> Tensor:
    """Returns the Gram matrices of patches: the product of the patches at two positions is the sum, over the
    kernel, of those of the pixels that it covers at both.

    Args:
        of_pixels: (patients, cases, height, width, cases, height, width).
        geometry: stride, padding and dilation.
        size: cases, height and width of the positions.

    Returns:
        (patients, positions, positions)
    """
    stride, padding, dilation = geometry
    around = [width for width in reversed(padding) for _ in range(2)]
    padded = functional.pad(of_pixels, [*around, 0, 0, *around])
    patient, *steps = padded.stride()
    one, other = steps[:3], steps[3:]
    moves = [step * (a + b) for step, a, b in zip(dilation, one[1:], other[1:], strict=True)]
    places = [
        step for case, row, column in (one, other) for step in (case, stride[0] * row, stride[1] * column)
    ]
    every = padded.as_strided((len(padded), *kernel, *size, *size), (patient, *moves, *places))
    positions = size.numel()
    return every.reshape(len(padded), -1, positions**2).sum(dim=1).view(-1, positions, positions)
