"""Preprocessed cases on disk: decoded once, memory-mapped, made anew when damaged.

A store is a directory for one way of preprocessing, with one ``.npy`` (a record per case) and
``index.json``, which names the ``.npy``, its size and checksum, the key of every row, and the cases that
cannot be used. The index is replaced in one step, so a store is always whole. Cases are named by keyed
pseudonyms; nothing here names a file or a patient.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from client import files
from common.errors import UnusableCase

FORMAT = 2
CHUNK_BYTES = 2**24
TRANSIENT = (
    "missing_file",
    "not_readable",
    "changed_since_frozen",
    "too_slow",
)  # not properties of the content

Progress = Callable[[int, int], None]
Decode = Callable[[int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Store:
    """Preprocessed cases.

    Attributes:
        records: (cases,), of the wanted type, memory-mapped and read only; the wanted cases in the wanted
            order, without the refused ones.
        refused: the code by key of every wanted case that cannot be used.
    """

    records: np.ndarray
    refused: Mapping[str, str]


def open_store(
    directory: Path,
    *,
    keys: Sequence[str],
    dtype: np.dtype[Any],
    decode: Decode,
    on_progress: Progress | None = None,
) -> Store:
    """Opens the store with exactly these cases; decodes only those that it does not have yet.

    Args:
        directory: one for each way of preprocessing.
        keys: distinct pseudonyms of the wanted cases, which change with their content.
        dtype: of one case.
        decode: returns the record of a case, an array of shape (), given its position in ``keys``, or raises
            ``UnusableCase``; other errors are passed on and leave the store as it was.
        on_progress: told (done, total) of the cases to decode.
    """
    store = _opened(directory, keys=keys, dtype=dtype)
    if store is not None:
        return store
    files.private_directory(directory)
    with FileLock(directory / "lock", mode=0o600):
        store = _opened(directory, keys=keys, dtype=dtype)  # another process may have been faster
        if store is not None:
            return store
        transient = _build(directory, keys=keys, dtype=dtype, decode=decode, on_progress=on_progress)
        wanted = [key for key in keys if key not in transient]
        store = _opened(directory, keys=wanted, dtype=dtype)
    assert store is not None, "a store that was just written opens"
    return Store(records=store.records, refused={**store.refused, **transient})


def _opened(directory: Path, *, keys: Sequence[str], dtype: np.dtype[Any]) -> Store | None:
    """Returns the store if it is whole and has these cases in this order."""
    index = _read_index(directory)
    if index is None:
        return None
    refused = index["refused"]
    if [key for key in keys if key not in refused] != index["rows"]:
        return None
    records = _read_records(directory, index=index, dtype=dtype)
    if records is None:
        return None
    return Store(records=records, refused={key: refused[key] for key in keys if key in refused})


def _read_index(directory: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((directory / "index.json").read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(index, dict) and index.get("format") == FORMAT
    return (
        index if whole and {"rows", "refused", "records", "size", "mtime_ns", "crc32"} <= set(index) else None
    )


def _read_records(directory: Path, *, index: dict[str, Any], dtype: np.dtype[Any]) -> np.ndarray | None:
    """Maps the records; None where size, time or content are not those of the index.

    The content is summed only where the time of the file says that somebody touched or copied it.
    """
    path = directory / index["records"]
    try:
        status = path.stat()
        if status.st_size != index["size"]:
            return None
        if status.st_mtime_ns != index["mtime_ns"] and _checksum(path) != index["crc32"]:
            return None
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = records.dtype == dtype and records.shape == (len(index["rows"]),)
    return records.view(np.ndarray) if fits else None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _build(
    directory: Path,
    *,
    keys: Sequence[str],
    dtype: np.dtype[Any],
    decode: Decode,
    on_progress: Progress | None,
) -> dict[str, str]:
    """Writes a new store, copying what the old one has; returns the codes that may not be kept."""
    known, refused = _known(directory, dtype=dtype)
    num_new = sum(key not in known and key not in refused for key in keys)
    name, rows, done = f"records-{secrets.token_hex(8)}.npy", [], 0
    transient: dict[str, str] = {}
    with open(directory / name, "xb", opener=_private_opener) as stream:
        _write_header(stream, dtype=dtype, num_cases=len(keys))
        for position, key in enumerate(keys):
            if key in refused:
                continue
            try:
                record = known[key] if key in known else decode(position)
            except UnusableCase as error:
                (transient if error.code in TRANSIENT else refused)[key] = error.code
            else:
                stream.write(np.asarray(record, dtype=dtype).tobytes())
                rows.append(key)
            if key not in known:
                done += 1
                _tell(on_progress, done, num_new)
        stream.seek(0)
        _write_header(stream, dtype=dtype, num_cases=len(rows))
        stream.flush()
        os.fsync(stream.fileno())
    kept = {key: refused[key] for key in keys if key in refused}
    _write_index(directory, records=name, rows=rows, refused=kept)
    return transient


def _known(directory: Path, *, dtype: np.dtype[Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns what the store of before has, by key; nothing where it is damaged."""
    index = _read_index(directory)
    records = None if index is None else _read_records(directory, index=index, dtype=dtype)
    if index is None or records is None:
        return {}, {}
    return dict(zip(index["rows"], records, strict=True)), dict(index["refused"])


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_header(stream: BinaryIO, *, dtype: np.dtype[Any], num_cases: int) -> None:
    # numpy pads the header for any length of the first axis, so it can be written again in place.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_cases,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _write_index(directory: Path, *, records: str, rows: list[str], refused: dict[str, str]) -> None:
    path = directory / records
    status = path.stat()
    index = {
        "format": FORMAT,
        "records": records,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "crc32": _checksum(path),
        "rows": rows,
        "refused": refused,
    }
    files.write_private(directory / "index.json", content=json.dumps(index).encode())
    for old in directory.glob("records-*.npy"):
        if old.name != records:
            old.unlink()  # whoever has it mapped keeps it


def _tell(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
