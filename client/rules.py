"""The hospital's rules for its data: what images are expected, and what becomes of cases that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.errors import UserError
from common.value import Value

Decision = Literal["refuse", "keep", "ask"]
Modality = Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Range(Value):
    """Both ends are allowed."""

    least: Annotated[float, Field(gt=0)]
    most: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"expected least <= most, found {self.least} and {self.most}")
        return self

    def holds(self, value: float) -> bool:
        """Says whether a value is in the range."""
        return self.least <= value <= self.most


class Decisions(Value):
    """What becomes of the cases that a finding names: they are refused, kept, or a person is asked."""

    duplicate_pixels: Decision
    contradictory_pixels: Decision
    shared_pixels: Decision
    similar_patients: Decision
    wrong_modality: Decision
    mixed_modalities: Decision
    wrong_photometric: Decision
    mixed_photometric: Decision
    implausible_size: Decision
    implausible_spacing: Decision
    burned_in_text: Decision
    suspected_text: Decision


class Rules(Value):
    """What ``feverfew-client check`` goes by; every key is explained in ``site.yaml``."""

    modalities: tuple[Modality, ...]
    photometric: Literal["any", "grey", "colour"]
    pixels: Range
    spacing_mm: Range
    extent_mm: Range
    max_quarantined_fraction: Fraction
    decisions: Decisions


def decided(*, refuse: Sequence[str], keep: Sequence[str]) -> dict[str, Decision]:
    """Returns what a person decided, by code.

    Raises:
        UserError: nothing is to be decided about a code, or it is to be refused and kept.
    """
    for code in (*refuse, *keep):
        if code not in Decisions.model_fields:
            known = ", ".join(Decisions.model_fields)
            raise UserError(f"Expected a code of a finding to decide ({known}), found {code}.")
        if code in refuse and code in keep:
            raise UserError(f"Expected --refuse or --keep for {code}, found both.")
    return {**dict.fromkeys(refuse, "refuse"), **dict.fromkeys(keep, "keep")}
