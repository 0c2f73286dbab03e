"""Layers that are quick whether the pixels of a row or the channels of a pixel lie side by side in memory.

What comes in one order goes on in it, and so do its gradients: group normalisation is slow where channels lie
side by side; convolutions in bfloat16, and all layers after them, are slow where values are put in the other
order on their way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def memory_format(values: Tensor) -> torch.memory_format:
    """Returns ``torch.channels_last`` or ``torch.contiguous_format``, that of rows."""
    is_side_by_side = values.dim() == 4 and not values.is_contiguous()
    is_side_by_side = is_side_by_side and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_side_by_side else torch.contiguous_format


class QuickMaxPool2d(nn.MaxPool2d):
    """The values and gradients of ``nn.MaxPool2d``, by torch's kernel for channels that lie side by side.

    Its other kernel is not vectorised and takes a third of a step of a small network.
    """

    def forward(self, images: Tensor) -> Tensor:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        pooled: Tensor = _Pooling.apply(images, geometry)  # type: ignore[no-untyped-call]
        return pooled


class _Pooling(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        pooled, places = torch.ops.aten.max_pool2d_with_indices(_side_by_side(images), *_pairs(geometry))
        ctx.geometry, ctx.shape, ctx.order = geometry, images.shape, memory_format(images)
        ctx.save_for_backward(places)
        found: Tensor = pooled.contiguous(memory_format=ctx.order)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        shape = torch.empty(ctx.shape, dtype=outer.dtype, memory_format=torch.channels_last)  # never read
        of_images = torch.ops.aten.max_pool2d_with_indices_backward(
            _side_by_side(outer), shape, *_pairs(ctx.geometry), places
        )
        return of_images.contiguous(memory_format=ctx.order), None


def _side_by_side(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _pairs(geometry: tuple[Any, ...]) -> tuple[Any, ...]:
    *sizes, ceil = geometry
    return (*([size, size] if isinstance(size, int) else list(size) for size in sizes), ceil)


class QuickFlatten(nn.Flatten):
    """The values and gradients of ``nn.Flatten``; these in the order of memory of what was flattened.

    The layer before it would take gradients in one order and its own output in the other, at random.
    """

    def forward(self, images: Tensor) -> Tensor:
        if memory_format(images) == torch.contiguous_format:
            return super().forward(images)
        flat: Tensor = _Flattening.apply(images)  # type: ignore[no-untyped-call]
        return flat


class _Flattening(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.shape, ctx.order = images.shape, memory_format(images)
        return images.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        return outer.reshape(ctx.shape).contiguous(memory_format=ctx.order)


def with_quick_layers(module: nn.Module) -> nn.Module:
    """Replaces max pooling and flattening in a network, in place; returns the network."""
    if type(module) is nn.MaxPool2d and not module.return_indices:
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return QuickMaxPool2d(*geometry, ceil_mode=module.ceil_mode)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return QuickFlatten()
    for name, child in module.named_children():
        setattr(module, name, with_quick_layers(child))
    return module
