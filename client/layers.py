"""A Function of each kind of layer: what patients contribute to its parameters, in its backward.

Forward is as torch does it; backward gives the input's gradient, and to the book what the patients
contribute. Parameters are among the inputs, though they get no gradient: without one that needs a gradient
there would be no backward for the first layer. Those of convolutions are in ``client/convolution.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from client.book import Book, applied
from client.contribution import Rows, smaller
from client.convolution import convolution, transposed
from client.product import product

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INSTANCE_NORMS: Final = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, book: Book, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.layer, ctx.book = layer, book
        inputs, weight = book.cast(inputs), book.cast(weight)
        ctx.save_for_backward(inputs, weight)
        return functional.linear(inputs, weight, book.bias(layer))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        layer, book = ctx.layer, ctx.book
        positions = (len(inputs), -1)
        left = outer.reshape(*positions, outer.shape[-1]).transpose(1, 2)
        right = inputs.reshape(*positions, inputs.shape[-1]).transpose(1, 2)
        book.add(layer.weight, smaller(book.products(left, right, shape=weight.shape)))
        if layer.bias is not None:
            book.add(layer.bias, book.mean(left.sum(dim=2)))
        of_inputs = None
        if ctx.needs_input_grad[2]:
            of_inputs = product(outer, weight) if outer.dim() == 2 else outer @ weight
        return None, None, of_inputs, None


class _GroupNorm(Function):
    """Instance normalisation is that of one group for each channel."""

    @staticmethod
    def forward(ctx: Any, layer: Any, book: Book, inputs: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.layer, ctx.book = layer, book
        ctx.sizes = (*inputs.shape[:2], inputs.shape[2:].numel(), groups)
        normed, mean, deviation = torch.ops.aten.native_group_norm(
            inputs, weight, layer.bias, *ctx.sizes, layer.eps
        )
        ctx.save_for_backward(inputs, weight, mean, deviation)
        return cast(Tensor, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        inputs, weight, mean, deviation = ctx.saved_tensors
        cases, channels, pixels, groups = ctx.sizes
        outer, inputs = outer.contiguous(), inputs.contiguous()
        # One case whose channels are those of all cases is normalised in the same way: so torch sums over
        # the pixels of each channel of each case, and not over cases.
        of_inputs, weights, biases = torch.ops.aten.native_group_norm_backward(
            *(outer, inputs, mean, deviation, torch.cat([weight] * cases)),
            *(1, cases * channels, pixels, cases * groups),
            [ctx.needs_input_grad[2], True, True],
        )
        ctx.book.add(ctx.layer.weight, ctx.book.mean(weights.view(cases, channels)))
        ctx.book.add(ctx.layer.bias, ctx.book.mean(biases.view(cases, channels)))
        return None, None, of_inputs, None, None


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.LayerNorm, book: Book, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.layer, ctx.book = layer, book
        normed, mean, deviation = torch.native_layer_norm(
            inputs, list(layer.normalized_shape), weight, layer.bias, layer.eps
        )
        ctx.save_for_backward(inputs, weight, mean, deviation)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        inputs, weight, mean, deviation = ctx.saved_tensors
        layer, book = ctx.layer, ctx.book
        shape = (len(inputs), -1, *layer.normalized_shape)
        book.add(layer.weight, book.mean((outer * (inputs - mean) * deviation).reshape(shape).sum(dim=1)))
        if layer.bias is not None:
            book.add(layer.bias, book.mean(outer.reshape(shape).sum(dim=1)))
        of_inputs = None
        if ctx.needs_input_grad[2]:
            of_inputs = torch.ops.aten.native_layer_norm_backward(
                outer.contiguous(),
                inputs,
                list(layer.normalized_shape),
                *(mean, deviation, weight, layer.bias, [True, False, False]),
            )[0]
        return None, None, of_inputs, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Embedding, book: Book, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.layer, ctx.book = layer, book
        ctx.save_for_backward(indices)
        return functional.embedding(indices, weight, layer.padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        layer, book = ctx.layer, ctx.book
        width = outer.shape[-1]
        flat = indices.reshape(len(indices), -1)
        rows = outer.new_zeros(book.num_patients, layer.num_embeddings, width)
        shared = outer.reshape(*flat.shape, width) * book.shares[:, None, None]
        rows.index_put_((book.owners[:, None].expand_as(flat), flat), shared, accumulate=True)
        if layer.padding_idx is not None:
            rows[:, layer.padding_idx] = 0.0
        book.add(layer.weight, Rows(rows))
        return None, None, None, None


class _Other(Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, book: Book, inputs: Tensor, *parameters: Tensor) -> Tensor:
        ctx.bare, ctx.book = _bare(layer), book
        inputs = inputs.to(parameters[0].dtype) if inputs.is_floating_point() else inputs
        ctx.save_for_backward(inputs)
        found: Tensor = ctx.bare(inputs)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        bare, book = ctx.bare, ctx.book
        names, parameters = zip(*bare.named_parameters(recurse=False), strict=True)

        def product(values: tuple[Tensor, ...], case: Tensor, of_case: Tensor) -> Tensor:
            output = functional_call(bare, dict(zip(names, values, strict=True)), (case[None],))
            product: Tensor = (output * of_case[None]).sum()
            return product

        detached = tuple(parameter.detach() for parameter in parameters)
        with torch.enable_grad():
            of_parameters, of_inputs = vmap(grad(product, argnums=(0, 1)), in_dims=(None, 0, 0))(
                detached, inputs, outer
            )
        for parameter, by_case in zip(parameters, of_parameters, strict=True):
            book.add(parameter, book.mean(by_case))
        return None, None, of_inputs, *[None] * len(parameters)


def _bare(layer: nn.Module) -> nn.Module:
    """Returns the layer with its own forward and the same parameters."""
    bare = copy.copy(layer)
    bare.__dict__.pop("forward", None)
    return bare


def _linear(layer: nn.Linear, book: Book, inputs: Tensor) -> Tensor:
    return applied(_Linear, layer, book, inputs, layer.weight)


def _group_norm(layer: nn.GroupNorm, book: Book, inputs: Tensor) -> Tensor:
    return applied(_GroupNorm, layer, book, inputs, layer.weight, layer.num_groups)


def _instance_norm(layer: Any, book: Book, inputs: Tensor) -> Tensor:
    return applied(_GroupNorm, layer, book, inputs, layer.weight, layer.num_features)


def _layer_norm(layer: nn.LayerNorm, book: Book, inputs: Tensor) -> Tensor:
    return applied(_LayerNorm, layer, book, inputs, layer.weight)


def _embedding(layer: nn.Embedding, book: Book, indices: Tensor) -> Tensor:
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise ValueError("expected an embedding without max_norm and scale_grad_by_freq: they mix patients")
    return applied(_Embedding, layer, book, indices, layer.weight)


def other(layer: nn.Module, book: Book, inputs: Tensor) -> Tensor:
    return applied(_Other, layer, book, inputs, *layer.parameters(recurse=False))


FORWARDS: Final[dict[Any, Callable[..., Tensor]]] = {
    nn.Linear: _linear,
    **dict.fromkeys(_CONVOLUTIONS, convolution),
    **dict.fromkeys(_TRANSPOSED, transposed),
    nn.GroupNorm: _group_norm,
    **dict.fromkeys(_INSTANCE_NORMS, _instance_norm),
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
