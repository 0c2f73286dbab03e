"""Preprocessed cases on disk: decoded once, memory-mapped, made anew when damaged.

A store is a directory for one way of preprocessing, with one ``.npy`` (uint8, a row per case) and
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

FORMAT = 1
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
        images: uint8, (cases, *shape), memory-mapped and read only; the wanted cases in the wanted order,
            without the refused ones.
        refused: the code by key of every wanted case that cannot be used.
    """

    images: np.ndarray
    refused: Mapping[str, str]


def open_store(
    directory: Path,
    *,
    keys: Sequence[str],
    shape: tuple[int, ...],
    decode: Decode,
    on_progress: Progress | None = None,
) -> Store:
    """Opens the store with exactly these cases; decodes only those that it does not have yet.

    Args:
        directory: one for each way of preprocessing.
        keys: distinct pseudonyms of the wanted cases, which change with their content.
        shape: of one case.
        decode: returns the uint8 array of a case, given its position in ``keys``, or raises
            ``UnusableCase``; other errors are passed on and leave the store as it was.
        on_progress: told (done, total) of the cases to decode.
    """
    store = _opened(directory, keys=keys, shape=shape)
    if store is not None:
        return store
    files.private_directory(directory)
    with FileLock(directory / "lock", mode=0o600):
        store = _opened(directory, keys=keys, shape=shape)  # another process may have been faster
        if store is not None:
            return store
        transient = _build(directory, keys=keys, shape=shape, decode=decode, on_progress=on_progress)
        wanted = [key for key in keys if key not in transient]
        store = _opened(directory, keys=wanted, shape=shape)
    assert store is not None, "a store that was just written opens"
    return Store(images=store.images, refused={**store.refused, **transient})


def _opened(directory: Path, *, keys: Sequence[str], shape: tuple[int, ...]) -> Store | None:
    """Returns the store if it is whole and has these cases in this order."""
    index = _read_index(directory)
    if index is None:
        return None
    refused = index["refused"]
    if [key for key in keys if key not in refused] != index["rows"]:
        return None
    images = _read_images(directory, index=index, shape=shape)
    if images is None:
        return None
    return Store(images=images, refused={key: refused[key] for key in keys if key in refused})


def _read_index(directory: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((directory / "index.json").read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(index, dict) and index.get("format") == FORMAT
    return (
        index if whole and {"rows", "refused", "images", "size", "mtime_ns", "crc32"} <= set(index) else None
    )


def _read_images(directory: Path, *, index: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """Maps the images; None where size, time or content are not those of the index.

    The content is summed only where the time of the file says that somebody touched or copied it.
    """
    path = directory / index["images"]
    try:
        status = path.stat()
        if status.st_size != index["size"]:
            return None
        if status.st_mtime_ns != index["mtime_ns"] and _checksum(path) != index["crc32"]:
            return None
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = images.dtype == np.uint8 and images.shape == (len(index["rows"]), *shape)
    return images.view(np.ndarray) if fits else None


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
    shape: tuple[int, ...],
    decode: Decode,
    on_progress: Progress | None,
) -> dict[str, str]:
    """Writes a new store, copying what the old one has; returns the codes that may not be kept."""
    known, refused = _known(directory, shape=shape)
    num_new = sum(key not in known and key not in refused for key in keys)
    name, rows, done = f"images-{secrets.token_hex(8)}.npy", [], 0
    transient: dict[str, str] = {}
    with open(directory / name, "xb", opener=_private_opener) as stream:
        _write_header(stream, shape=(len(keys), *shape))
        for position, key in enumerate(keys):
            if key in refused:
                continue
            try:
                image = known[key] if key in known else decode(position)
            except UnusableCase as error:
                (transient if error.code in TRANSIENT else refused)[key] = error.code
            else:
                stream.write(np.ascontiguousarray(image, dtype=np.uint8).tobytes())
                rows.append(key)
            if key not in known:
                done += 1
                _tell(on_progress, done, num_new)
        stream.seek(0)
        _write_header(stream, shape=(len(rows), *shape))
        stream.flush()
        os.fsync(stream.fileno())
    kept = {key: refused[key] for key in keys if key in refused}
    _write_index(directory, images=name, rows=rows, refused=kept)
    return transient


def _known(directory: Path, *, shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns what the store of before has, by key; nothing where it is damaged."""
    index = _read_index(directory)
    images = None if index is None else _read_images(directory, index=index, shape=shape)
    if index is None or images is None:
        return {}, {}
    return dict(zip(index["rows"], images, strict=True)), dict(index["refused"])


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_header(stream: BinaryIO, *, shape: tuple[int, ...]) -> None:
    # numpy pads the header for any length of the first axis, so it can be written again in place.
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _write_index(directory: Path, *, images: str, rows: list[str], refused: dict[str, str]) -> None:
    path = directory / images
    status = path.stat()
    index = {
        "format": FORMAT,
        "images": images,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "crc32": _checksum(path),
        "rows": rows,
        "refused": refused,
    }
    files.write_private(directory / "index.json", content=json.dumps(index).encode())
    for old in directory.glob("images-*.npy"):
        if old.name != images:
            old.unlink()  # whoever has it mapped keeps it


def _tell(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
