"""A product of matrices is what torch says, however it is computed."""

from __future__ import annotations

import pytest
import torch

from client import processor
from client import product as module
from client.product import product


@pytest.mark.parametrize("large", [1, 1 << 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (16, 64, 33)])
def test_a_product_is_that_of_torch(
    shape: tuple[int, int, int],
    is_transposed: bool,
    dtype: torch.dtype,
    large: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LARGE", large)
    monkeypatch.setattr(processor, "shares_out_products", lambda: False)
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    right = torch.randn(inner, columns, generator=generator).to(dtype)
    if is_transposed:
        left, right = left.T.contiguous().T, right.T.contiguous().T
    found = product(left, right)
    assert found.shape == (rows, columns) and found.is_contiguous()
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares_out", [False, True])
def test_only_large_products_in_float32_are_convolved_and_only_where_that_is_faster(
    shares_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "shares_out_products", lambda: shares_out)
    convolved: list[torch.Size] = []
    convolve = torch.conv2d

    def noted(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        convolved.append(weight.shape)
        return convolve(images, weight)

    monkeypatch.setattr(torch, "conv2d", noted)
    side = round(module.LARGE ** (1 / 3)) + 1
    large = torch.ones(side, side)
    product(large.double(), large.double())
    product(large[:2], large)
    assert not convolved
    product(large, large)
    assert len(convolved) == (0 if shares_out else 1)
