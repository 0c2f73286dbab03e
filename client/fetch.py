"""``feverfew-client fetch``: brings what the query means from the PACS, unless it is there already."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client import enquiry, fetched, pacs
from client.answers import NotGiven
from client.dicomweb import Archive, open_archive
from client.enquiry import Offered
from client.fetched import Outcome
from client.files import private_directory
from client.pacs import Series
from client.pacs_settings import Pacs
from client.site import Site
from common.errors import ConfigError, UserError

Phase = Literal["searching", "fetching"]
OnProgress = Callable[[Phase, int, int], None]


def look(site: Site, *, on_progress: OnProgress | None = None) -> Outcome:
    """Counts what the query of ``site.yaml`` means, and fetches nothing.

    Raises:
        UserError, DeploymentError: as ``fetch``.
    """
    settings = _settings(site)
    told = on_progress or _silent
    with open_archive(settings, directory=site.directory) as archive:
        found = enquiry.ask(archive, query=settings.query, on_progress=_of("searching", told))
        not_given = Counter(found.not_given)
        total = there = 0
        for done, one in enumerate(found.offered, start=1):
            here = len(pacs.there(site.directory / pacs.folder(study=one.study, series=one.series)))
            number = _count(archive, one, not_given=not_given)
            total, there = total + number, there + min(here, number)
            told("searching", done, len(found.offered))
    return _outcome(found.offered, instances=total, there=there, not_given=not_given, untold=found.untold)


def fetch(site: Site, *, on_progress: OnProgress | None = None) -> Outcome:
    """Fetches what the query of ``site.yaml`` means into ``private/pacs``, and writes its index.

    May be stopped at any time, and goes on where it stopped when it is called again.

    Raises:
        UserError: no PACS in ``site.yaml``, or settings of it that cannot be used; another fetch is running.
        DeploymentError: the PACS stays away, refuses us, or is not trusted.
        StateError: the index is damaged.
    """
    settings = _settings(site)
    private_directory(pacs.home(site))
    try:
        with (
            FileLock(pacs.home(site) / "lock", timeout=0, mode=0o600),
            open_archive(settings, directory=site.directory) as archive,
        ):
            return _fetch(site, archive, settings=settings, told=on_progress or _silent)
    except Timeout:
        raise UserError("Expected one fetch at a time, found another one running; wait for it.") from None


def _fetch(site: Site, archive: Archive, *, settings: Pacs, told: OnProgress) -> Outcome:
    index = pacs.known(site)
    found = enquiry.ask(archive, query=settings.query, on_progress=_of("searching", told))
    index |= {one.series: _expected(one, before=index.get(one.series)) for one in found.offered}
    pacs.write(site, index.values())  # now, so that what comes is joined even if the power fails
    tally = Tally(total=sum(one.num_instances or 0 for one in found.offered), told=_of("fetching", told))
    try:
        for series in _all(archive, found.offered, site=site, tally=tally, connections=settings.connections):
            index[series.series] = series
    finally:
        pacs.write(site, index.values())
    not_given = Counter(found.not_given)
    for one in found.offered:
        not_given.update(index[one.series].not_given.values())
    return _outcome(
        found.offered,
        instances=sum(index[one.series].num_expected or 0 for one in found.offered),
        there=tally.there,
        fetched=tally.fetched,
        fetched_bytes=tally.fetched_bytes,
        not_given=not_given,
        untold=found.untold,
    )


def _all(
    archive: Archive, offered: Sequence[Offered], *, site: Site, tally: Tally, connections: int
) -> Iterator[Series]:
    """Yields every series when it was fetched; so many at a time as there are connections."""
    with ThreadPoolExecutor(connections, thread_name_prefix="pacs") as pool:
        futures = [pool.submit(_one, archive, one, site=site, tally=tally) for one in offered]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            archive.pace.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one(archive: Archive, offered: Offered, *, site: Site, tally: Tally) -> Series:
    """Fetches what is not there yet of a series."""
    directory = pacs.directory_of(site, study=offered.study, series=offered.series)
    here = pacs.there(directory)
    expected = _expected(offered, before=None)
    if offered.num_instances is not None and len(here) >= offered.num_instances:
        tally.listed(offered.num_instances, there=offered.num_instances, counted=offered.num_instances)
        return expected
    try:
        listing = enquiry.instances(archive, offered)
    except NotGiven as error:
        return dataclasses.replace(expected, not_given={offered.series: error.code})
    absent = [uid for uid in listing.uids if uid not in here]
    number = len(listing.uids) + len(listing.not_given)
    tally.listed(number, there=len(listing.uids) - len(absent), counted=offered.num_instances or 0)
    not_given = _retrieve(archive, offered, absent, directory=directory, tally=tally)
    for _ in listing.not_given:
        tally.passed()
    not_given |= {f"{offered.series} at {place}": code for place, code in listing.not_given.items()}
    if number < (offered.num_instances or 0):
        not_given[offered.series] = "not_listed"
    return dataclasses.replace(expected, num_expected=number, not_given=not_given)


def _retrieve(
    archive: Archive, offered: Offered, uids: Sequence[str], *, directory: Path, tally: Tally
) -> dict[str, str]:
    """Fetches instances; returns the codes of those that the PACS could not give."""
    not_given = {}
    for uid in uids:
        path = f"{offered.path}/instances/{uid}"
        try:
            size = archive.retrieve(path, instance=uid, to=directory / f"{uid}.dcm")
        except NotGiven as error:
            not_given[uid] = error.code
            tally.passed()
        else:
            tally.passed(size)
    return not_given


class Tally:
    """Counts instances, from several threads."""

    def __init__(self, *, total: int, told: Callable[[int, int], None]) -> None:
        self.there = self.fetched = self.fetched_bytes = 0
        self._done, self._total, self._told = 0, total, told
        self._lock = threading.Lock()

    def listed(self, expected: int, *, there: int, counted: int) -> None:
        """A series was found to have so many instances, of which some are there; the total counted others."""
        with self._lock:
            self._total += expected - counted
            self.there += there
            self._done += there
            self._told(self._done, self._total)

    def passed(self, size: int | None = None) -> None:
        """An instance of so many bytes came, or it did not."""
        with self._lock:
            self.fetched += size is not None
            self.fetched_bytes += size or 0
            self._done += 1
            self._told(self._done, self._total)


def _expected(offered: Offered, *, before: Series | None) -> Series:
    number = offered.num_instances
    return Series(
        study=offered.study,
        series=offered.series,
        accession=offered.accession,
        patient=offered.patient,
        modality=offered.modality,
        description=offered.description,
        directory=pacs.folder(study=offered.study, series=offered.series),
        num_instances=0 if before is None else before.num_instances,
        num_expected=before.num_expected if number is None and before is not None else number,
    )


def _count(archive: Archive, offered: Offered, *, not_given: Counter[str]) -> int:
    if offered.num_instances is not None:
        return offered.num_instances
    try:
        return len(enquiry.instances(archive, offered).uids)
    except NotGiven as error:
        not_given[error.code] += 1
        return 0


def _outcome(offered: Sequence[Offered], **counts: Any) -> Outcome:
    return Outcome(studies=len({one.study for one in offered}), series=len(offered), **counts)


def _settings(site: Site) -> Pacs:
    if site.settings.pacs is None:
        raise ConfigError("Expected pacs in site.yaml, found null; docs/pacs.md has an example.")
    return site.settings.pacs


def _silent(phase: Phase, done: int, total: int) -> None:
    pass


def _of(phase: Phase, told: OnProgress) -> Callable[[int, int], None]:
    return lambda done, total: told(phase, done, total)


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """Shows progress bars as long as the block lasts; yields what to hand on as ``on_progress``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        texts: Mapping[Phase, str] = {"searching": "searching studies", "fetching": "fetching images"}
        tasks = {phase: bar.add_task(text, total=None, visible=False) for phase, text in texts.items()}

        def told(phase: Phase, done: int, total: int) -> None:
            bar.update(tasks[phase], completed=done, total=total, visible=True)

        yield told


def report(site: Site, *, only_list: bool = False, as_json: bool = False) -> int:
    """Fetches, or only looks, and prints what came of it; returns the exit code, 0 if nothing is lacking."""
    with progress(Console(stderr=True)) as on_progress:
        outcome = (look if only_list else fetch)(site, on_progress=on_progress)
    console = Console()
    if as_json:
        console.print_json(data=outcome.to_tree())
    else:
        fetched.show(outcome, console=console, only_list=only_list)
    return 0 if outcome.is_whole else 1
