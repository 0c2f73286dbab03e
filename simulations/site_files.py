"""The files that make a directory of images a simulated site, in exactly the layout of a real one."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from client import skeleton
from client.case import Case
from client.policies import EVERY_PLAN
from common import keys
from common.asked import Target

SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2}
SEPARATOR = "|"
NO_LABEL = "-"  # an empty cell says nothing about a case; this says that it bears no label


def write_site(
    directory: Path, *, settings: Mapping[str, Any], cases: Iterable[Case], split_key: bytes
) -> None:
    """Writes what makes a directory of images a site: settings, case table and the key of its split.

    Args:
        directory: the site; may exist already, with its images.
        settings: the keys of ``site.yaml``; its ``cases`` say what the table holds, see ``table``.
        cases: the rows of the table.
        split_key: 32 bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    (directory / "site.yaml").write_text(text, encoding="utf-8")
    listed = settings["cases"]
    with (directory / listed["file"]).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_columns(listed))
        writer.writerows(_row(case, listed) for case in cases)
    (directory / "private").mkdir(mode=0o700)
    keys.write_secret(directory / "private" / "split.key", split_key.hex().encode("ascii"))


def settings(*, name: str, num_patients: int, max_epsilon: float, delta: float) -> dict[str, Any]:
    """Returns the settings of a new site that takes every plan, also with seeded noise or without privacy."""
    nominal_patients = max(1, round(num_patients * SPLIT["train"]))
    text = skeleton.settings_text(name=name, nominal_patients=nominal_patients)
    usual: dict[str, Any] = yaml.safe_load(text)
    return usual | {
        "split": dict(SPLIT),
        "max_epsilon": max_epsilon,
        "delta": delta,
        "unsafe_allow_seeded_noise": True,
        "unsafe_allow_no_privacy": True,
        "policies": [EVERY_PLAN.model_dump(exclude_none=True)],
    }


def table(
    usual: Mapping[str, Any],
    *,
    inputs: Sequence[str],
    values: Sequence[str],
    targets: Sequence[Target],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Returns the ``cases`` of a site whose table names its columns as plans do.

    Args:
        usual: the ``cases`` of a new site.
        inputs: names of the images of a case.
        values: names of its clinical values.
        targets: what the table says of a case.
        classes: all labels that a case may bear.
    """
    several = "labels" in targets
    return {
        **usual,
        "images": {name: name for name in inputs},
        "label": "label" if several or "class" in targets else None,
        "separator": SEPARATOR if several else None,
        "classes": {NO_LABEL: None, **{name: name for name in classes}} if several else {},
        "mask": "mask" if "mask" in targets else None,
        "values": {name: name for name in values},
    }


def split_key_of(seed: int, name: str) -> bytes:
    """A simulated site's secret follows from the seed, so that its split can be repeated."""
    return hashlib.sha256(f"feverfew simulated split {seed} {name}".encode()).digest()


def _columns(listed: Mapping[str, Any]) -> list[str]:
    optional = [listed[name] for name in ("label", "mask") if listed[name] is not None]
    return [*listed["images"].values(), *optional, listed["patient"], *listed["values"].values()]


def _row(case: Case, listed: Mapping[str, Any]) -> list[str]:
    label = [] if listed["label"] is None else [_label(case)]
    mask = [] if listed["mask"] is None else [case.mask]
    return [*case.images, *label, *mask, case.patient, *case.values]


def _label(case: Case) -> str:
    return "" if case.labels is None else SEPARATOR.join(case.labels) or NO_LABEL
