"""What the patients of a batch contribute to the weights of a flat convolution with few positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client import gram
from client.contribution import Products, by_case, by_patient


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
        if self.needs_rows:
            return self._products().squared_norms()
        squares = self.shares.new_zeros(self.num_patients)
        for patients, outer, inputs in by_patient(self.outer, self.inputs, of=self):
            squares[patients] = self._of_patients(outer.transpose(1, 2), inputs.transpose(1, 2))
        return squares

    @property
    def needs_rows(self) -> bool:
        """Says whether Gram matrices of all shifts, in double precision, are larger than the rows, so that
        norms are had by way of these, and sums might as well."""
        one_each = self.num_patients == self.owners.numel()
        most_cases = 1 if one_each else int(torch.bincount(self.owners).max())
        positions = most_cases * self.outer.shape[2:].numel()
        return 2 * self.shape[2:].numel() * positions**2 > self.shape.numel()

    def _of_patients(self, outer: Tensor, inputs: Tensor) -> Tensor:
        """outer, inputs: (patients, channels, cases of each, height, width)."""
        of_pixels = gram.gram(inputs.flatten(2)).view(len(inputs), *inputs.shape[2:], *inputs.shape[2:])
        of_patches = gram.of_patches(
            of_pixels, geometry=self.geometry, kernel=self.shape[2:], size=outer.shape[2:]
        )
        return gram.squared_norms(gram.gram(outer.flatten(2)), of_patches, dtype=self.shares.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.outer * by_case(weights, of=self)[:, None, None, None]
        settings = (*self.geometry, False, (0, 0), 1)
        summed = of_weights(scaled, self.inputs.to(scaled.dtype), shape=self.shape, settings=settings)
        return summed.contiguous()

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


@dataclass(frozen=True)
class AlikePatches:
    """Those of several layers of the same shapes, for the same patients: one call does what many would."""

    layers: Sequence[Patches]

    def squared_norms(self) -> Tensor:
        """Returns the sums over the layers: (num_patients,). To each layer, its patients are others."""
        first, number = self.layers[0], len(self.layers)
        firsts = first.num_patients * torch.arange(number)
        joined = replace(
            first,
            outer=torch.cat([one.outer for one in self.layers]),
            inputs=torch.cat([one.inputs for one in self.layers]),
            owners=(firsts[:, None] + first.owners).flatten(),
            shares=first.shares.repeat(number),
            num_patients=number * first.num_patients,
        )
        return joined.squared_norms().view(number, -1).sum(dim=0)

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        """Returns one for each layer, flat; to a convolution, each layer is a group of channels."""
        first, number = self.layers[0], len(self.layers)
        outer = torch.cat([one.outer for one in self.layers], dim=1)
        scaled = outer * by_case(weights, of=first)[:, None, None, None]
        inputs = torch.cat([one.inputs for one in self.layers], dim=1).to(scaled.dtype)
        shape = (number * first.shape[0], *first.shape[1:])
        settings = (*first.geometry, False, (0, 0), number)
        summed = of_weights(scaled, inputs, shape=shape, settings=settings)
        return summed.contiguous().view(number, -1).unbind()


def of_weights(outer: Tensor, inputs: Tensor, *, shape: Sequence[int], settings: Any) -> Tensor:
    """Returns the gradient of a convolution's weights over all cases.

    Args:
        shape: of the weights: (channels of all groups, channels of a group's inputs, *kernel).
        settings: what torch's functions of convolutions take after the bias.
    """
    weight = outer.new_empty(shape)  # its values are not read
    summed: Tensor = torch.ops.aten.convolution_backward(
        outer, inputs, weight, None, *settings, [False, True, False]
    )[1]
    return summed
