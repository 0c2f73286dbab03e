"""Makes sure that the site directories of a simulation are there.

A simulated hospital is a directory in exactly the layout of a real one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from client import crew
from client.site import open_site
from common.errors import DataError
from simulations.site_files import write_site
from simulations.sources import (
    DirectorySource,
    ListedSource,
    MedMnistSource,
    PhantomSource,
    Source,
    WrittenSource,
)

__all__ = [
    "DirectorySource",
    "ListedSource",
    "MedMnistSource",
    "PhantomSource",
    "Source",
    "prepare_sites",
    "write_site",
]

RECORD = "source.json"


def prepare_sites(directory: Path, *, source: Source, num_workers: int | None = None) -> list[Path]:
    """Returns the site directories of a source, writing them into ``directory`` where they are not there yet.

    What an equal source wrote before is used again; what another source wrote is replaced as a whole. A
    half-written set is never seen, whenever the process ends.

    Args:
        directory: the folder of the sites; a ``DirectorySource`` has its own.
        source: where sites come from.
        num_workers: processes that write, by default one for each processor; the result is the same.

    Raises:
        UserError, DeploymentError: the images of a site cannot be fetched.
        DataError: ``directory`` holds something that no source wrote, or the source cannot be used.
    """
    if isinstance(source, DirectorySource):
        sites = source.sites()
        if source.from_pacs:
            _fetch(sites)
        return sites
    directory = directory.absolute()
    record = _record(source)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if not _is_made(directory, record=record, names=source.names()):
            _make(directory, source=source, record=record, num_workers=num_workers)
    return [directory / name for name in source.names()]


def _record(source: WrittenSource) -> dict[str, Any]:
    """What ``source.json`` says: the parameters, and the hash by which they are compared."""
    parameters = json.loads(json.dumps(source.parameters(), default=str))
    canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
    return {"sha256": hashlib.sha256(canonical.encode()).hexdigest(), "parameters": parameters}


def _fetch(sites: Sequence[Path]) -> None:
    """Fetches the images of all sites; what could not be had is told by each site's quarantine."""
    from client import fetch  # httpx and its parts are needed here only

    with fetch.progress(Console(stderr=True)) as on_progress:
        for path in sites:
            fetch.fetch(open_site(path), on_progress=on_progress)


def _is_made(directory: Path, *, record: Mapping[str, Any], names: list[str]) -> bool:
    if not directory.exists() or not any(directory.iterdir()):
        return False
    path = directory / RECORD
    if not path.is_file():
        raise DataError(
            f"Expected {directory} to be new or to hold simulated sites, found other files; nothing was "
            "changed, choose another sites_directory."
        )
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    complete = all((directory / name / "site.yaml").is_file() for name in names)
    return complete and isinstance(known, dict) and known.get("sha256") == record["sha256"]


def _make(
    directory: Path,
    *,
    source: WrittenSource,
    record: Mapping[str, Any],
    num_workers: int | None,
) -> None:
    """Writes all sites beside ``directory`` and renames; removes what a killed process left."""
    prefix = f".{directory.name}.making-"
    for leftover in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    making = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        _write_all(making, source=source, num_workers=num_workers)
        (making / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        old = directory.parent / f"{prefix}old"
        if directory.exists():
            directory.rename(old)
        making.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _write_all(directory: Path, *, source: WrittenSource, num_workers: int | None) -> None:
    names = source.names()
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(names))
    if num_workers == 1:
        for name in names:
            source.write(directory / name, name=name)
        return
    # Each process reads what it needs itself: once, and not with every site.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin, initargs=(directory, replace(source))
    ) as pool:
        with _interrupted_later():
            written = pool.map(_write_one, names, chunksize=_CHUNK)
        list(written)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Holds back Ctrl-C from here and from processes that begin within: it reaches those too, which would say
    so with a page of text while they import."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_CHUNK = 4  # sites that a process takes at a time; they differ in size
_begun: list[tuple[Path, WrittenSource]] = []
"""Where a process of the pool writes, and from what."""


def _begin(directory: Path, source: WrittenSource) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=crew.die_with_parent, daemon=True).start()
    _begun[:] = [(directory, source)]


def _write_one(name: str) -> None:
    ((directory, source),) = _begun
    source.write(directory / name, name=name)
