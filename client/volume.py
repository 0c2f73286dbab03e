"""Places of slices in the patient: whether they make a volume, and its turn to right, anterior, superior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np

from client.image import Image
from common.errors import UnusableCase

COSINE_TOLERANCE = 1e-2  # of the length of a direction and of a right angle: headers hold few digits
SAME_COSINE_TOLERANCE = 1e-3  # between slices of a volume: 0.06 degrees
SAME_SPACING_FRACTION = 1e-3
LEAST_GAP_MM = 1e-2  # nearer slices are at the same place
UNEVEN_FRACTION = 0.1  # of the distance of slices, by which one may be off the even places
TILT = math.tan(math.radians(0.1))  # by which slices may drift from their normal
DRIFT_MM = 2e-2  # below which a drift is a matter of the digits in the header
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes run to left and posterior


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where a slice lies, by the axes of DICOM (left, posterior, superior).

    Attributes:
        position_mm: centre of the first pixel.
        directions: six cosines: along a row, then down a column.
        spacing_mm: distance of rows, distance of columns.
    """

    position_mm: tuple[float, ...]
    directions: tuple[float, ...]
    spacing_mm: tuple[float, ...]


def stacked(planes: Sequence[Plane]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order in which slices make a volume, by position along their normal, and its affine.

    The affine, float64, (4, 4), is from (column, row, slice) to millimetres towards right, anterior and
    superior. A slice that is missing at either end is not noticed, since nothing says how many there were.

    Raises:
        UnusableCase: ``no_position``, ``mixed_orientation``, ``mixed_size``, ``repeated_slices``,
            ``four_dimensional``, ``gantry_tilt`` or ``uneven_spacing``.
    """
    across, down = _directions(planes)
    rows_mm, columns_mm = _spacing(planes)
    normal = np.cross(across, down)
    positions = np.array([plane.position_mm for plane in planes])
    depths = positions @ normal
    order = np.argsort(depths, kind="stable")
    positions, depths = positions[order], depths[order] - depths.min()
    _check_repeats(np.diff(depths))
    _check_tilt(positions - positions[0] - depths[:, None] * normal, depths=depths)
    _check_even(depths)
    affine = np.eye(4)
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    affine[:3] = np.column_stack([across * columns_mm, down * rows_mm, step, positions[0]])
    return order, LPS_TO_RAS @ affine


def turned(voxels: np.ndarray, affine: np.ndarray) -> Image:
    """Returns a volume with its axes permuted and flipped to right, anterior, superior; never resampled.

    Args:
        voxels: float32, three axes in any order.
        affine: from their indices to millimetres towards right, anterior and superior.

    Raises:
        UnusableCase: ``no_orientation`` or ``gantry_tilt``: the axes are not at right angles.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (lengths > 0).all():
        raise UnusableCase("no_orientation", "Expected an orientation, found an affine of lower rank.")
    cosines = affine[:3, :3] / lengths
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > COSINE_TOLERANCE:
        raise UnusableCase("gantry_tilt", "Expected axes at right angles, found others.")
    stated = nibabel.orientations.io_orientation(affine)
    image = nibabel.orientations.apply_orientation(voxels, stated)
    affine = affine @ nibabel.orientations.inv_ornt_aff(stated, voxels.shape)
    spacing_mm = tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    array = np.ascontiguousarray(image[None], dtype=np.float32)
    return Image(array=array, spacing_mm=spacing_mm, affine=affine)


def _directions(planes: Sequence[Plane]) -> tuple[np.ndarray, np.ndarray]:
    cosines = np.array([plane.directions for plane in planes])
    if np.abs(cosines - cosines[0]).max() > SAME_COSINE_TOLERANCE:
        raise UnusableCase("mixed_orientation", "Expected parallel slices, found others among them.")
    across, down = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if np.abs([lengths[0] - 1, lengths[1] - 1, across @ down]).max() > COSINE_TOLERANCE:
        raise UnusableCase("no_position", "Expected two directions at right angles, found others.")
    across = across / lengths[0]
    down = down - (across @ down) * across
    return across, down / np.linalg.norm(down)


def _spacing(planes: Sequence[Plane]) -> tuple[float, ...]:
    spacing = np.array([plane.spacing_mm for plane in planes])
    if np.abs(spacing / spacing[0] - 1).max() > SAME_SPACING_FRACTION:
        raise UnusableCase("mixed_size", "Expected one spacing of pixels, found several.")
    return planes[0].spacing_mm


def _check_repeats(gaps_mm: np.ndarray) -> None:
    if (gaps_mm >= LEAST_GAP_MM).all():
        return
    ends = np.flatnonzero(np.append(gaps_mm >= LEAST_GAP_MM, True))
    at_each_place = set(np.diff(np.append(-1, ends)).tolist())
    if len(at_each_place) == 1:
        several = f"found {at_each_place.pop()} at each: times, echoes or directions of diffusion."
        raise UnusableCase("four_dimensional", f"Expected one slice at each place, {several}")
    raise UnusableCase("repeated_slices", "Expected one slice at each place, found several at some.")


def _check_tilt(drifts_mm: np.ndarray, *, depths: np.ndarray) -> None:
    """Refuses slices that are shifted against each other within their planes."""
    if (np.linalg.norm(drifts_mm, axis=1) > np.maximum(DRIFT_MM, TILT * depths)).any():
        raise UnusableCase("gantry_tilt", "Expected slices along their normal, found them shifted aside.")


def _check_even(depths_mm: np.ndarray) -> None:
    even, gap_mm = np.linspace(0, depths_mm[-1], len(depths_mm), retstep=True)
    if np.abs(depths_mm - even).max() > UNEVEN_FRACTION * float(gap_mm):
        raise UnusableCase("uneven_spacing", "Expected even distances of slices, found others.")
