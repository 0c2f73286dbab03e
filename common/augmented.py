"""What a plan asks of the random copies of a case in training."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from common.value import Value


class Augmentation(Value):
    """Each case enters a step as so many random copies, whose gradients are averaged before the clip.

    Shifts are fractions of the length of each axis; a volume is turned about all three of its axes; a zoom
    by z makes things up to 1 + z times as large and up to 1 - z times as small. Along each of ``flip_axes``
    half of the copies are mirrored; 0 is the first axis of ``preprocessing.size``. Intensities are raised
    to a power from 1 / ``max_gamma`` to ``max_gamma``, and get Gaussian noise of a standard deviation up to
    ``max_noise_std``, of a range of 1.
    """

    copies: Annotated[int, Field(ge=1, le=64)]
    max_shift_fraction: Annotated[float, Field(ge=0, le=0.5)]
    max_rotation_degrees: Annotated[float, Field(ge=0, le=180)]
    max_zoom_fraction: Annotated[float, Field(ge=0, le=0.5)]
    flip_axes: Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(max_length=3)]
    max_gamma: Annotated[float, Field(ge=1, le=10)]
    max_noise_std: Annotated[float, Field(ge=0, le=1)]

    @property
    def moves(self) -> bool:
        """Whether pixels are moved."""
        moved = self.max_shift_fraction or self.max_rotation_degrees or self.max_zoom_fraction
        return bool(moved or self.flip_axes)

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if not (self.moves or self.max_gamma > 1 or self.max_noise_std):
            raise ValueError("expected copies that differ, found nothing random; set augmentation to null")
        if list(self.flip_axes) != sorted(set(self.flip_axes)):
            raise ValueError(f"expected flip_axes that increase, found {list(self.flip_axes)}")
        return self
