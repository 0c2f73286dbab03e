"""Sites of small images, for tests of their cohorts and of what is decoded once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image as Pillow

from client import skeleton
from client.cohort import Cohort, freeze, open_cohort
from client.site import Site, open_site
from common import keys
from tests.plans import asked

CLASSES = ("normal", "opacity")
SECRET = bytes(range(32))
ASKED = asked()
SETTINGS: dict[str, Any] = {
    **yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=10)),
    "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
}
Row = tuple[str, str, str]


def write_png(path: Path, *, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (11, 9), dtype=np.uint8)).save(path)


def write_table(directory: Path, rows: Iterable[Row]) -> None:
    lines = ["image,label,patient_id", *(",".join(row) for row in rows)]
    (directory / "cases.csv").write_text("\n".join(lines) + "\n")


def rows_of(num_patients: int) -> list[Row]:
    """Two images a patient, the label by patient."""
    return [(f"i/{n}.png", CLASSES[n // 2 % 2], f"Patient {n // 2}") for n in range(2 * num_patients)]


def make_site(directory: Path, rows: list[Row], **settings: Any) -> Site:
    directory.mkdir()
    for number, row in enumerate(rows):
        write_png(directory / row[0], seed=number)
    write_table(directory, rows)
    (directory / "site.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}))
    site = open_site(directory)
    site.private.mkdir(mode=0o700)
    keys.write_secret(site.private / "split.key", SECRET.hex().encode())
    return site


def opened(site: Site, **options: Any) -> Cohort:
    return open_cohort(site, **{"asked": ASKED, **options})


def decoded(site: Site) -> int:
    """Opens the cohort and returns how many cases had to be decoded."""
    told: list[tuple[int, int]] = []
    freeze(site)
    opened(site, on_progress=lambda done, total: told.append((done, total)))
    return len(told)


def same(first: Cohort, second: Cohort) -> bool:
    return all(
        np.array_equal(part.images, second.parts[name].images)
        and np.array_equal(part.targets, second.parts[name].targets)
        and all(map(np.array_equal, part.patients, second.parts[name].patients))
        for name, part in first.parts.items()
    )


def records(site: Site) -> bytes:
    (path,) = site.cache.glob("*/records-*.npy")
    return path.read_bytes()
