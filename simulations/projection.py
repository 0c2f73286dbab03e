"""What the beam meets on its way through a chest: an anatomy's projected density, by closed forms and splats.

Densities have no unit: 0 is air in front of the detector, about 0.8 is the abdomen, 1 is bone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.anatomy import Anatomy, Points, Pose

Plane = NDArray[Any]  # float32, (rows, columns)


def density(anatomy: Anatomy, *, pose: Pose, size: int) -> Plane:
    """Returns what the beam met on its way to each pixel, float32, (size, size)."""
    x, y = _patient_coordinates(pose, size)
    side_x = np.abs(x)
    dome_y = np.where(x < 0, np.float32(anatomy.right_dome_y), np.float32(anatomy.left_dome_y)) + pose.breath
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
    total: Plane = soft - 0.55 * air + bones + anatomy.vessel_contrast * vessels * lung - belly_gas
    return total


def to_pixels(points: Points, *, pose: Pose, size: int) -> Points:
    """Moves (x, y, weight) from the patient's coordinates to (column, row, weight)."""
    cos, sin = np.cos(pose.angle_radians), np.sin(pose.angle_radians)
    x, y = points[:, 0] * pose.scale, points[:, 1] * pose.scale
    column = (cos * x - sin * y + pose.shift_x + 1) * (size / 2) - 0.5
    row = (sin * x + cos * y + pose.shift_y + 1) * (size / 2) - 0.5
    return np.stack([column, row, points[:, 2]], axis=1).astype(np.float32)


def splat(pixels: Points, *, size: int, blur_pixels: float) -> Plane:
    """Draws points (column, row, weight) bilinearly and blurs them; image sizes look alike."""
    column, row = np.floor(pixels[:, 0]).astype(np.int64), np.floor(pixels[:, 1]).astype(np.int64)
    right, down = pixels[:, 0] - column, pixels[:, 1] - row
    total = np.zeros(size * size)
    for add_row, add_column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (right if add_column else 1 - right) * (down if add_row else 1 - down) * pixels[:, 2]
        at_row, at_column = row + add_row, column + add_column
        inside = (at_row >= 0) & (at_row < size) & (at_column >= 0) & (at_column < size)
        index = at_row * size + at_column
        total += np.bincount(index[inside], weights=share[inside], minlength=size * size)
    image = total.reshape(size, size).astype(np.float32) * np.float32((size / 128) ** 2)
    return blur(image, sigma_pixels=blur_pixels)


def blur(image: Plane, *, sigma_pixels: float) -> Plane:
    """Gaussian blur, tap by tap.

    Not as matrix products: the linear-algebra library would give other bits with other numbers of threads.
    """
    if sigma_pixels < 0.1:
        return image
    radius = math.ceil(3 * sigma_pixels)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_pixels) ** 2)
    for axis in (0, 1):
        image = _filtered(image, taps=(taps / taps.sum()).astype(np.float32), axis=axis)
    return image


def _filtered(image: Plane, *, taps: Plane, axis: int) -> Plane:
    radius, length = len(taps) // 2, image.shape[axis]
    padded = np.pad(image, [(radius, radius) if axis == other else (0, 0) for other in (0, 1)], mode="edge")
    total = np.zeros_like(image)
    for start, tap in enumerate(taps):
        end = start + length
        total += tap * (padded[start:end] if axis == 0 else padded[:, start:end])
    return total


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
    bone = column * (0.05 + 0.035 * discs) * (1.0 + 0.6 * _step((y - 0.45) / 0.2))
    return bone + mediastinum + knob - trachea


def _heart(anatomy: Anatomy, *, x: Plane, y: Plane) -> Plane:
    """Two thick ellipses: the body of the heart to the patient's left and the right atrium."""
    u, v = x - anatomy.heart_x, y - 0.26
    along, across = 0.82 * u + 0.57 * v, 0.82 * v - 0.57 * u
    left = 1 - (along / (1.30 * anatomy.heart_radius)) ** 2 - (across / (0.90 * anatomy.heart_radius)) ** 2
    right = 1 - ((x + 0.06) / 0.17) ** 2 - ((y - 0.22) / 0.28) ** 2
    heart: Plane = np.minimum(_step((left - 0.12) / 0.14) + _step((right - 0.15) / 0.2), 1.2)
    return heart


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
    """Opacities as sums of products: a round Gaussian is separable however the patient is turned."""
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
    sums: Plane = np.einsum("pr,pc->rc", rows, columns)
    return sums


def line(corners: Sequence[tuple[float, float]], *, weight: float) -> Points:
    """Returns points (x, y, weight) along a polyline, evenly spaced at about half a pixel of 128."""
    x, y = np.array(corners, dtype=np.float64).T
    ends = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    along = np.linspace(0.0, ends[-1], max(2, int(ends[-1] * 128)))
    weights = np.full(len(along), weight)
    return np.stack([np.interp(along, ends, x), np.interp(along, ends, y), weights], axis=1).astype(
        np.float32
    )
