"""Rows of the tables that hospitals have, CSV, TSV, XLSX or Parquet, as texts by column; read row by row."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.errors import DataError

BATCH_ROWS = 4096
KINDS = (".csv", ".tsv", ".xlsx", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row. ``line``: its number in the file, the header's being 1. ``cells``: text by column, stripped,
    "" where empty; ``None`` where the row has more or fewer fields than the header."""

    line: int
    cells: dict[str, str] | None


def rows(
    path: Path,
    *,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    sheet: str | None = None,
    remedies: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """Yields the rows of a table with the wanted columns only.

    CSV and TSV are UTF-8, with or without byte order mark; a CSV whose header has semicolons and no comma
    is separated by semicolons. Whole numbers lose a trailing ``.0``, which spreadsheets add.

    Args:
        optional: columns that are read where they are there.
        sheet: of an XLSX file; ``None`` for the first.
        remedies: what to do, by column, where it is missing.

    Raises:
        DataError: no such file, of another kind, damaged, or a column missing or there twice.
    """
    with _clear_errors(path):
        header, body = _opened(path, columns=[*columns, *optional], sheet=sheet)
        _check_header(header, columns=columns, path=path, remedies=remedies)
        places = {name: header.index(name) for name in (*columns, *optional) if name in header}
        for line, fields in enumerate(body, start=2):
            if any(field not in (None, "") for field in fields):  # spreadsheets end in empty rows
                yield _row(fields, line=line, places=places, width=len(header))


def _row(fields: Sequence[Any], *, line: int, places: Mapping[str, int], width: int) -> Row:
    if len(fields) != width:
        return Row(line=line, cells=None)
    return Row(line=line, cells={name: text(fields[place]) for name, place in places.items()})


def text(value: Any) -> str:
    """Returns a cell as text.

    >>> text(None), text(1.0), text(True), text(" a ")
    ('', '1', 'true', 'a')
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    return str(value).strip()


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"Expected a case table at {path}, found none; see the README for one.") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x}"
        raise DataError(f"Expected UTF-8 in {path}, found {found}; save it as CSV UTF-8.") from None
    except OSError as error:
        raise DataError(f"Expected a readable case table at {path}, found: {error.strerror}.") from None
    except csv.Error as error:
        raise DataError(f"Expected CSV in {path}, found: {error}.") from None
    except Exception as error:  # zip, XML and Parquet readers raise anything on damaged bytes
        raise DataError(
            f"Expected a readable case table at {path}, found {type(error).__name__}; save it again."
        ) from None


def _opened(
    path: Path, *, columns: Sequence[str], sheet: str | None
) -> tuple[list[str], Iterable[Sequence[Any]]]:
    kind = path.suffix.lower()
    if sheet is not None and kind != ".xlsx":
        raise DataError(f"Expected sheet: null, since {path} is no XLSX file, found {sheet!r}.")
    if kind == ".xlsx":
        return _excel(path, sheet=sheet)
    if kind == ".parquet":
        return _parquet(path, columns=columns)
    if kind in (".csv", ".tsv"):
        return _csv(path, is_tsv=kind == ".tsv")
    raise DataError(f"Expected a table of kind {', '.join(KINDS)}, found {path}.")


def _csv(path: Path, *, is_tsv: bool) -> tuple[list[str], Iterator[list[str]]]:
    body = _csv_rows(path, is_tsv=is_tsv)
    return next(body, []), body


def _csv_rows(path: Path, *, is_tsv: bool) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        semicolons = ";" in head and "," not in head
        reader = csv.reader(stream, strict=True, delimiter="\t" if is_tsv else ";" if semicolons else ",")
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(f"Expected CSV in line {reader.line_num} of {path}, found: {error}.") from None


def _excel(path: Path, *, sheet: str | None) -> tuple[list[str], Iterator[Sequence[Any]]]:
    from openpyxl import load_workbook

    book = load_workbook(path, read_only=True, data_only=True)
    if sheet is not None and sheet not in book.sheetnames:
        raise DataError(f"Expected a sheet {sheet!r} in {path}, found {len(book.sheetnames)} others.")
    chosen = book[sheet] if sheet is not None else book.worksheets[0]
    body = chosen.iter_rows(values_only=True)
    return [text(cell) for cell in next(body, ())], body


def _parquet(path: Path, *, columns: Sequence[str]) -> tuple[list[str], Iterator[Sequence[Any]]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name in columns]  # no other column is read

    def body() -> Iterator[Sequence[Any]]:
        with file:
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    return names, body()


def _check_header(
    header: list[str], *, columns: Sequence[str], path: Path, remedies: Mapping[str, str]
) -> None:
    twice = {name for name in header if header.count(name) > 1 and name in columns}
    if twice:
        raise DataError(f"Expected distinct column names in {path}, found {sorted(twice)} more than once.")
    missing = [name for name in columns if name not in header]
    if missing:
        found = _named(header, columns)
        remedy = "the first line names the columns, and cases in site.yaml says which are read"
        remedy = remedies.get(missing[0], remedy)
        raise DataError(f"Expected the column {missing[0]} in {path}, found {found}; {remedy}.")


def _named(header: Sequence[str], columns: Sequence[str]) -> str:
    """Says what a table begins with; it may be a patient's row, so nothing of it but what was asked for."""
    if not header:
        return "an empty file"
    known = [name for name in columns if name in header]
    return f"{len(header)} columns, of which {known} are asked for" if known else f"{len(header)} others"
