from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.layout import QuickFlatten, QuickMaxPool2d, with_quick_layers

ORDERS = st.sampled_from([torch.contiguous_format, torch.channels_last])


@settings(deadline=None)
@given(
    kernel=st.sampled_from([1, 2, 3, (2, 3)]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, (0, 0)]),
    ceil=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    repeats=st.booleans(),
    order=ORDERS,
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_of_pooling_are_those_of_torch_and_keep_their_order_of_memory(
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    dtype: torch.dtype,
    repeats: bool,
    order: torch.memory_format,
    seed: int,
) -> None:
    """Ties too, of which there are many after a ReLU: the gradient goes to the first of them."""
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 7, 8)
    images = (images.relu() if repeats else images).to(dtype).contiguous(memory_format=order)
    given, other = (images.clone().requires_grad_() for _ in range(2))
    expected = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)(given)
    found = QuickMaxPool2d(kernel, stride, padding, ceil_mode=ceil)(other)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=order)
    outer = torch.randn(expected.shape).to(dtype)
    expected.backward(outer)
    found.backward(outer)
    assert given.grad is not None and other.grad is not None
    torch.testing.assert_close(other.grad, given.grad)
    assert other.grad.is_contiguous(memory_format=order)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_flattening_gives_gradients_in_the_order_of_memory_of_what_it_flattened(
    order: torch.memory_format,
) -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=order).requires_grad_()
    inner = images * 1
    gradients: list[torch.Tensor] = []
    inner.register_hook(gradients.append)
    flat = QuickFlatten()(inner)
    outer = torch.randn(flat.shape)
    flat.backward(outer)
    assert torch.equal(flat, images.flatten(1))
    assert torch.equal(gradients[0], outer.view(images.shape))
    assert gradients[0].is_contiguous(memory_format=order)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2, 2)])
def test_what_is_no_image_is_flattened_too(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    assert torch.equal(QuickFlatten()(values), nn.Flatten()(values))


@pytest.mark.parametrize(
    "kept", [nn.MaxPool2d(2, return_indices=True), nn.MaxPool3d(2), nn.AvgPool2d(2), nn.Flatten(2)]
)
def test_only_max_pooling_of_images_and_whole_flattening_are_replaced(kept: nn.Module) -> None:
    network = nn.Sequential(
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Sequential(kept, nn.MaxPool2d(2)), nn.Flatten()
    )
    changed: Any = with_quick_layers(network)
    assert changed[1][0] is kept
    assert [type(changed[0]), type(changed[1][1])] == [QuickMaxPool2d] * 2
    assert type(changed[2]) is QuickFlatten
    assert changed[0].extra_repr() == nn.MaxPool2d(3, 2, 1, ceil_mode=True).extra_repr()


def test_gradients_are_refused_a_second_derivative_rather_than_given_a_wrong_one() -> None:
    images = torch.randn(1, 1, 4, 4, requires_grad=True)
    (first,) = torch.autograd.grad(QuickMaxPool2d(2)(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        first.sum().backward()
