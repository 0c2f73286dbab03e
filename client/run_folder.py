"""What a site keeps of a run, ``private/runs/<run>/``: see ``client/usage.py`` and ``client/tally.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.files import private_directory
from client.site import Site
from common import durable


@contextmanager
def opened(site: Site, *, run: str) -> Iterator[Path]:
    """Yields the folder of a run, made where it is new; no other process has it meanwhile.

    At the end it is durable which files are in it, so a release may follow.
    """
    private_directory(site.runs)
    with durable.locked(site.runs / ".lock"):
        directory = private_directory(site.runs / run)
        yield directory
        # Those above as well: who made this one may have been killed before they were on the disk.
        for changed in (directory, site.runs, site.runs.parent):
            durable.sync_directory(changed)
