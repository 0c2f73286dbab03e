"""Renders ``private/check.html``: one self-contained page for the site's own people; it names examples."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from client import files, quarantine
from client.site import Site
from common.template import template

if TYPE_CHECKING:
    from client.check import Findings

FATES = {"refuse": "refused", "keep": "kept", "ask": "to be decided", None: "–"}


def write(site: Site, findings: Findings) -> Path:
    """Writes the page (mode 0600); returns where."""
    path = site.private / "check.html"
    files.write_private(path, content=render(site, findings).encode())
    return path


def render(site: Site, findings: Findings) -> str:
    """Returns the whole page as text; everything that comes from data is escaped."""
    first = next(iter(findings.parts.values()), None)
    return template(Path(__file__).with_name("check.html")).render(
        findings=findings,
        classes=() if first is None else tuple(first.by_class),
        remedies=quarantine.REMEDIES,
        examples=_examples(site) if findings.version else {},
        fates=FATES,
        most=site.settings.rules.max_quarantined_fraction,
        unusable=quarantine.fraction(findings.quarantined, offered=findings.offered),
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
    )


def _examples(site: Site) -> dict[str, str]:
    """Returns for each code the first image in ``quarantine.csv``."""
    found: dict[str, str] = {}
    with (site.private / "quarantine.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(row["code"], row["image"])
    return found
