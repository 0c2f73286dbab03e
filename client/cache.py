"""Preprocessed cases on disk: decoded once, memory-mapped, made anew when damaged.

A store is a directory for one way of preprocessing, with one ``.npy`` (a record per case) and
``index.json``, which names the ``.npy``, its size and checksum, the key of every row, and the cases that
cannot be used. The index is replaced in one step, so a store is always whole. While one is made,
``part.json`` says every few seconds how far it is, and whoever makes it next goes on from there. Cases are
named by keyed pseudonyms; nothing here names a file or a patient.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from client import files, making

FORMAT = 2
TRANSIENT = (
    "missing_file",
    "not_readable",
    "changed_since_frozen",
    "too_slow",
)  # not properties of the content

Progress = Callable[[int, int], None]
Decode = Callable[[Sequence[int]], Iterator[np.ndarray | str]]


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
    lock: Path,
    keys: Sequence[str],
    dtype: np.dtype[Any],
    decode: Decode,
    fits: Callable[[int], bool],
    on_progress: Progress | None = None,
) -> Store:
    """Opens the store with exactly these cases; decodes only those that it does not have yet.

    Args:
        directory: one for each way of preprocessing.
        lock: held while the store is made.
        keys: distinct pseudonyms of the wanted cases, which change with their content.
        dtype: of one case.
        decode: yields for each position in ``keys`` the record of its case, an array of shape (), or the code
            for which it cannot be used; errors are passed on and leave the store as it was.
        fits: makes room for so many bytes and says whether there is; if there is none for the store beside
            its old form, the old form goes and all is decoded.
        on_progress: told (done, total) of the cases to decode.
    """
    store = _opened(directory, keys=keys, dtype=dtype)
    if store is not None:
        return store
    with FileLock(lock, mode=0o600):
        files.private_directory(directory)
        store = _opened(directory, keys=keys, dtype=dtype)  # another process may have been faster
        if store is not None:
            return store
        transient = _build(
            directory, keys=keys, dtype=dtype, decode=decode, fits=fits, on_progress=on_progress
        )
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
        if status.st_mtime_ns != index["mtime_ns"] and _checksum_of(path) != index["crc32"]:
            return None
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = records.dtype == dtype and records.shape == (len(index["rows"]),)
    return records.view(np.ndarray) if fits else None


def let_go(records: np.ndarray) -> None:
    """Takes the pages of mapped records, or of a part of them, out of this process's memory.

    They stay in the system's, as long as it has room, and are mapped again when they are used.
    """
    base: Any = records
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _checksum_of(path: Path) -> int:
    with path.open("rb") as stream:
        return making.checksum(stream)


def _build(
    directory: Path,
    *,
    keys: Sequence[str],
    dtype: np.dtype[Any],
    decode: Decode,
    fits: Callable[[int], bool],
    on_progress: Progress | None,
) -> dict[str, str]:
    """Writes a new store, copying what the old one has; returns the codes that may not be kept."""
    known, refused = _known(directory, dtype=dtype, fits=lambda old: fits(old + len(keys) * dtype.itemsize))
    made = making.resumed(directory, keys=keys, dtype=dtype)
    _remove_others(directory, kept={made.records, (_read_index(directory) or {}).get("records", "")})
    begun = len(made.outcomes)
    outcomes = _outcomes(
        keys[begun:], known={**refused, **known}, begun=begun, decode=decode, tell=on_progress
    )
    with closing(outcomes):
        making.write(directory, outcomes, making=made, keys=keys, dtype=dtype)
    codes = dict(zip(keys, made.outcomes, strict=True))
    kept = {key: code for key, code in codes.items() if code and code not in TRANSIENT}
    rows = [key for key, code in codes.items() if not code]
    _write_index(directory, records=made.records, rows=rows, refused=kept)
    return {key: code for key, code in codes.items() if code in TRANSIENT}


def _outcomes(
    keys: Sequence[str],
    *,
    known: Mapping[str, np.ndarray | str],
    begun: int,
    decode: Decode,
    tell: Progress | None,
) -> Generator[np.ndarray | str, None, None]:
    """Yields record or code of each case, decoding those that are not known; ``begun`` cases are before."""
    unknown = [begun + place for place, key in enumerate(keys) if key not in known]
    decoded = decode(unknown)
    done = 0
    for key in keys:
        if key in known:
            yield known[key]
            continue
        yield next(decoded)
        done += 1
        if tell is not None:
            tell(done, len(unknown))


def _remove_others(directory: Path, *, kept: Container[str]) -> None:
    for path in directory.glob("records-*.npy"):
        if path.name not in kept:
            path.unlink()  # whoever has it mapped keeps it


def _known(
    directory: Path, *, dtype: np.dtype[Any], fits: Callable[[int], bool]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns what the store of before has, by key; nothing where it is damaged.

    Where there is no room for it beside the new one it is removed, and its records are decoded again.
    """
    index = _read_index(directory)
    records = None if index is None else _read_records(directory, index=index, dtype=dtype)
    if index is None or records is None:
        return {}, {}
    if not fits(index["size"]):
        (directory / "index.json").unlink()
        return {}, dict(index["refused"])
    return dict(zip(index["rows"], records, strict=True)), dict(index["refused"])


def _write_index(directory: Path, *, records: str, rows: list[str], refused: dict[str, str]) -> None:
    path = directory / records
    status = path.stat()
    index = {
        "format": FORMAT,
        "records": records,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "crc32": _checksum_of(path),
        "rows": rows,
        "refused": refused,
    }
    files.write_private(directory / "index.json", content=json.dumps(index).encode())
    (directory / making.PART).unlink(missing_ok=True)
    _remove_others(directory, kept=(records,))
