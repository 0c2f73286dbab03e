"""Max pooling of images, by torch's kernel for channels that lie side by side.

torch's other kernel, for images whose rows lie side by side, is not vectorised and takes a third of a step of
a small network. All else stays in that order of memory: group normalisation is slow in the other one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class QuickMaxPool2d(nn.MaxPool2d):
    """The values and gradients of ``nn.MaxPool2d``."""

    def forward(self, images: Tensor) -> Tensor:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        pooled: Tensor = _Pooling.apply(images, geometry)  # type: ignore[no-untyped-call]
        return pooled


class _Pooling(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        pooled, places = torch.ops.aten.max_pool2d_with_indices(_side_by_side(images), *_pairs(geometry))
        ctx.geometry, ctx.shape = geometry, images.shape
        ctx.save_for_backward(places)
        found: Tensor = pooled.contiguous()
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        shape = torch.empty(ctx.shape, dtype=outer.dtype, memory_format=torch.channels_last)  # never read
        of_images = torch.ops.aten.max_pool2d_with_indices_backward(
            _side_by_side(outer), shape, *_pairs(ctx.geometry), places
        )
        return of_images.contiguous(), None


def _side_by_side(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _pairs(geometry: tuple[Any, ...]) -> tuple[Any, ...]:
    *sizes, ceil = geometry
    return (*([size, size] if isinstance(size, int) else list(size) for size in sizes), ceil)


def with_quick_pooling(module: nn.Module) -> nn.Module:
    """Replaces max pooling in a network, in place; returns the network."""
    if type(module) is nn.MaxPool2d and not module.return_indices:
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return QuickMaxPool2d(*geometry, ceil_mode=module.ceil_mode)
    for name, child in module.named_children():
        setattr(module, name, with_quick_pooling(child))
    return module
