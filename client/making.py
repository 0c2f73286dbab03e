"""A store of preprocessed cases on its way: written row by row, and gone on with after a kill.

``part.json`` says every few seconds which file it is and what became of the first cases.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from client import files

FORMAT = 1
PART = "part.json"
CHUNK_BYTES = 2**24
CHECKPOINT_SECONDS = 5.0  # of decoding that a killed process loses at most


@dataclass(kw_only=True)
class Making:
    """A store on its way: the file of its records, and what became of the first cases.

    Attributes:
        outcomes: of each case the code for which it cannot be used, "" for a record.
        crc32: of the records.
    """

    records: str
    outcomes: list[str] = field(default_factory=list)
    crc32: int = 0

    @property
    def num_rows(self) -> int:
        return self.outcomes.count("")

    def save(self, directory: Path, *, keys: Sequence[str]) -> None:
        tree = {"format": FORMAT, "keys": _digest(keys[: len(self.outcomes)]), **vars(self)}
        files.write_private(directory / PART, content=json.dumps(tree).encode())


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def write(
    directory: Path,
    outcomes: Iterable[np.ndarray | str],
    *,
    making: Making,
    keys: Sequence[str],
    dtype: np.dtype[Any],
) -> None:
    """Writes rows behind those that are there; an outcome is a record, or the code of a case without."""
    with _opened(directory / making.records) as stream:
        _write_rows(stream, outcomes, making=making, keys=keys, dtype=dtype, directory=directory)


def _write_rows(
    stream: BinaryIO,
    outcomes: Iterable[np.ndarray | str],
    *,
    making: Making,
    keys: Sequence[str],
    dtype: np.dtype[Any],
    directory: Path,
) -> None:
    _write_header(stream, dtype=dtype, num_cases=len(keys))
    stream.seek(making.num_rows * dtype.itemsize, os.SEEK_CUR)
    stream.truncate()
    saved = time.monotonic()
    for outcome in outcomes:
        if not isinstance(outcome, str):
            row = np.asarray(outcome, dtype=dtype).tobytes()
            making.crc32 = zlib.crc32(row, making.crc32)
            stream.write(row)
        making.outcomes.append(outcome if isinstance(outcome, str) else "")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _sync(stream)
            making.save(directory, keys=keys)
            saved = time.monotonic()
    stream.seek(0)
    _write_header(stream, dtype=dtype, num_cases=making.num_rows)
    _sync(stream)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def resumed(directory: Path, *, keys: Sequence[str], dtype: np.dtype[Any]) -> Making:
    """Returns how far a killed process came with a store of these cases, or the beginning of a new one."""
    try:
        tree = json.loads((directory / PART).read_bytes())
        making = Making(records=tree["records"], outcomes=tree["outcomes"], crc32=tree["crc32"])
        begun = keys[: len(making.outcomes)]
        if (
            tree["format"] == FORMAT
            and tree["keys"] == _digest(begun)
            and _has_rows(directory, making, dtype)
        ):
            return making
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there was none, or it is damaged
    return Making(records=f"records-{secrets.token_hex(8)}.npy")


def _has_rows(directory: Path, making: Making, dtype: np.dtype[Any]) -> bool:
    header = io.BytesIO()
    _write_header(header, dtype=dtype, num_cases=0)
    with (directory / making.records).open("rb") as stream:
        stream.seek(header.tell())
        return checksum(stream, most=making.num_rows * dtype.itemsize) == making.crc32


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")


def _write_header(stream: BinaryIO, *, dtype: np.dtype[Any], num_cases: int) -> None:
    # numpy pads the header for any length of the first axis, so it can be written again in place.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_cases,)}
    np.lib.format.write_array_header_1_0(stream, header)


def checksum(stream: BinaryIO, *, most: int | None = None) -> int:
    """Returns the CRC-32 of what follows, of ``most`` bytes if so many do."""
    checksum, left = 0, sys.maxsize if most is None else most
    while chunk := stream.read(min(left, CHUNK_BYTES)):
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return checksum
