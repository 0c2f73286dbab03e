"""Fuzzes the case table: CSV and TSV with the columns that a new site names, and with others."""

from __future__ import annotations

from typing import Any

from client.case import Case, Refused
from client.table import Table, rows
from common.errors import DataError
from tests.fuzz import PLACE
from tests.sites import skeleton_cases

USUAL: dict[str, Any] = skeleton_cases("north")
KINDS = [
    USUAL,
    USUAL | {"file": "cases.tsv"},
    USUAL | {"separator": "|", "classes": {"a": "normal", "": None, "b": "opacity"}},
    USUAL | {"label": None, "label_columns": {"label": "opacity", "sick": "sick"}, "values": {"age": "age"}},
]
TABLES = [Table.model_validate(kind) for kind in KINDS]
SEEDS = [
    b"\0image,label,patient_id\nimages/1.png,normal,7\nimages/2.png,opacity,7\n",
    b'\0\xef\xbb\xbfimage;label;patient_id\r\n"images/1.png";normal;7\r\n',
    b"\1image\tlabel\tpatient_id\nimages/1.png\tnormal\t7\n",
    b"\2image,label,patient_id\n../up.png,a|b,7\n/etc/passwd,a,\n",
    b"\3image,label,sick,age,patient_id\n1.png,yes,0,33,7\n1.png,no,0,33,7\n",
]


def parse(data: bytes) -> None:
    """Reads bytes as a table: whatever it holds becomes cases, refused rows or one error of ours."""
    settings = TABLES[(data[:1] or b"\0")[0] % len(TABLES)]
    (PLACE / settings.file).write_bytes(data[1:])
    for patient_is in ("column", "case"):
        try:
            found = list(rows(settings, directory=PLACE, patient_is=patient_is))
        except DataError:
            continue
        assert all(isinstance(row, Case | Refused) for row in found)
        for row in found:
            if isinstance(row, Case):
                for name in row.images:
                    assert (PLACE / name).resolve().is_relative_to(PLACE.resolve())
