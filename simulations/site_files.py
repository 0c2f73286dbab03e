"""The files that make a directory of images a simulated site, in exactly the layout of a real one."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from common import keys

SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2}


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """A row of ``cases.csv``; ``image`` is relative to the site directory."""

    image: str
    label: str
    patient_id: str


def write_site(
    directory: Path, *, settings: Mapping[str, object], rows: Iterable[CaseRow], split_key: bytes
) -> None:
    """Writes what makes a directory of images a site: settings, case table and the key of its split.

    Args:
        directory: the site; may exist already, with its images.
        settings: the keys of ``site.yaml``.
        rows: the case table.
        split_key: 32 bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    (directory / "site.yaml").write_text(text, encoding="utf-8")
    with (directory / "cases.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "label", "patient_id"))
        writer.writerows((row.image, row.label, row.patient_id) for row in rows)
    (directory / "private").mkdir(mode=0o700)
    keys.write_secret(directory / "private" / "split.key", split_key.hex().encode("ascii"))


def settings(*, name: str, num_patients: int, max_epsilon: float, delta: float) -> dict[str, object]:
    return {
        "name": name,
        "role": "training",
        "data": "private",
        "nominal_patients": max(1, round(num_patients * SPLIT["train"])),
        "patient_is": "column",
        "split": dict(SPLIT),
        "max_epsilon": max_epsilon,
        "delta": delta,
        "study_budgets": [],
        "unsafe_allow_seeded_noise": True,
        "unsafe_allow_no_privacy": True,
        "approve": "all",
        "max_repeats": 2,
        "threads": 1,
    }


def split_key_of(seed: int, name: str) -> bytes:
    """A simulated site's secret follows from the seed, so that its split can be repeated."""
    return hashlib.sha256(f"feverfew simulated split {seed} {name}".encode()).digest()
