"""Random copies of cases for training: shifted, turned, zoomed, mirrored, with other contrast and noise.

Every number comes from streams of our own, never from torch's generators. A row of numbers is drawn for
each copy, whatever the settings, and noise from a stream of its own, so cutting a step into batches changes
none of them.

Source: De, Berrada, Hayes, Smith and Balle (2022), Unlocking High-Accuracy Differentially Private Image
Classification through Scale: several copies of a case are averaged before the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from client.noise import Key
from common.augmented import Augmentation

Floats = np.ndarray[Any, np.dtype[np.float64]]

_NUMBERS = {2: 5, 3: 8}
"""Uniform numbers of a copy by its dimensions: a shift along each axis, rotations, zoom, mirrors."""
_PLANES = {2: ((0, 1),), 3: ((0, 1), (0, 2), (1, 2))}
"""The two axes, counted from the last, in whose plane each rotation turns."""


class Augmenter(Protocol):
    """Makes the same number of copies of every case."""

    @property
    def copies(self) -> int:
        """How many copies there are of each case."""
        ...

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the copies, those of one case beside each other.

        Args:
            images: float32, (cases, channels, *size), in [0, 1].
            targets: (cases, ...); masks are uint8, (cases, *size), and are moved with their images.

        Returns:
            float32, (cases * copies, channels, *size), and the target of each.
        """
        ...


class Unchanged:
    """One copy of each case: the case itself."""

    copies = 1

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, targets


class RandomCopies:
    """Copies that are changed at random, within a plan's bounds; the case itself is not among them."""

    def __init__(self, asked: Augmentation, *, key: Key) -> None:
        self._asked = asked
        self._places = key.stream("augmentation")
        self._intensities = key.stream("augmentation of intensities")
        self._noise = key.stream("augmentation with noise")

    @property
    def copies(self) -> int:
        """How many copies there are of each case."""
        return self._asked.copies

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.repeat_interleave(self.copies, dim=0)
        targets = targets.repeat_interleave(self.copies, dim=0)
        size = tuple(images.shape[2:])
        drawn = self._places.random((len(images), _NUMBERS[len(size)]))
        if self._asked.moves:
            maps = affine_maps(drawn, asked=self._asked, size=size)
            images = moved(images, maps)
            targets = moved_masks(targets, maps) if targets.shape[1:] == size else targets
        return self._with_other_intensities(images), targets

    def _with_other_intensities(self, images: torch.Tensor) -> torch.Tensor:
        gamma, loud = self._intensities.random((len(images), 2)).T
        if self._asked.max_gamma > 1:
            images = raised(images, exponents=self._asked.max_gamma ** (2 * gamma - 1))
        if self._asked.max_noise_std:
            noise = self._noise.standard_normal(tuple(images.shape), dtype=np.float32)
            images = noised(images, noise, stds=self._asked.max_noise_std * loud)
        return images


UNCHANGED = Unchanged()


def augmenter_of(asked: Augmentation | None, *, key: Key) -> Augmenter:
    """Returns what a plan's ``training.augmentation`` asks for; ``key``: that of the task."""
    return UNCHANGED if asked is None else RandomCopies(asked, key=key)


def affine_maps(drawn: Floats, *, asked: Augmentation, size: Sequence[int]) -> torch.Tensor:
    """Returns for each copy where its pixels are taken from.

    Args:
        drawn: uniform in [0, 1), float64, (copies, 5) for images and (copies, 8) for volumes; see
            ``_NUMBERS``. Shifts begin with that along the last axis.
        size: of the images, so that a rotation is one in pixels.

    Returns:
        float32, (copies, dimensions, dimensions + 1): from places in the copy to places in the case, both in
        [-1, 1] from border to border, the last axis first, as torch has them.
    """
    dimensions = len(size)
    signed = 2 * drawn[:, :-1] - 1
    maps = _rotations(asked.max_rotation_degrees * signed[:, dimensions:-1], dimensions=dimensions)
    maps /= (1 + asked.max_zoom_fraction * signed[:, -1])[:, None, None]
    maps *= _mirrors(drawn[:, -1], axes=asked.flip_axes, dimensions=dimensions)[:, None, :]
    lengths = np.array(size[::-1], np.float64)
    maps *= lengths / lengths[:, None]
    shifts = 2 * asked.max_shift_fraction * signed[:, :dimensions]  # every axis is 2 long here
    return torch.from_numpy(np.concatenate([maps, shifts[:, :, None]], axis=2).astype(np.float32))


def _rotations(degrees: Floats, *, dimensions: int) -> Floats:
    """Returns the product of a rotation in each plane: (copies, dimensions, dimensions)."""
    result = np.tile(np.eye(dimensions), (len(degrees), 1, 1))
    for angles, (first, second) in zip(np.deg2rad(degrees).T, _PLANES[dimensions], strict=True):
        turn = np.tile(np.eye(dimensions), (len(degrees), 1, 1))
        turn[:, first, first] = turn[:, second, second] = np.cos(angles)
        turn[:, first, second], turn[:, second, first] = -np.sin(angles), np.sin(angles)
        result = result @ turn
    return result


def _mirrors(drawn: Floats, *, axes: Sequence[int], dimensions: int) -> Floats:
    """Returns -1 along each axis that is mirrored, else 1: (copies, dimensions), the last axis first.

    The binary digits of one uniform number are so many independent tosses of a coin.
    """
    signs = np.ones((len(drawn), dimensions))
    for toss, axis in enumerate(axes, start=1):
        signs[:, dimensions - 1 - axis] = np.where(np.floor(drawn * 2**toss) % 2 == 0, -1.0, 1.0)
    return signs


def moved(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Returns images with their pixels taken from elsewhere, linearly; beyond the border, from the border.

    A border of zeros would be an edge that no radiograph has.
    """
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def moved_masks(masks: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Returns masks, uint8 (cases, *size), with each pixel's class taken from the nearest place."""
    numbers = masks[:, None].float()
    grid = functional.affine_grid(maps, list(numbers.shape), align_corners=False)
    found = functional.grid_sample(numbers, grid, mode="nearest", padding_mode="border", align_corners=False)
    return found[:, 0].to(masks.dtype)


def raised(images: torch.Tensor, *, exponents: Floats) -> torch.Tensor:
    """Raises the values of each image to a power; ``exponents``: (cases,)."""
    return images.clamp(0, 1) ** _by_case(exponents, images)


def noised(images: torch.Tensor, noise: np.ndarray, *, stds: Floats) -> torch.Tensor:
    """Adds noise to each image and keeps to [0, 1].

    Args:
        images: float32, (cases, channels, *size).
        noise: standard normal, float32, of the same shape.
        stds: the standard deviation of each, (cases,).
    """
    return (images + torch.from_numpy(noise) * _by_case(stds, images)).clamp(0, 1)


def _by_case(values: Floats, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, *[1] * (images.dim() - 1))
