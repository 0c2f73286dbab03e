"""Chest-radiograph phantoms: what a scanner makes of an anatomy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulations.anatomy import NO_POINTS, Anatomy, Points, random_pose
from simulations.projection import blur, density, line, splat, to_pixels

# Changes whenever the same numbers give other pixels or headers; sites of another version are remade.
VERSION = 2

CLASS_NAMES = ("normal", "opacity")
# How wide a part of the patient the numbers in ``simulations/anatomy.py`` take as their field of view.
CHEST_MM = 380.0

Pixels = NDArray[np.uint16]
Photometric = Literal["MONOCHROME1", "MONOCHROME2"]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One X-ray device. Blur and pixel size are in mm on the detector, ``noise_sd`` in units of density."""

    model: str
    modality: Literal["DX", "CR"]
    photometric: Photometric
    bits_stored: int
    rescale_slope: float
    rescale_intercept: float
    field_mm: float
    pixel_mm: float
    blur_mm: float
    gamma: float
    noise_sd: float
    exposure_spread: float

    @property
    def size(self) -> int:
        """Rows and columns of its images."""
        return round(self.field_mm / self.pixel_mm)


# One site in turn each, so that four sites differ in everything that a reader has to get right, and so much
# in contrast and field of view that a network trained at one site is worse at the others: model, modality,
# photometric interpretation, bits stored, rescale slope and intercept, gamma, field of view (mm).
_MODELS: tuple[tuple[str, Literal["DX", "CR"], Photometric, int, float, float, float, float], ...] = (
    ("Aster DR 200", "DX", "MONOCHROME2", 12, 1.0, 0.0, 1.0, 380.0),
    ("Borage CR 8", "CR", "MONOCHROME1", 8, 2.0, 30.0, 1.16, 372.0),
    ("Comfrey DX 16", "DX", "MONOCHROME2", 16, 1.0, 0.0, 0.88, 400.0),
    ("Dill DR 12", "DX", "MONOCHROME1", 12, 1.0, 0.0, 1.08, 366.0),
    ("Elder CR 10", "CR", "MONOCHROME2", 12, 0.5, -100.0, 0.86, 382.0),
    ("Fennel DX 2", "DX", "MONOCHROME1", 16, 1.0, 0.0, 1.12, 392.0),
)


def random_scanner(rng: np.random.Generator, *, index: int, image_size: int) -> Scanner:
    """Draws the device of site number ``index``; ``image_size`` is what rows and columns are near to."""
    model, modality, photometric, bits_stored, slope, intercept, gamma, field_mm = _MODELS[
        index % len(_MODELS)
    ]
    return Scanner(
        model=model,
        modality=modality,
        photometric=photometric,
        bits_stored=bits_stored,
        rescale_slope=slope,
        rescale_intercept=intercept,
        field_mm=field_mm,
        pixel_mm=round(field_mm / image_size * rng.uniform(0.88, 1.12), 3),
        blur_mm=float(rng.uniform(1.2, 3.0)),
        gamma=float(gamma * rng.uniform(0.97, 1.03)),
        noise_sd=float(rng.uniform(0.010, 0.030)),
        exposure_spread=float(rng.uniform(0.04, 0.10)),
    )


def draw(anatomy: Anatomy, scanner: Scanner, rng: np.random.Generator) -> Pixels:
    """Takes one image of a patient.

    Pose, exposure, noise and what lies on a patient differ from image to image, the anatomy does not.

    Returns:
        Stored values, uint16, (scanner.size, scanner.size), below ``2 ** scanner.bits_stored``; of a
        MONOCHROME1 device low values are bright.
    """
    pose = random_pose(rng, scale=CHEST_MM / scanner.field_mm)
    size = scanner.size
    image = density(anatomy, pose=pose, size=size)
    image += splat(to_pixels(_objects(rng), pose=pose, size=size), size=size, blur_pixels=0.004 * size)
    image = blur(image, sigma_pixels=scanner.blur_mm / scanner.pixel_mm)
    exposure = np.exp(rng.normal(0.0, scanner.exposure_spread))
    # Dense parts let fewer photons through, so they are noisier.
    noise_sd = scanner.noise_sd / np.sqrt(exposure) * np.exp(0.9 * (image - 0.7))
    image = image + noise_sd * rng.standard_normal(image.shape, dtype=np.float32)
    return _digitise(image * exposure, scanner=scanner)


def _digitise(image: NDArray[np.float32], *, scanner: Scanner) -> Pixels:
    """Applies the tone curve and spreads the result over the middle of the device's range."""
    tone = np.power(np.clip(image * 0.85 + 0.05, 0, 1), scanner.gamma)
    if scanner.photometric == "MONOCHROME1":
        tone = 1 - tone
    greatest = 2**scanner.bits_stored - 1
    stored: Pixels = np.rint((0.06 + 0.88 * tone) * greatest).astype(np.uint16)
    return stored


def _objects(rng: np.random.Generator) -> Points:
    """What lies on the patient in this image: a side marker, often ECG leads, sometimes calcifications."""
    points = [_side_marker(rng)]
    if rng.random() < 0.4:
        points += [_lead(rng) for _ in range(rng.integers(1, 4))]
    if rng.random() < 0.2:
        place = (rng.choice([-1, 1]) * rng.uniform(0.25, 0.5), rng.uniform(-0.4, 0.3))
        points.append(line([place, (place[0] + 0.012, place[1] + 0.008)], weight=0.5))
    return np.concatenate(points)


def _side_marker(rng: np.random.Generator) -> Points:
    left = bool(rng.random() < 0.5)
    x, y = (0.80 if left else -0.88) + rng.normal(0, 0.02), rng.uniform(-0.85, -0.6)
    strokes = {
        True: [[(0, 0), (0, 0.09), (0.05, 0.09)]],
        False: [
            [(0, 0.09), (0, 0), (0.045, 0.01), (0.045, 0.04), (0, 0.045)],
            [(0.015, 0.045), (0.05, 0.09)],
        ],
    }[left]
    return np.concatenate([line([(x + a, y + b) for a, b in stroke], weight=0.35) for stroke in strokes])


def _lead(rng: np.random.Generator) -> Points:
    """An electrode and the wire that leaves the image at one side."""
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.5)
    end_x, end_y = float(rng.choice([-1.0, 1.0])), rng.uniform(-0.6, 0.9)
    middle = ((x + end_x) / 2, max(y, end_y) + rng.uniform(0.0, 0.25))
    t = np.linspace(0, 1, 24)[:, None]
    curve = (
        (1 - t) ** 2 * np.array([[x, y]])
        + 2 * t * (1 - t) * np.array([middle])
        + t**2 * np.array([[end_x, end_y]])
    )
    ring = [(x + 0.025 * np.cos(a), y + 0.025 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 12)]
    wire = line([(float(a), float(b)) for a, b in curve], weight=0.10)
    return np.concatenate([NO_POINTS, wire, line(ring, weight=0.25)])
