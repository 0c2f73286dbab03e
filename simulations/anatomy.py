"""A chest as numbers, and its projected density.

Coordinates are those of a frontal radiograph: ``x`` grows towards the patient's left (the right of the image), ``y``
towards the feet, and the field of view is [-1, 1] in both. Densities have no unit: 0 is air in front of the detector,
about 1 is the abdomen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
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

    A patient's severity is a uniform number in [0, 1] raised to ``severity_exponent``: below 1 most patients are
    severe and few are faint. It moves number, contrast and radius together from the least to the greatest of their
    ranges. A contrast of 1 hides the air behind it; radii are in half fields of view.
    """

    num_opacities: tuple[int, int] = (1, 4)
    contrast: tuple[float, float] = (0.15, 1.0)
    radius: tuple[float, float] = (0.08, 0.26)
    severity_exponent: float = 0.5


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


def density(anatomy: Anatomy, *, pose: Pose, size: int) -> Plane:
    """Returns what the beam met on its way to each pixel, float32, (size, size)."""
    x, y = _patient_coordinates(pose, size)
    side_x = np.abs(x)
    dome_y = np.where(x < 0, anatomy.right_dome_y, anatomy.left_dome_y) + np.float32(pose.breath)
    wall_x = _chest_wall(anatomy, y)
    lung = _lung_fields(anatomy, x=x, y=y, wall_x=wall_x, dome_y=dome_y)
    findings = _findings(anatomy, pose=pose, size=size)
    heart = _heart(anatomy, x=x, y=y)
    air = lung * (1 - np.minimum(findings, 0.92)) * (1 - 0.88 * np.minimum(heart, 1))
    bones = _ribs(anatomy, side_x=side_x, y=y, wall_x=wall_x, dome_y=dome_y)
    bones += _shoulders(anatomy, side_x=side_x, y=y) + _spine(anatomy, x=x, y=y)
    soft = _body(side_x=side_x, y=y) + 0.07 * heart + _breasts(anatomy, side_x=side_x, y=y)
    vessels = splat(to_pixels(anatomy.vessels, pose=pose, size=size), size=size, blur_pixels=0.006 * size)
    belly_gas = 0.25 * _bump((x - 0.38) / 0.13) * _bump((y - anatomy.left_dome_y - 0.2) / 0.09)
    return soft - 0.55 * air + bones + anatomy.vessel_contrast * vessels * lung - belly_gas


def to_pixels(points: Points, *, pose: Pose, size: int) -> Points:
    """Moves (x, y, weight) from the patient's coordinates to (column, row, weight)."""
    cos, sin = np.cos(pose.angle_radians), np.sin(pose.angle_radians)
    x, y = points[:, 0] * pose.scale, points[:, 1] * pose.scale
    column = (cos * x - sin * y + pose.shift_x + 1) * (size / 2) - 0.5
    row = (sin * x + cos * y + pose.shift_y + 1) * (size / 2) - 0.5
    return np.stack([column, row, points[:, 2]], axis=1).astype(np.float32)


def splat(pixels: Points, *, size: int, blur_pixels: float) -> Plane:
    """Draws points (column, row, weight) bilinearly and blurs them; weights stay comparable over image sizes."""
    column, row = np.floor(pixels[:, 0]).astype(np.int64), np.floor(pixels[:, 1]).astype(np.int64)
    right, down = pixels[:, 0] - column, pixels[:, 1] - row
    total = np.zeros(size * size)
    for add_row, add_column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (right if add_column else 1 - right) * (down if add_row else 1 - down) * pixels[:, 2]
        inside = (0 <= row + add_row) & (row + add_row < size) & (0 <= column + add_column)
        inside &= column + add_column < size
        index = (row + add_row) * size + column + add_column
        total += np.bincount(index[inside], weights=share[inside], minlength=size * size)
    image = total.reshape(size, size).astype(np.float32) * np.float32((size / 128) ** 2)
    return blur(image, sigma_pixels=blur_pixels)


def blur(image: Plane, *, sigma_pixels: float) -> Plane:
    """Gaussian blur of a square image as two matrix products, which beats a loop over taps at these sizes."""
    matrix = _blur_matrix(image.shape[0], round(sigma_pixels, 2))
    return matrix @ image @ matrix.T


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma_pixels: float) -> Plane:
    index = np.arange(size)
    matrix = np.exp(-0.5 * ((index[:, None] - index[None, :]) / max(sigma_pixels, 0.05)) ** 2)
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane]:
    axis = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _patient_coordinates(pose: Pose, size: int) -> tuple[Plane, Plane]:
    x, y = _grid(size)
    cos, sin = np.float32(np.cos(pose.angle_radians)), np.float32(np.sin(pose.angle_radians))
    x, y = x - np.float32(pose.shift_x), y - np.float32(pose.shift_y)
    scale = np.float32(1 / pose.scale)
    return (cos * x + sin * y) * scale, (cos * y - sin * x) * scale


def _step(value: Plane) -> Plane:
    """A soft step from 0 to 1 around 0."""
    return 0.5 + 0.5 * np.tanh(value)


def _bump(value: Plane) -> Plane:
    return np.exp(-0.5 * value * value)


def _chest_wall(anatomy: Anatomy, y: Plane) -> Plane:
    """Half width of the chest's inside at each height: narrow at the apex, widest above the diaphragm."""
    widest_y = 0.30
    above = np.clip((widest_y - y) / (widest_y - anatomy.apex_y), 0, 1)
    return np.float32(anatomy.chest_half_width) * np.power(np.maximum(1 - above**2.1, 0), 0.60)


def _lung_fields(anatomy: Anatomy, *, x: Plane, y: Plane, wall_x: Plane, dome_y: Plane) -> Plane:
    side_x = np.abs(x)
    relative = side_x / anatomy.chest_half_width
    floor_y = dome_y + 0.55 * (relative - 0.42) ** 2
    midline_x = 0.125 + 0.05 * _bump((y + 0.02) / 0.16) + 0.06 * _step((y - 0.15) / 0.2)
    inside = _step((wall_x - side_x) / 0.018) * _step((side_x - midline_x) / 0.025)
    depth = 0.72 + 0.28 * _bump((relative - 0.55) / 0.28)
    return inside * _step((floor_y - y) / 0.014) * depth * (0.9 + 0.1 * y)


def _ribs(anatomy: Anatomy, *, side_x: Plane, y: Plane, wall_x: Plane, dome_y: Plane) -> Plane:
    """All ribs at once: each kind follows one curve repeated down the chest, so a phase is enough."""
    relative = side_x / anatomy.chest_half_width
    below = _step((dome_y + 0.12 - y) / 0.07)
    within = _step((wall_x + 0.035 - side_x) / 0.012) * (0.35 + 0.65 * below)
    behind_y = y + 0.10 * relative - 0.30 * relative**3
    behind = _rib_profile(behind_y / anatomy.rib_pitch + anatomy.rib_phase, half_width=0.20)
    front_y = y - 0.42 * (1 - relative) - 0.26
    front = _rib_profile(front_y / (1.12 * anatomy.rib_pitch) + anatomy.rib_phase, half_width=0.22)
    front = front * _step((relative - 0.48) / 0.10) * _step((y + 0.45) / 0.1)
    wall = _bump((side_x - wall_x - 0.02) / 0.022) * below
    return np.float32(anatomy.rib_contrast) * within * (behind + 0.55 * front) + 0.05 * wall


def _rib_profile(phase: Plane, *, half_width: float) -> Plane:
    """A tube seen from the side: filled, with brighter edges."""
    distance = np.abs(phase - np.round(phase))
    return 0.7 * _step((half_width - distance) / 0.05) + 0.6 * _bump((distance - half_width) / 0.045)


def _shoulders(anatomy: Anatomy, *, side_x: Plane, y: Plane) -> Plane:
    centre_y = anatomy.clavicle_y - 0.24 * (side_x - 0.1) + 0.05 * np.sin(7 * side_x)
    distance = np.abs(y - centre_y)
    tube = 0.10 * _step((0.030 - distance) / 0.010) + 0.09 * _bump((distance - 0.03) / 0.010)
    clavicle = tube * _step((side_x - 0.07) / 0.012) * _step((0.80 - side_x) / 0.03)
    humerus = _step((0.075 - np.hypot(side_x - 0.93, y - anatomy.clavicle_y + 0.02)) / 0.015)
    blade_x = 0.80 - 0.14 * _step((y - anatomy.clavicle_y - 0.25) / 0.15)
    blade = _bump((side_x - blade_x) / 0.03) * _step((anatomy.clavicle_y + 0.62 - y) / 0.08)
    return clavicle + 0.16 * humerus + 0.05 * blade * _step((y - anatomy.clavicle_y) / 0.05)


def _spine(anatomy: Anatomy, *, x: Plane, y: Plane) -> Plane:
    """Vertebrae with discs between them, the aortic knob beside them and the trachea in front."""
    column = _step((anatomy.spine_half_width - np.abs(x)) / 0.015)
    discs = 0.5 + 0.5 * np.cos(np.float32(2 * np.pi / 0.125) * y)
    knob = 0.16 * _bump((x - 0.13) / 0.055) * _bump((y + 0.30) / 0.085)
    mediastinum = 0.08 * _bump(x / 0.13) * _step((y + 0.75) / 0.2)
    trachea = 0.12 * _bump((x + 0.015) / 0.030) * _step((-0.30 - y) / 0.06)
    return column * (0.05 + 0.035 * discs) * (1.0 + 0.6 * _step((y - 0.45) / 0.2)) + mediastinum + knob - trachea


def _heart(anatomy: Anatomy, *, x: Plane, y: Plane) -> Plane:
    """Two thick ellipses: the body of the heart to the patient's left and the right atrium."""
    u, v = x - anatomy.heart_x, y - 0.26
    along, across = 0.82 * u + 0.57 * v, 0.82 * v - 0.57 * u
    left = 1 - (along / (1.30 * anatomy.heart_radius)) ** 2 - (across / (0.90 * anatomy.heart_radius)) ** 2
    right = 1 - ((x + 0.06) / 0.17) ** 2 - ((y - 0.22) / 0.28) ** 2
    return np.minimum(_step((left - 0.12) / 0.14) + _step((right - 0.15) / 0.2), 1.2)


def _body(*, side_x: Plane, y: Plane) -> Plane:
    """Soft tissue: shoulders, trunk and the denser abdomen; air above the shoulders."""
    shoulder_y = -0.88 + 0.30 * np.maximum(side_x - 0.22, 0) ** 1.3
    neck = _step((0.24 - side_x) / 0.03)
    trunk = np.maximum(_step((y - shoulder_y) / 0.03), neck) * _step((0.97 - side_x) / 0.03)
    return trunk * (0.62 + 0.16 * _step((y - 0.5) / 0.25) - 0.16 * side_x**2)


def _breasts(anatomy: Anatomy, *, side_x: Plane, y: Plane) -> Plane:
    if not anatomy.breast:
        return np.float32(0) * y
    radius = np.sqrt((side_x - 0.42) ** 2 + (y - 0.22) ** 2)
    return np.float32(anatomy.breast) * _step((0.27 - radius) / 0.03) * _step((y - 0.12) / 0.12)


def _findings(anatomy: Anatomy, *, pose: Pose, size: int) -> Plane:
    """Opacities as one matrix product: a round Gaussian is separable however the patient is turned."""
    parts = [
        (x, y, radius, weight * opacity.contrast)
        for opacity in anatomy.opacities
        for x, y, radius, weight in opacity.parts
    ]
    if not parts:
        return np.zeros((size, size), np.float32)
    table = np.array(parts, np.float32)
    centres = to_pixels(table[:, :3], pose=pose, size=size)
    sigma = (table[:, 2] * pose.scale * size / 2)[:, None]
    axis = np.arange(size, dtype=np.float32)[None, :]
    columns = _bump((axis - centres[:, :1]) / sigma)
    rows = _bump((axis - centres[:, 1:2]) / sigma) * table[:, 3:]
    return rows.T @ columns


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
        generations = [path[parent, fork], heading[parent, fork] + spread, lengths[parent] * 0.55, weights[parent] * 0.6]
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


def line(corners: Sequence[tuple[float, float]], *, weight: float) -> Points:
    """Points (x, y, weight) along a polyline, evenly spaced at about half a pixel of 128."""
    pieces = [NO_POINTS]
    for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False):
        num_points = max(2, int(np.hypot(x1 - x0, y1 - y0) * 128))
        x, y = np.linspace(x0, x1, num_points), np.linspace(y0, y1, num_points)
        pieces.append(np.stack([x, y, np.full(num_points, weight)], axis=1).astype(np.float32))
    return np.concatenate(pieces)
