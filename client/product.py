"""Products of matrices."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from client import processor

LARGE: Final = 1 << 24
"""Multiplications, from which a convolution takes one thread as long, and two threads 60 to 90 % as long,
where it shares the work out better."""


def columns(values: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """(cases, channels, *size) -> (channels, cases x positions), copied once; None: in their own type."""
    moved = values.transpose(0, 1)
    if dtype is not None:
        moved = moved.to(dtype, memory_format=torch.contiguous_format)
    return moved.reshape(values.shape[1], -1)


def products(left: Tensor, right: Tensor) -> Tensor:
    """(cases, rows, positions), (cases, columns, positions) -> (cases, rows, columns), in the sides' type."""
    return torch.bmm(left, right.transpose(1, 2))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns (rows, inner) @ (inner, columns); a large one in float32 as a convolution of one pixel's size.

    On some processors that shares the work out better among threads than torch's product of matrices.
    """
    rows, columns = left.shape[0], right.shape[1]
    is_large = left.numel() * columns >= LARGE and left.dtype == right.dtype == torch.float32
    if processor.shares_out_products() or not is_large or not right.is_contiguous():
        return left @ right
    convolved: Tensor = torch.conv2d(right[None, :, :, None], left[:, :, None, None])
    return convolved.view(rows, columns)
