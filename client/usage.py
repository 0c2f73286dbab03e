"""Which cases a run used: ``private/runs/<run>/used_cases.parquet``, a row for each case and part.

So the hospital can say whether a patient's image was in a model. A case counts as used from the first task
that may draw it: which patients the steps drew is random, kept nowhere, and part of the privacy guarantee.
Nothing of this leaves the site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from client import files
from client.frozen import FrozenCase
from client.site import Site
from common.errors import StateError

if TYPE_CHECKING:  # takes longer to import than a file to write
    import pyarrow

FILE = "used_cases.parquet"
SAME = ("part", "cohort_version", "plan_hash")
"""Columns that say the same of all cases of a task."""
CASE = ("images", "patient", "content")
KEY = (*CASE, *SAME)
COLUMNS = (*KEY, "first_used")

Key = tuple[tuple[str, ...], str, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a run used a patient's cases: ``cases`` of them in ``part``, the first time at ``first_used``
    (UTC)."""

    run: str
    plan_hash: str
    part: str
    cohort_version: str
    cases: int
    first_used: datetime


def listed(cases: Sequence[FrozenCase]) -> pyarrow.Table:
    """Returns what is written down of cases in their order: images, patient, content. Takes little memory."""
    import pyarrow

    columns = [[one.case.images for one in cases], [one.case.patient for one in cases]]
    return pyarrow.table([*columns, [one.content for one in cases]], schema=_schema(CASE))


def record(directory: Path, *, plan_hash: str, part: str, cohort_version: str, cases: pyarrow.Table) -> None:
    """Adds to a run's file the cases that it does not have yet; nothing is ever taken out.

    Args:
        directory: the run's, open: see ``client/run_folder.py``.
        cases: what ``listed`` returned of them.

    Raises:
        StateError: the file is damaged; it is left as it is.
    """
    path = directory / FILE
    table = _table(cases, part=part, cohort_version=cohort_version, plan_hash=plan_hash)
    if path.exists():
        import pyarrow

        before = _read(path)
        known = set(_keys(before))
        is_new = [key not in known for key in _keys(table)]
        table = table.filter(pyarrow.array(is_new, pyarrow.bool_()))  # of no case there would be no type
        if not table.num_rows:
            return
        table = pyarrow.concat_tables([before, table])
    files.write_private(path, content=_content(table))


def find(site: Site, *, patient: str) -> tuple[Use, ...]:
    """Returns the uses of a patient's cases, by run and part, the oldest first.

    Raises:
        StateError: the file of a run is damaged.
    """
    found = [use for path in sorted(site.runs.glob(f"*/{FILE}")) for use in _uses(path, patient)]
    return tuple(sorted(found, key=lambda use: (use.first_used, use.run, use.part)))


def _uses(path: Path, patient: str) -> list[Use]:
    import pyarrow.compute

    table = _read(path)
    rows = table.filter(pyarrow.compute.equal(table["patient"], patient)).to_pylist()
    named = ("part", "plan_hash", "cohort_version")
    counts = Counter(tuple(row[name] for name in named) for row in rows)
    first: dict[tuple[str, ...], datetime] = {}
    for row in rows:
        key = tuple(row[name] for name in named)
        first[key] = min(row["first_used"], first.get(key, row["first_used"]))
    return [
        Use(run=path.parent.name, cases=count, first_used=first[key], **dict(zip(named, key, strict=True)))
        for key, count in counts.items()
    ]


def _table(cases: pyarrow.Table, **same: str) -> pyarrow.Table:
    """Returns a row for each case; its use begins now."""
    import pyarrow

    now = pyarrow.scalar(datetime.now(UTC), type=_schema().field("first_used").type)
    alike = [pyarrow.repeat(one, cases.num_rows) for one in (*(same[name] for name in SAME), now)]
    return pyarrow.table([*cases.columns, *alike], schema=_schema())


def _keys(table: pyarrow.Table) -> list[Key]:
    images, *others = (table[name].to_pylist() for name in KEY)
    return list(zip(map(tuple, images), *others, strict=True))


def _content(table: pyarrow.Table) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = pyarrow.BufferOutputStream()
    # Columns that say the same are small when compressed, and of few cases dictionaries take long to make.
    parquet.write_table(table, stream, use_dictionary=False, write_statistics=False, store_schema=False)
    return bytes(stream.getvalue())


@lru_cache(maxsize=2)
def _schema(columns: Sequence[str] = COLUMNS) -> pyarrow.Schema:
    import pyarrow

    kinds = dict.fromkeys(COLUMNS, pyarrow.string())
    kinds |= {"images": pyarrow.list_(pyarrow.string()), "first_used": pyarrow.timestamp("ms", tz="UTC")}
    return pyarrow.schema([(name, kinds[name]) for name in columns])


def _read(path: Path) -> pyarrow.Table:
    """Returns the table of a run.

    Raises:
        StateError: the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read(use_threads=False).cast(_schema())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise StateError(
            f"Expected the used cases of a run in {path}, found damage ({type(error).__name__}); restore it "
            "from a backup, or move it to a place where it is kept."
        ) from None
