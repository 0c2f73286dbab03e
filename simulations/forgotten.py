"""What sites and coordinator knew of earlier runs, put aside where a run begins with empty states.

It stays while it takes little room. To delete it at once would slow down the run that follows: for minutes,
some file systems (ext4 without a journal) give the number of a deleted file to no other, and look at all of
them whenever a file is made. After a run of 1,000 sites a new file took 1 ms here instead of 0.03.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from client.approval import plans_path
from client.release import claim_path, head_path
from client.site import Site
from client.trail import head_path as trail_head_path

logger = logging.getLogger("feverfew.simulation")

MOST_BYTES: Final = 2**31
"""On the disk, of all that is put aside."""
_SIZE: Final = "bytes"


@contextmanager
def forgotten(sites: Sequence[Site], *, heads: Path, most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Takes away what sites and coordinator know of earlier runs, so that the sites' ledgers begin anew.

    Folders of a site's layout stay, empty: to make one takes longer than to move what is in it. What was put
    aside first is deleted meanwhile if there is more than ``most_bytes``. What could not be deleted is said
    in the log, and looked at again the next time, as after a process that was killed.
    """
    place = heads.with_name(".forgotten")
    place.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(dir=place, prefix=f"{time.time_ns():020}-")
    for number, path in enumerate(_known(sites, heads=heads)):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, os.path.join(aside, str(number)))
    with ThreadPoolExecutor(1) as deleting:
        deleting.submit(shrink, place, most_bytes=most_bytes)
        yield


def _known(sites: Sequence[Site], *, heads: Path) -> Iterator[str | Path]:
    """Yields files, and folders of one run each; some may not be there."""
    yield heads
    for site in sites:
        yield from (head_path(site), claim_path(site), trail_head_path(site))
        for entry in (*_entries(site.runs), *_entries(plans_path(site))):
            yield entry.path
        for entry in _entries(site.state):
            yield from (
                one.path for one in (_entries(entry) if entry.is_dir(follow_symlinks=False) else [entry])
            )


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Returns what is in a folder; the lock that stays with it is nothing to know."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if entry.name != ".lock"]
    except FileNotFoundError:
        return []


def shrink(place: Path, *, most_bytes: int) -> None:
    """Deletes what was put aside first, until the rest takes at most so many bytes."""
    taken = 0
    for aside in sorted(place.iterdir(), reverse=True):
        try:
            taken += _size(aside)
            if taken > most_bytes:
                shutil.rmtree(aside)
        except OSError as error:
            logger.warning("%s, left by earlier runs, could not be deleted: %s", aside, error.strerror)


def _size(aside: Path) -> int:
    """Returns the bytes that a folder takes, which are counted once."""
    noted = aside / _SIZE
    try:
        return int(noted.read_text(encoding="ascii"))
    except (OSError, ValueError):
        size = sum(
            512 * os.lstat(os.path.join(folder, name)).st_blocks
            for folder, folders, files in os.walk(aside)
            for name in (*folders, *files)
        )
        noted.write_text(str(size), encoding="ascii")
        return size
