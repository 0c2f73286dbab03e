"""Clip factors of patients and the sums weighted by them, over all parameters of a network."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from client.contribution import AlikeProducts, Contribution, Postponed, Products, Rows, flat
from client.patches import AlikePatches, Patches

SHORT: Final = 4096
"""Numbers of a row, up to which those of all parameters are done together: a call costs more than they."""
SMALL: Final = 1 << 18
"""Numbers of a layer's patches, up to which it is done together with others of the same shapes."""


class _Together(Protocol):
    """Parameters whose contributions are done with the same calls."""

    def squared_norms(self) -> Tensor:
        """Returns the sums over the parameters: (num_patients,)."""
        ...

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        """Returns one for each parameter, flat."""
        ...


@dataclass(frozen=True)
class _Alone:
    one: Contribution

    def squared_norms(self) -> Tensor:
        return self.one.squared_norms()

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        return [self.one.weighted_sum(weights).view(-1)]


class _ShortRows:
    """Side by side, as those of one parameter."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._sizes = [one.values.shape[1:].numel() for one in parts]
        self._rows = Rows(torch.cat([flat(one.values) for one in parts], dim=1))

    def squared_norms(self) -> Tensor:
        return self._rows.squared_norms()

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        return torch.split(self._rows.weighted_sum(weights), self._sizes)


@dataclass(frozen=True)
class Group:
    """Contributions that are done together, and the places of their parameters in the network's order."""

    places: Sequence[int]
    together: _Together


def grouped(contributions: Sequence[Contribution]) -> list[Group]:
    """Returns all contributions, each in one group."""
    alike: dict[Hashable, list[int]] = {}
    for place, one in enumerate(contributions):
        alike.setdefault(_likeness(one) or place, []).append(place)
    return [Group(places, _joined([contributions[place] for place in places])) for places in alike.values()]


def _likeness(one: Contribution) -> Hashable:
    """Returns what contributions share that may be done together; None: with no other."""
    if isinstance(one, Rows) and one.values.numel() <= SHORT * one.values.shape[0]:
        return Rows
    if isinstance(one, Patches) and one.outer.numel() + one.inputs.numel() <= SMALL:
        return one.outer.shape, one.inputs.shape, one.geometry, one.shape
    if isinstance(one, Products) and one.are_norms_grams and one.left.numel() + one.right.numel() <= SMALL:
        return one.left.shape, one.left.dtype
    return None


def _joined(alike: list[Contribution]) -> _Together:
    if len(alike) == 1:
        return _Alone(alike[0])
    if isinstance(alike[0], Rows):
        return _ShortRows(cast(list[Rows], alike))
    if isinstance(alike[0], Products):
        return AlikeProducts(cast(list[Products], alike))
    return AlikePatches(cast(list[Patches], alike))


def weighted_sums(groups: list[Group], weights: Tensor) -> list[Tensor]:
    """Returns the weighted sum of each contribution, flat, in the network's order; empties the list, so that
    memory is free again at once."""
    found: dict[int, Tensor] = {}
    while groups:
        group = groups.pop(0)  # what early layers have goes before the sums of late ones come
        found.update(zip(group.places, group.together.weighted_sums(weights), strict=True))
    return [found[place] for place in range(len(found))]


def clip_factors(contributions: list[Contribution], *, bound: float) -> tuple[Tensor, list[Group]]:
    """Returns the factor that brings each patient's gradient to the bound, and what it is a factor of; takes
    it out of the list.

    A patient of whom anything is not finite, or whose norm is not, counts as nothing: it could not be
    clipped. Other patients are not changed, so the sensitivity of the weighted sum stays the bound.
    """
    for place, one in enumerate(contributions):
        if isinstance(one, Postponed | Products | Patches) and one.needs_rows:
            contributions[place] = Rows(one.rows())  # only now, when the network's activations are gone
    groups = grouped(contributions)
    norms = torch.stack([group.together.squared_norms() for group in groups]).sum(dim=0).sqrt()
    lost = ~norms.isfinite()
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    if bool(lost.any()):
        factors = torch.where(lost, 0.0, factors)
        groups = grouped([one.without(lost) for one in contributions])
    contributions.clear()
    return factors, groups
