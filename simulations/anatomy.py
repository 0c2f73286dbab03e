"""Chests as numbers: what differs between patients, and how they stand in an image.

Coordinates are those of a frontal radiograph: ``x`` grows towards the patient's left (the right of the
image), ``y`` towards the feet, and the usual field of view is [-1, 1] in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]  # (points, 3): x, y, weight

NO_POINTS: Points = np.zeros((0, 3), np.float32)


@dataclass(frozen=True, kw_only=True)
class Opacity:
    """One finding: a cloud of overlapping round densities within a lung field.

    ``parts`` holds (x, y, radius, weight) of each; ``radius`` is that of the whole cloud.
    """

    x: float
    y: float
    radius: float
    contrast: float
    parts: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """One patient: what stays the same in all images of that patient."""

    chest_half_width: float
    apex_y: float
    right_dome_y: float
    left_dome_y: float
    heart_radius: float
    heart_x: float
    rib_pitch: float
    rib_phase: float
    rib_contrast: float
    clavicle_y: float
    spine_half_width: float
    breast: float
    vessel_contrast: float
    vessels: Points = field(repr=False)
    opacities: tuple[Opacity, ...]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How well findings can be seen.

    A patient's severity is a uniform number in [0, 1] raised to ``severity_exponent``: below 1 most patients
    are severe and few are faint. It moves number, contrast and radius together from the least to the greatest
    of their ranges. A contrast of 1 hides the air behind it; radii are in half fields of view.
    """

    num_opacities: tuple[int, int] = (1, 4)
    contrast: tuple[float, float] = (0.25, 1.0)
    radius: tuple[float, float] = (0.08, 0.26)
    severity_exponent: float = 0.35


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How a patient stood in one image: rotation, shift and scale, and the depth of the breath."""

    angle_radians: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0
    breath: float = 0.0


def random_anatomy(rng: np.random.Generator, *, diseased: bool, difficulty: Difficulty) -> Anatomy:
    """Draws a patient; ``diseased`` decides whether there are opacities, and nothing else."""
    chest_half_width = rng.uniform(0.68, 0.80)
    dome_y = rng.uniform(0.42, 0.56)
    apex_y = rng.uniform(-0.84, -0.76)
    numbers = dict(
        heart_radius=rng.uniform(0.24, 0.32),
        heart_x=rng.uniform(0.10, 0.16),
        rib_pitch=rng.uniform(0.150, 0.175),
        rib_phase=rng.uniform(0.0, 1.0),
        rib_contrast=rng.uniform(0.07, 0.14),
        clavicle_y=rng.uniform(-0.66, -0.56),
        spine_half_width=rng.uniform(0.075, 0.095),
        breast=float(rng.random() < 0.5) * rng.uniform(0.04, 0.12),
        vessel_contrast=rng.uniform(1.8, 3.6),
    )
    lungs = (chest_half_width, apex_y, dome_y)
    return Anatomy(
        chest_half_width=chest_half_width,
        apex_y=apex_y,
        right_dome_y=dome_y - rng.uniform(0.02, 0.08),
        left_dome_y=dome_y,
        **numbers,
        vessels=np.concatenate([_vessel_tree(rng, side=side, lungs=lungs) for side in (-1, 1)]),
        opacities=_random_opacities(rng, lungs=lungs, difficulty=difficulty) if diseased else (),
    )


def random_pose(rng: np.random.Generator, *, scale: float) -> Pose:
    """Draws how a patient stands; ``scale`` is that of the device."""
    return Pose(
        angle_radians=rng.normal(0.0, 0.02),
        shift_x=rng.normal(0.0, 0.02),
        shift_y=rng.normal(0.0, 0.02),
        scale=scale * rng.uniform(0.96, 1.04),
        breath=rng.normal(0.0, 0.02),
    )


def _random_opacities(
    rng: np.random.Generator, *, lungs: tuple[float, float, float], difficulty: Difficulty
) -> tuple[Opacity, ...]:
    severity = rng.random() ** difficulty.severity_exponent
    least, greatest = difficulty.num_opacities
    num_opacities = least + round((greatest - least) * severity)
    return tuple(
        _random_opacity(
            rng,
            place=_random_place(rng, lungs=lungs),
            radius=_within(difficulty.radius, severity * rng.uniform(0.7, 1.0)),
            contrast=_within(difficulty.contrast, severity * rng.uniform(0.8, 1.0)),
        )
        for _ in range(num_opacities)
    )


def _within(limits: tuple[float, float], fraction: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * fraction


def _random_opacity(
    rng: np.random.Generator, *, place: tuple[float, float], radius: float, contrast: float
) -> Opacity:
    x, y = place
    num_parts = 6
    offsets = rng.normal(0.0, 0.55 * radius, (num_parts, 2))
    radii = radius * rng.uniform(0.35, 0.75, num_parts)
    weights = rng.uniform(0.25, 0.6, num_parts)
    parts = zip(x + offsets[:, 0], y + offsets[:, 1], radii, weights, strict=True)
    return Opacity(
        x=x,
        y=y,
        radius=radius,
        contrast=contrast,
        parts=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in parts),
    )


def _random_place(rng: np.random.Generator, *, lungs: tuple[float, float, float]) -> tuple[float, float]:
    """A place inside a lung field, more often in its lower half, as pneumonia has it."""
    chest_half_width, apex_y, dome_y = lungs
    height = 1 - abs(rng.uniform(-1, 1)) * rng.uniform(0.5, 1.0)
    y = apex_y + 0.22 + height * (dome_y - 0.10 - apex_y - 0.22)
    outer = chest_half_width * (0.62 + 0.18 * height)
    return float(rng.choice([-1, 1]) * rng.uniform(0.26, outer)), float(y)


def _vessel_tree(rng: np.random.Generator, *, side: int, lungs: tuple[float, float, float]) -> Points:
    """Arteries that leave the hilum and branch twice, as points along smooth curves."""
    num_steps = 36
    angles = np.linspace(-1.25, 1.35, 9) + rng.normal(0, 0.12, 9)
    start = np.tile([0.16, -0.04], (9, 1)) + rng.normal(0, 0.02, (9, 2))
    generations = [start, angles, rng.uniform(0.30, 0.55, 9), np.full(9, 0.055)]
    curves: list[Points] = []
    for _ in range(3):
        start, angles, lengths, weights = generations
        path, heading = _curves(rng, start=start, angles=angles, lengths=lengths, num_steps=num_steps)
        taper = np.linspace(1.0, 0.45, num_steps)[None, :] * weights[:, None] * (lengths[:, None] / 0.4)
        curves.append(np.concatenate([path, taper[..., None]], axis=2).reshape(-1, 3).astype(np.float32))
        parent = np.repeat(np.arange(len(angles)), 2)
        fork = rng.integers(num_steps // 4, num_steps - 4, len(parent))
        spread = rng.uniform(0.35, 0.8, len(parent)) * np.tile([-1, 1], len(angles))
        generations = [
            path[parent, fork],
            heading[parent, fork] + spread,
            lengths[parent] * 0.55,
            weights[parent] * 0.6,
        ]
    points = np.concatenate(curves)
    points[:, 0] *= side
    return points


def _curves(
    rng: np.random.Generator,
    *,
    start: NDArray[np.float64],
    angles: NDArray[np.float64],
    lengths: NDArray[np.float64],
    num_steps: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Paths (curves, steps, 2) and headings (curves, steps) of curves that bend slowly."""
    bend = rng.normal(0, 0.5, len(angles))
    heading = angles[:, None] + bend[:, None] * np.linspace(0, 1, num_steps)[None, :]
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=2) * (lengths / num_steps)[:, None, None]
    return start[:, None, :] + np.cumsum(steps, axis=1), heading
