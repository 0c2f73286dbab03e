"""What the patients of a batch contribute, written down layer by layer in a backward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from client.contribution import Contribution, Products, Rows
from client.patches import Patches
from client.training import Batch


@dataclass
class Book:
    """What the patients of the batch at hand contribute, by parameter; in the parameters' own precision.

    ``compute``: the type in which layers of many products are computed; None for that of the parameters.
    """

    owners: Tensor
    num_patients: int
    shares: Tensor
    compute: torch.dtype | None = None
    uses: Counter[nn.Parameter] = field(default_factory=Counter)
    found: dict[nn.Parameter, Contribution] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, *, dtype: torch.dtype, compute: torch.dtype | None = None) -> Book:
        counts = torch.bincount(batch.owners, minlength=batch.num_patients)
        return cls(
            owners=batch.owners,
            num_patients=batch.num_patients,
            shares=counts.to(dtype).reciprocal()[batch.owners],
            compute=compute,
        )

    def cast(self, values: Tensor) -> Tensor:
        """Returns values in the type that layers of many products are computed in."""
        return values if self.compute is None else values.to(self.compute)

    def bias(self, layer: Any) -> Tensor | None:
        """Returns a layer's bias in that type, if it has one."""
        return None if layer.bias is None else self.cast(layer.bias)

    def add(self, parameter: nn.Parameter, contribution: Contribution) -> None:
        """Notes a contribution; those of several uses of a parameter add up."""
        if self.uses[parameter] > 1:
            former = self.found.get(parameter)
            rows = contribution.rows()
            contribution = Rows(rows if former is None else former.rows() + rows)
        self.found[parameter] = contribution

    def mean(self, by_case: Tensor) -> Rows:
        """Returns the means over each patient's cases of (cases, *shape)."""
        by_case = by_case.to(self.shares.dtype)
        if self.num_patients == len(by_case):
            return Rows(by_case)
        shared = by_case * self.shares.reshape(-1, *[1] * (by_case.dim() - 1))
        zeros = shared.new_zeros(self.num_patients, *shared.shape[1:])
        return Rows(zeros.index_add_(0, self.owners, shared))

    def products(self, left: Tensor, right: Tensor, *, shape: torch.Size) -> Products:
        """left: (cases, rows, positions), right: (cases, columns, positions)."""
        left, right = left.detach(), right.detach()  # from a graph, which would keep what is made of them
        return Products(left, right, shape, self.owners, self.shares, self.num_patients)

    def patches(self, outer: Tensor, inputs: Tensor, *, geometry: Any, shape: torch.Size) -> Patches:
        """outer, inputs: of a flat convolution, (cases, channels, height, width)."""
        outer, inputs = outer.detach(), inputs.detach()
        return Patches(outer, inputs, geometry, shape, self.owners, self.shares, self.num_patients)


def applied(function: type[Function], *arguments: Any) -> Tensor:
    """Returns what a Function of torch makes of its arguments."""
    found: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found
