"""Book-keeping: what each patient contributes to every parameter, from one backward pass.

The forward of each layer with parameters is replaced while a network is attached. In the backward pass it
computes the gradient of its input as ever, but of its parameters what each patient contributes, instead of
the sum over the batch, which would be of no use. No hook wraps an output, so that a network may go on with
it in place.

Source: Bu et al. (2023), Differentially Private Optimization on Large Model at Small Cost (book-keeping);
to take cases for groups of channels is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from client import precision
from client.book import Book
from client.contribution import Contribution, Rows
from client.layers import FORWARDS, other
from client.training import Batch, case_losses, patient_means


class NotSupported(Exception):
    """A layer of whose gradients book-keeping cannot tell what each patient contributes; says which."""


class BookKeeping:
    """Replaces the forward of a network's layers until ``detach``.

    Layers of kinds that are not known here are done by torch's vectorised gradients, case by case; such a
    layer has to take one tensor, cases first.

    Args:
        compute: the type in which convolutions and linear layers are computed, forward and backward; None for
            that of the parameters. What patients contribute is in the parameters' type.

    Raises:
        NotSupported: a module has parameters of its own and modules within.
    """

    def __init__(self, network: nn.Module, *, compute: torch.dtype | None = None) -> None:
        self._network = network
        self._compute = compute
        self._memory_format = precision.memory_format(network, compute)
        self._parameters = list(network.parameters())
        self._layers = [layer for layer in network.modules() if list(layer.parameters(recurse=False))]
        self._book: Book | None = None
        forwards = [self._forward_of(layer) for layer in self._layers]
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward

    def detach(self) -> None:
        """Gives the layers their own forward back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def contributions(
        self, batch: Batch, *, losses: Callable[[Tensor, Tensor], Tensor] = case_losses
    ) -> tuple[list[Contribution], Tensor]:
        """Runs one forward and one backward pass.

        Args:
            losses: (outputs, targets) -> the loss of each case, (cases,).

        Returns:
            What the patients contribute to each parameter, in the network's order, and their mean losses.
        """
        dtype = self._parameters[0].dtype
        self._book = book = Book.of(batch, dtype=dtype, compute=self._compute)
        try:
            by_case = losses(
                self._network(*batch.laid_out(self._memory_format).inputs).to(dtype), batch.targets
            )
            by_case.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            self._book = None
        found = [self._found(book, parameter) for parameter in self._parameters]
        # What was found is part of the graph, and the graph knows the book: a ring that nobody would collect.
        book.found.clear()
        return found, patient_means(by_case.detach(), batch)

    def _found(self, book: Book, parameter: nn.Parameter) -> Contribution:
        """A parameter that had no part in the loss has a gradient of zero."""
        if parameter in book.found:
            return book.found[parameter]
        return Rows(parameter.new_zeros(book.num_patients, *parameter.shape))

    def _forward_of(self, layer: nn.Module) -> Callable[..., Tensor]:
        kind: Any = type(layer)
        parameters = list(layer.parameters(recurse=False))
        for known, forward in FORWARDS.items():
            if issubclass(kind, known) and kind.forward is known.forward:
                return partial(self._run, forward, layer, parameters)
        if list(layer.children()):
            raise NotSupported(f"{kind.__name__} has parameters of its own beside those of its layers")
        return partial(self._run, other, layer, parameters)

    def _run(
        self, forward: Callable[..., Tensor], layer: nn.Module, parameters: list[nn.Parameter], *inputs: Any
    ) -> Tensor:
        book = self._book
        if book is None or not torch.is_grad_enabled():
            plain: Tensor = type(layer).forward(layer, *inputs)
            return plain
        book.uses.update(parameters)
        return forward(layer, book, *inputs)
