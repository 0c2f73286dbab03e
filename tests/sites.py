"""Site directories for tests, with generated images."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from client import skeleton
from client.site import Site, open_site
from common import keys

CLASSES = ("normal", "opacity")
EVERY_PLAN = {"name": "every plan", "decision": "approve", "when": {}}
RULES: dict[str, Any] = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=1))["rules"]


def write_site(
    directory: Path,
    *,
    name: str = "north",
    num_patients: int = 20,
    cases_per_patient: int = 2,
    size: int = 28,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
    masks: bool = False,
    **settings: Any,
) -> Site:
    """Writes a site with grey PNG images of ``(size, size)`` pixels; returns it opened.

    The ``k``-th patient is of class ``k`` modulo the number of classes; the higher the class, the brighter
    the square in the images. Settings are those of a new site (``client/skeleton.py``) that approves every
    plan, also one without privacy, and is split in 0.6, 0.2, 0.2; with changes such as ``max_epsilon=1.0``.
    With ``masks`` a case has a mask instead of a label: 1 in the square, 0 around it.
    """
    (directory / "images").mkdir(parents=True)
    rng = np.random.default_rng([seed, *name.encode()])
    rows = []
    for number in range(num_patients * cases_per_patient):
        patient = number // cases_per_patient
        label = patient % len(classes)
        _write_image(directory / f"images/{number}.png", rng, size=size, brightness=45 * label)
        says = f"images/{number}-mask.png" if masks else classes[label]
        if masks:
            _write_mask(directory / says, size=size)
        rows.append((f"images/{number}.png", says, f"Patient {patient}"))
    column = "mask" if masks else "label"
    with (directory / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", column, "patient_id"), *rows])
    if masks:
        settings["cases"] = skeleton_cases(name) | {"label": None, "mask": "mask"}
    _write_settings(directory, name=name, num_patients=num_patients, changes=settings)
    (directory / "private").mkdir(mode=0o700)
    secret = hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
    keys.write_secret(directory / "private" / "split.key", secret.encode())
    return open_site(directory)


def skeleton_cases(name: str) -> dict[str, Any]:
    """Returns the ``cases`` of a new site's settings."""
    cases: dict[str, Any] = yaml.safe_load(skeleton.settings_text(name=name, nominal_patients=1))["cases"]
    return cases


def _write_mask(path: Path, *, size: int) -> None:
    inside = np.zeros((size, size), np.uint8)
    inside[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    Image.fromarray(inside).save(path)


def _write_image(path: Path, rng: np.random.Generator, *, size: int, brightness: int) -> None:
    pixels = rng.normal(100, 20, (size, size))
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] += brightness
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def _write_settings(directory: Path, *, name: str, num_patients: int, changes: dict[str, Any]) -> None:
    settings = yaml.safe_load(skeleton.settings_text(name=name, nominal_patients=num_patients))
    settings |= {
        "policies": [EVERY_PLAN],
        "unsafe_allow_no_privacy": True,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
    }
    (directory / "site.yaml").write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
