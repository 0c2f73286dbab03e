"""The survey of all listed cases, by several processes; what was seen is kept and not looked at again.

``private/survey.sqlite`` holds for each case what ``sight.Sight.to_text`` keeps, with the stamp of its
files. It only spares time: damaged or deleted, it is made anew.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from client import content, crew, files, sight
from client.case import Case
from client.sight import Sight
from client.site import Site
from common.errors import UnusableCase

FORMAT = 2  # changes with whatever a sight is made of
CHUNK = 64
FEW = 256  # cases, for which it is not worth while to start processes
MOST_PROCESSES = 8

Progress = Callable[[int, int], None]
Seen = tuple[Case, Sight | str]


def survey(
    site: Site, *, cases: Sequence[Case], on_progress: Progress | None = None
) -> dict[str, Sight | str]:
    """Looks at every case; returns by image what was seen, or the code for which its files cannot be read.

    Each process has one case at a time in memory; of a case some hundred bytes stay. Stopped half-way, it
    goes on from there the next time.

    Args:
        on_progress: told (done, total) of the cases.
    """
    seen: dict[str, Sight | str] = {}
    with closing(_opened(files.private_directory(site.private) / "survey.sqlite")) as kept:
        unknown = []
        for case in cases:
            before = _before(case, kept=kept, directory=site.directory)
            if before is None:
                unknown.append(case)
            else:
                seen[case.image] = before
                _tell(on_progress, len(seen), len(cases))
        for case, found in _looked(unknown, directory=site.directory):
            seen[case.image] = found
            _keep(case, found, kept=kept)
            _tell(on_progress, len(seen), len(cases))
            if len(seen) % 1000 == 0:
                kept.commit()
        kept.commit()
    return seen


def completed(
    site: Site, cases: Sequence[Case], *, seen: Mapping[str, Sight | str], on_progress: Progress | None
) -> dict[str, Sight | str]:
    """Returns what is seen of every case; those that were not surveyed are glanced at, not decoded."""
    looked: dict[str, Sight | str] = {}
    for done, case in enumerate(cases, start=1):
        if case.image in seen:
            looked[case.image] = seen[case.image]
            continue
        try:
            looked[case.image] = sight.glance(case, directory=site.directory)
        except UnusableCase as error:
            looked[case.image] = error.code
        _tell(on_progress, done, len(cases))
    return _judged(site, cases, looked)


def _judged(site: Site, cases: Sequence[Case], looked: dict[str, Sight | str]) -> dict[str, Sight | str]:
    """Decodes those of the glanced at that are the same as others: broken files are often alike."""
    alike = Counter(one.pixels for one in looked.values() if isinstance(one, Sight))
    for case in cases:
        one = looked[case.image]
        if isinstance(one, Sight) and not one.shapes and not one.code and alike[one.pixels] > 1:
            try:
                code = sight.look(case, directory=site.directory).code
            except UnusableCase as error:
                code = error.code
            looked[case.image] = replace(one, code=code)
    return looked


def _looked(cases: Sequence[Case], *, directory: Path) -> Iterator[Seen]:
    """Yields what is seen of cases, by as many processes as there are processors, if they are many."""
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    look = partial(_look, directory=directory)
    if processes == 1 or len(cases) <= FEW:
        yield from itertools.chain.from_iterable(map(look, _chunks(cases)))
        return
    for seen in crew.done(look, _chunks(cases), processes=processes):
        yield from seen


def _chunks(cases: Sequence[Case]) -> Iterable[list[Case]]:
    return (list(cases[start : start + CHUNK]) for start in range(0, len(cases), CHUNK))


def _look(cases: Sequence[Case], *, directory: Path) -> list[Seen]:
    return [(case, _of(case, directory=directory)) for case in cases]


def _of(case: Case, *, directory: Path) -> Sight | str:
    try:
        return sight.look(case, directory=directory)
    except UnusableCase as error:
        return error.code
    except MemoryError:  # the others can be looked at; and this one the next time, since codes are not kept
        return "out_of_memory"


def _before(case: Case, *, kept: sqlite3.Connection, directory: Path) -> Sight | None:
    row = kept.execute("select sight from sights where files = ?", (_files(case),)).fetchone()
    if row is None:
        return None
    before = sight.from_text(row[0])
    try:
        same = content.stamp(case, directory=directory) == before.stamp
    except UnusableCase:
        return None
    return sight.again(before, case, directory=directory) if same else None


def _keep(case: Case, found: Sight | str, *, kept: sqlite3.Connection) -> None:
    if isinstance(found, Sight) and found.code != "too_slow":  # which may be the machine's fault
        kept.execute("insert or replace into sights values (?, ?)", (_files(case), found.to_text()))


def _files(case: Case) -> str:
    return "\n".join((*case.images, case.mask))  # no path has a line break in it


def _opened(path: Path) -> sqlite3.Connection:
    try:
        return _with_table(path)
    except sqlite3.DatabaseError:
        path.unlink(missing_ok=True)
        return _with_table(path)


def _with_table(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    kept = sqlite3.connect(path)
    try:
        if kept.execute("pragma user_version").fetchone()[0] != FORMAT:
            kept.execute("drop table if exists sights")
            kept.execute("create table sights (files text primary key, sight text not null) without rowid")
            kept.execute(f"pragma user_version = {FORMAT}")
        kept.execute("select files, sight from sights limit 1")
    except sqlite3.DatabaseError:
        kept.close()
        raise
    return kept


def _tell(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
