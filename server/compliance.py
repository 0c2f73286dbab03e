"""Which headings of data-protection law Feverfew touches, what it does there, and what it does not.

One source, ``server/compliance.yaml``, for the page in the pack of a run and for ``docs/compliance.md``,
which ``make docs`` writes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

import yaml

from common.value import Value

HEADER: Final = ("| heading | what Feverfew does | what it does not |", "|---|---|---|")


class Row(Value):
    """One heading. ``does`` and ``lacks`` are sentences; ``shown_by`` names documents and tests."""

    heading: str
    title: str
    does: str
    shown_by: tuple[str, ...] = ()
    lacks: str


class Law(Value):
    """The headings of one article or section."""

    law: str
    rows: tuple[Row, ...]


class Compliance(Value):
    """All of it; ``preface`` says what such a table is worth."""

    preface: tuple[str, ...]
    laws: tuple[Law, ...]

    def to_markdown(self) -> str:
        """Returns the text of ``docs/compliance.md``."""
        lines = ["# What is done, and what is not claimed", ""]
        for paragraph in self.preface:
            lines += [paragraph, ""]
        for law in self.laws:
            lines += [f"## {law.law}", "", *HEADER, *(_line(row) for row in law.rows), ""]
        return "\n".join(lines)


def compliance() -> Compliance:
    """Reads the table."""
    text = resources.files("server").joinpath("compliance.yaml").read_text(encoding="utf-8")
    return Compliance.model_validate(yaml.safe_load(text))


def _line(row: Row) -> str:
    shown = f" Shown by {', '.join(f'`{name}`' for name in row.shown_by)}." if row.shown_by else ""
    return f"| **{row.heading}** {row.title} | {row.does}{shown} | {row.lacks} |"


if __name__ == "__main__":
    Path("docs", "compliance.md").write_text(compliance().to_markdown(), encoding="utf-8")
