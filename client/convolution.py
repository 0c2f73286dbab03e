"""Functions of convolutions: what patients contribute to their parameters, in their backward."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from client import precision
from client.book import Book, applied
from client.contribution import Postponed, Rows, smaller
from client.patches import of_weights
from client.product import columns, product, products
from common.layout import memory_format

FEW_POSITIONS: Final = 64
"""Up to here a product of matrices is faster than a convolution of one pixel's size."""
FEW_PRODUCTS: Final = 16
"""Up to here the patches of a convolution are small beside the gradients of its weights."""
FEW_CHANNELS: Final = {False: 8, True: 16}
"""Below these a group of channels fills no vector of the processor, in float32 and in bfloat16."""
PATCH_NUMBERS: Final = 1 << 21
"""Of the patches that are cut at a time."""


def convolution(layer: Any, book: Book, inputs: Tensor) -> Tensor:
    if _is_pointwise(layer) and inputs.shape[2:].numel() <= FEW_POSITIONS:
        return applied(_Pointwise, layer, book, inputs, layer.weight)
    padding, inputs = _padding(layer, inputs)
    return applied(_Convolution, layer, book, inputs, layer.weight, padding)


def transposed(layer: Any, book: Book, inputs: Tensor) -> Tensor:
    return applied(_Convolution, layer, book, inputs, layer.weight, layer.padding)


class _Pointwise(Function):
    """A convolution that is a linear layer at each position, where there are few: one product of matrices.

    torch makes one product for each case, which costs many times as much for a late layer of a large network.
    """

    @staticmethod
    def forward(ctx: Any, layer: Any, book: Book, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.layer, ctx.book = layer, book
        inputs, weight = book.cast(inputs), book.cast(weight)
        ctx.save_for_backward(inputs, weight)
        bias = book.bias(layer)
        found = product(weight.flatten(1), columns(inputs))
        if bias is not None:
            found += bias[:, None]
        return _from_columns(found, like=inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        layer, book = ctx.layer, ctx.book
        left = outer.flatten(2)
        book.add(layer.weight, smaller(book.products(left, inputs.flatten(2), shape=weight.shape)))
        if layer.bias is not None:
            book.add(layer.bias, book.mean(left.sum(dim=2)))
        of_inputs = None
        if ctx.needs_input_grad[2]:
            of_inputs = _from_columns(product(weight.flatten(1).T, columns(outer)), like=outer)
        return None, None, of_inputs, None


def _settings(layer: Any, *, padding: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """Returns what torch's functions of convolutions take after the bias."""
    around = (0,) * len(layer.kernel_size) if padding is None else padding
    return (layer.stride, around, layer.dilation, layer.transposed, layer.output_padding, layer.groups)


def _from_columns(values: Tensor, *, like: Tensor) -> Tensor:
    return values.view(-1, len(like), *like.shape[2:]).transpose(0, 1).contiguous()


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Any, book: Book, inputs: Tensor, weight: Tensor, padding: tuple[int, ...]
    ) -> Tensor:
        ctx.layer, ctx.book = layer, book
        ctx.settings = _settings(layer, padding=padding)
        inputs, weight = book.cast(inputs), book.cast(weight)
        ctx.save_for_backward(inputs, weight)
        return torch.convolution(inputs, weight, book.bias(layer), *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        outer = outer.contiguous(memory_format=memory_format(inputs))
        if _has_few_products(ctx.layer, outer):
            _note_patches(ctx.layer, ctx.book, outer, inputs, settings=ctx.settings)
        else:
            _note_one_by_one(ctx.layer, ctx.book, outer, inputs, settings=ctx.settings)
        of_inputs = None
        if ctx.needs_input_grad[2]:
            of_inputs = _of_inputs(outer, inputs, weight, settings=ctx.settings)
        return None, None, of_inputs, None, None


def _of_inputs(outer: Tensor, inputs: Tensor, weight: Tensor, *, settings: Any) -> Tensor:
    found: Tensor = torch.ops.aten.convolution_backward(
        outer, inputs, weight, None, *settings, [True, False, False]
    )[0]
    return found


def _has_few_products(layer: Any, outer: Tensor) -> bool:
    """Says whether the gradients of a flat convolution are better left as products."""
    positions = outer.shape[2:].numel()
    is_known = isinstance(layer, nn.Conv2d) and layer.groups == 1
    return is_known and positions <= FEW_PRODUCTS and 2 * positions**2 <= layer.weight.numel()


def _note_patches(layer: Any, book: Book, outer: Tensor, inputs: Tensor, *, settings: Any) -> None:
    outer, inputs = outer.contiguous(), inputs.contiguous()
    book.add(layer.weight, book.patches(outer, inputs, geometry=settings[:3], shape=layer.weight.shape))
    if layer.bias is not None:
        book.add(layer.bias, book.mean(outer.flatten(2).sum(dim=2)))


def _note_one_by_one(layer: Any, book: Book, outer: Tensor, inputs: Tensor, *, settings: Any) -> None:
    outer, inputs = outer.detach(), inputs.detach()  # from a graph, which would keep what is made of them
    rows = partial(_one_by_one, layer, book, outer, inputs, settings=settings)
    is_postponed = outer.numel() + inputs.numel() < book.num_patients * layer.weight.numel()
    book.add(layer.weight, Postponed(rows) if is_postponed else Rows(rows()))
    if layer.bias is not None:
        book.add(layer.bias, book.mean(outer.flatten(2).sum(dim=2)))  # torch's own takes longer


def _one_by_one(layer: Any, book: Book, outer: Tensor, inputs: Tensor, *, settings: Any) -> Tensor:
    """Patches are cut, or one native call is made: to a convolution, each case is a group of channels."""
    if _is_pointwise(layer) and outer.dtype == torch.bfloat16:
        by_case = products(outer.flatten(2), inputs.flatten(2)).view(-1, *layer.weight.shape)
    elif _is_better_cut(layer, inputs):
        by_case = _from_patches(layer, outer, inputs, padding=settings[1])
    else:
        is_slow = precision.is_slow_in_groups(outer.dtype, layer)
        pair = (outer.float(), inputs.float()) if is_slow else (outer, inputs)
        by_case = _in_groups(layer.weight, *pair, settings=settings)
    return book.mean(by_case).values


def _is_better_cut(layer: Any, inputs: Tensor) -> bool:
    """Says so of few channels, and of channels side by side, which would have to be put in another order."""
    can_be = layer.groups == 1 and not layer.transposed and set(layer.dilation) == {1}
    return can_be and (_has_few_channels(inputs) or memory_format(inputs) == torch.channels_last)


def _has_few_channels(inputs: Tensor) -> bool:
    return inputs.shape[1] < FEW_CHANNELS[inputs.dtype == torch.bfloat16]


def _from_patches(layer: Any, outer: Tensor, inputs: Tensor, *, padding: tuple[int, ...]) -> Tensor:
    """Returns the gradients of each case's weights, as products with the patches of the inputs."""
    multiply = _by_channel
    if _has_few_channels(inputs):
        multiply, inputs = _by_position, inputs.contiguous()
    windows = inputs
    if any(padding):
        windows = functional.pad(inputs, [size for size in reversed(padding) for _ in range(2)])
    for axis, (size, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True), start=2):
        windows = windows.unfold(axis, size, stride)  # (cases, channels, *positions, *kernel)
    number = max(1, PATCH_NUMBERS // windows[0].numel())
    parts = [
        multiply(*pair) for pair in zip(torch.split(outer, number), torch.split(windows, number), strict=True)
    ]
    return torch.cat(parts)


def _by_position(outer: Tensor, windows: Tensor) -> Tensor:
    """The positions of a patch's number lie side by side, which is fast where patches have few numbers."""
    axes = outer.dim() - 2
    patches = windows.movedim(tuple(range(2, 2 + axes)), tuple(range(-axes, 0)))
    found = patches.flatten(1, 1 + axes).flatten(2) @ outer.flatten(2).transpose(1, 2)
    return found.transpose(1, 2).reshape(*outer.shape[:2], *patches.shape[1 : 2 + axes])


def _by_channel(outer: Tensor, windows: Tensor) -> Tensor:
    """The numbers of a patch lie side by side, as channels do in the inputs."""
    axes = outer.dim() - 2
    patches = windows.movedim(1, -1)
    kernel = patches.shape[1 + axes :]
    found = outer.flatten(2) @ patches.flatten(1, axes).flatten(2)
    return found.view(*outer.shape[:2], *kernel).movedim(-1, 2)


def _in_groups(weight: Tensor, outer: Tensor, inputs: Tensor, *, settings: Any) -> Tensor:
    cases, (*geometry, groups) = len(inputs), settings
    shape = (cases * len(weight), *weight.shape[1:])
    outer, inputs = (one.contiguous().view(1, -1, *one.shape[2:]) for one in (outer, inputs))
    of_all = of_weights(outer, inputs, shape=shape, settings=(*geometry, cases * groups))
    return of_all.view(cases, *weight.shape)


def _padding(layer: Any, inputs: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Returns what the convolution pads by itself, and its input with all other padding."""
    around = layer._reversed_padding_repeated_twice
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return none, functional.pad(inputs, around, mode=layer.padding_mode)
    if not isinstance(layer.padding, str):
        return layer.padding, inputs
    before, after = around[::2], around[1::2]
    if before == after:
        return tuple(reversed(before)), inputs
    return none, functional.pad(inputs, around)


def _is_pointwise(layer: Any) -> bool:
    """Says whether a convolution is a linear layer at each position."""
    alone = all(size == 1 for size in (*layer.kernel_size, *layer.stride))
    padded = layer.padding != "same" and any(layer.padding)
    return alone and layer.groups == 1 and not layer.transposed and not padded
