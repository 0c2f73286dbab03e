"""Random copies of cases for training: shifted, turned, zoomed, mirrored.

Every number comes from a stream of our own, never from torch's generators. A row of numbers is drawn for
each copy, whatever the settings, so cutting a step into batches changes none of them.

Source: De, Berrada, Hayes, Smith and Balle (2022), Unlocking High-Accuracy Differentially Private Image
Classification through Scale: several copies of a case are averaged before the clip.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch.nn import functional

from common.plan import Augmentation

_NUMBERS = 5
"""Uniform numbers of a copy: shift right, shift down, rotation, zoom, mirror."""

Uniform = np.ndarray[Any, np.dtype[np.float64]]


class Augmenter(Protocol):
    """Makes the same number of copies of every case."""

    @property
    def copies(self) -> int:
        """How many copies there are of each case."""
        ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the copies, those of one case beside each other: (cases * copies, channels, *size)."""
        ...


class Unchanged:
    """One copy of each case: the case itself."""

    copies = 1

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images


class RandomCopies:
    """Copies that are moved at random, within a plan's bounds; the case itself is not among them."""

    def __init__(self, asked: Augmentation, *, stream: Generator) -> None:
        self._asked = asked
        self._stream = stream

    @property
    def copies(self) -> int:
        """How many copies there are of each case."""
        return self._asked.copies

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        repeated = images.repeat_interleave(self.copies, dim=0)
        height, width = images.shape[-2:]
        drawn = self._stream.random((len(repeated), _NUMBERS))
        return moved(repeated, affine_maps(drawn, asked=self._asked, aspect=height / width))


UNCHANGED = Unchanged()


def augmenter_of(asked: Augmentation | None, *, stream: Generator) -> Augmenter:
    """Returns what a plan's ``training.augmentation`` asks for."""
    return UNCHANGED if asked is None else RandomCopies(asked, stream=stream)


def affine_maps(drawn: Uniform, *, asked: Augmentation, aspect: float) -> torch.Tensor:
    """Returns for each copy where its pixels are taken from.

    Args:
        drawn: uniform in [0, 1), float64, (copies, 5); see ``_NUMBERS``.
        aspect: height over width of the images, so that a rotation is one in pixels.

    Returns:
        float32, (copies, 2, 3): from places in the copy to places in the case, both in [-1, 1] from the left
        and the upper border to the right and the lower one.
    """
    right, down, turn, grown = (2 * drawn[:, :4] - 1).T
    angles = np.deg2rad(asked.max_rotation_degrees) * turn
    shrink = 1 / (1 + asked.max_zoom_fraction * grown)
    cosines, sines = shrink * np.cos(angles), shrink * np.sin(angles)
    mirror = np.where(drawn[:, 4] < 0.5, -1.0, 1.0) if asked.flip else np.ones(len(drawn))
    shift = 2 * asked.max_shift_fraction  # of a width or height, which is 2 long here
    rows = [
        [mirror * cosines, -sines * aspect, shift * right],
        [mirror * sines / aspect, cosines, shift * down],
    ]
    return torch.from_numpy(np.moveaxis(np.array(rows), 2, 0).astype(np.float32))


def moved(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Returns images with their pixels taken from elsewhere, bilinearly; beyond the border, from the border.

    A border of zeros would be an edge that no radiograph has.
    """
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
