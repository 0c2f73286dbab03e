"""What a plan asks of a case: one array of its images, its clinical values, and what it is labelled with."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.steps import (
    MAX_WINDOW,
    InPixels,
    Median,
    NonLocalMeans,
    OnUnitRange,
    Resample,
    Scaling,
    Sizing,
    Step,
)
from common.value import Finite, Name, Positive, Value

MAX_VALUES = 2**26  # of one preprocessed case

Size = Annotated[int, Field(ge=8, le=1024)]
Class = Annotated[str, Field(min_length=1, max_length=64)]
Classes = Annotated[tuple[Class, ...], Field(min_length=2, max_length=1000)]
Target = Literal["class", "labels", "mask"]


class Number(Value):
    """A clinical value that is a number. ``mean`` and ``std`` are public, from the literature: about what
    is usual, never from the data."""

    name: Name
    kind: Literal["number"]
    mean: Finite
    std: Positive

    @property
    def num_features(self) -> int:
        """The number in standard deviations from the mean, and whether it is missing."""
        return 2


class Category(Value):
    """A clinical value that is one of some words, such as a sex."""

    name: Name
    kind: Literal["category"]
    values: Annotated[tuple[Class, ...], Field(min_length=2, max_length=64)]

    @property
    def num_features(self) -> int:
        """One for each of the words, and whether it is missing."""
        return len(self.values) + 1


ClinicalValue = Annotated[Number | Category, Field(discriminator="kind")]


class Preprocessing(Value):
    """How the images of a case become one array of ``(num_channels, *size)`` with values in [0, 1].

    ``inputs`` names the images of a case, as the site's table does, in the order of their channels; each
    gives ``channels``. The steps are done in their order. Exactly one of them scales intensities to
    [0, 1], exactly one changes the size to ``size``.
    """

    inputs: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)]
    channels: Literal[1, 3]
    size: Annotated[tuple[Size, ...], Field(min_length=2, max_length=3)]
    precision: Literal["uint8", "float16"]
    steps: Annotated[tuple[Step, ...], Field(max_length=16)]

    @property
    def num_channels(self) -> int:
        """Channels of the network's input."""
        return len(self.inputs) * self.channels

    @model_validator(mode="after")
    def _is_one_case(self) -> Self:
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"expected distinct inputs, found {list(self.inputs)}")
        if self.num_channels * math.prod(self.size) > MAX_VALUES:
            raise ValueError(f"expected at most {MAX_VALUES} values in a case, found size {list(self.size)}")
        return self

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        names = [step.name for step in self.steps]
        scaling = [place for place, step in enumerate(self.steps) if isinstance(step, Scaling)]
        if len(scaling) != 1:
            raise ValueError(f"expected one step that scales to [0, 1], found {len(scaling)} in {names}")
        sizing = [place for place, step in enumerate(self.steps) if isinstance(step, Sizing)]
        if len(sizing) != 1:
            raise ValueError(f"expected one step resize or pad_or_crop, found {len(sizing)} in {names}")
        for step in self.steps[: scaling[0]]:
            if isinstance(step, OnUnitRange):
                raise ValueError(f"expected {step.name} after the scaling to [0, 1], found it before")
        if any(step.name in ("resample", "crop_foreground") for step in self.steps[sizing[0] + 1 :]):
            found = names[sizing[0]]
            raise ValueError(f"expected {found} after all other steps that change the size, found it before")
        return self

    @model_validator(mode="after")
    def _steps_can_be_done(self) -> Self:
        for place, step in enumerate(self.steps):
            if isinstance(step, Resample):
                _check_resample(step, later=self.steps[place + 1 :], dimensions=len(self.size))
            if isinstance(step, Median | NonLocalMeans):
                _check_window(step, dimensions=len(self.size))
        return self


def _check_resample(step: Resample, *, later: tuple[Step, ...], dimensions: int) -> None:
    if len(step.spacing_mm) != dimensions:
        raise ValueError(f"expected {dimensions} spacings, found {list(step.spacing_mm)}")
    before_resize = takewhile(lambda one: one.name != "resize", later)
    if not any(isinstance(one, InPixels) for one in before_resize):
        raise ValueError(
            "resample has no effect: resize follows, and no step between them counts in pixels; leave it "
            "out, or end with pad_or_crop"
        )


def _check_window(step: Median | NonLocalMeans, *, dimensions: int) -> None:
    found = step.num_pixels(dimensions)
    if found > MAX_WINDOW:
        raise ValueError(f"expected at most {MAX_WINDOW} pixels in the window of {step.name}, found {found}")


class Asked(Value):
    """All that a plan asks of a case.

    ``target`` says what a case is labelled with: ``class`` (one of the classes), ``labels`` (any number of
    them), or ``mask`` (a file that gives each pixel the number of its class, in the plan's order; the
    first is the background).
    """

    target: Target
    classes: Classes
    clinical: tuple[ClinicalValue, ...]
    preprocessing: Preprocessing

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected distinct classes, found {list(self.classes)}")
        names = [value.name for value in self.clinical]
        if len(set(names)) != len(names):
            raise ValueError(f"expected distinct clinical values, found {names}")
        return self

    @property
    def num_outputs(self) -> int:
        """One logit for one of two classes (sigmoid), else one for each class."""
        return 1 if self.target == "class" and len(self.classes) == 2 else len(self.classes)

    @property
    def num_features(self) -> int:
        """Length of the row of clinical values that is joined with the image."""
        return sum(value.num_features for value in self.clinical)
