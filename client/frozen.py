"""The frozen list of a site's cases, ``private/cohort.json``, and what makes a new version of it.

The list keeps image, label, patient and the sha256 of the file for every row of the case table that has
a file, and a code for every other row. Later changes of table or files change nothing until somebody
freezes again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import files, split, table
from client.files import Stamp
from client.site import Site
from client.table import Case, Refused
from common.errors import ConfigError, StateError, UnusableCase
from common.plan import canonical_json

FORMAT = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenCase:
    """A case and the sha256 of its file, 64 hexadecimal digits."""

    case: Case
    content: str


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A frozen list, ordered by image; private.

    Attributes:
        version: keyed hash of the list and of the split; tells nothing to others.
        table: sha256 of the case table from which it was made.
    """

    version: str
    cases: tuple[FrozenCase, ...]
    refused: tuple[Refused, ...]
    table: str


def freeze(site: Site, *, on_progress: Progress | None = None) -> Frozen:
    """Freezes the case table and the files as they are now; the list of before is kept beside the new.

    Args:
        on_progress: told (done, total) of the files.

    Raises:
        UserError: no usable case table or split key; ``split`` or ``patient_is`` are not those frozen.
        StateError: the list of before is damaged, or was frozen with another split key.
    """
    secret = split.read_key(site)
    before = read(site, secret=secret)
    digest = table_digest(site)
    listed, refused = accepted(table.rows(site.table, patient_is=site.settings.patient_is))
    cases, stamps = [], []
    for done, case in enumerate(listed, start=1):
        try:
            stamp, content = stamped_digest(site.directory / case.image)
        except UnusableCase as error:
            refused.append(Refused(image=case.image, code=error.code))
        else:
            cases.append(FrozenCase(case=case, content=content))
            stamps.append(stamp)
        if on_progress is not None:
            on_progress(done, len(listed))
    tree = _tree(site, cases=cases, refused=refused)
    version = _version(tree, secret=secret)
    if before is not None and before.version != version:
        os.replace(_path(site), _path(site).with_name(f"cohort-{before.version[:16]}.json"))
    _write(_path(site), {"version": version, "table": digest, "list": tree})
    write_stamps(site, version=version, stamps=stamps)
    return Frozen(version=version, cases=tuple(cases), refused=tuple(refused), table=digest)


def read(site: Site, *, secret: bytes) -> Frozen | None:
    """Reads the frozen list; None if the site has none yet.

    Raises:
        ConfigError: ``split`` or ``patient_is`` of the settings are not those frozen.
        StateError: the list is damaged, or was frozen with another split key.
    """
    path = _path(site)
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        tree = None
    if not _is_whole(tree, secret=secret):
        raise StateError(
            f"Expected {path} as it was frozen with this site's split.key, found another; restore both "
            "from one backup. Freezing anew with another key would test on patients trained on."
        )
    listed = tree["list"]
    _check_unchanged(site, listed)
    return Frozen(
        version=tree["version"],
        cases=tuple(
            FrozenCase(case=Case(image=image, label=label, patient=patient), content=content)
            for image, label, patient, content in listed["cases"]
        ),
        refused=tuple(Refused(image=image, code=code) for image, code in listed["refused"]),
        table=tree["table"],
    )


def has_changed(site: Site) -> bool:
    """Returns whether the case table is another one than that of the frozen list."""
    listed = read(site, secret=split.read_key(site))
    return listed is not None and listed.table != table_digest(site)


def accepted(rows: Iterable[Case | Refused]) -> tuple[list[Case], list[Refused]]:
    """Separates the rows of a table, ordered by image; of contradictory rows the first goes as well."""
    cases: dict[str, Case] = {}
    refused: list[Refused] = []
    for row in rows:
        if isinstance(row, Case):
            cases[row.image] = row
            continue
        refused.append(row)
        if row.code == "contradictory_rows" and cases.pop(row.image, None) is not None:
            refused.append(row)
    return [cases[image] for image in sorted(cases)], refused


def stamped_digest(path: Path) -> tuple[Stamp, str]:
    """Returns stamp and sha256 of a file. The stamp is the older: a later change is noticed.

    Raises:
        UnusableCase: the file cannot be read.
    """
    stamp = files.stamp(path)
    return stamp, hashlib.sha256(files.load(path)).hexdigest()


def table_digest(site: Site) -> str:
    """Returns the sha256 of the case table; of nothing if it is missing."""
    content = site.table.read_bytes() if site.table.is_file() else b""
    return hashlib.sha256(content).hexdigest()


def read_stamps(site: Site, *, frozen: Frozen) -> list[Stamp | None]:
    """Returns for each case the stamp under which its content was last seen to be as frozen."""
    try:
        tree = json.loads((site.private / "stamps.json").read_bytes())
        if tree["version"] == frozen.version and len(tree["stamps"]) == len(frozen.cases):
            return [None if stamp is None else (stamp[0], stamp[1], stamp[2]) for stamp in tree["stamps"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the stamps only spare reading the files again
    return [None] * len(frozen.cases)


def write_stamps(site: Site, *, version: str, stamps: Sequence[Stamp | None]) -> None:
    """Keeps the stamps for the next time."""
    _write(site.private / "stamps.json", {"version": version, "stamps": list(stamps)})


def _path(site: Site) -> Path:
    return site.private / "cohort.json"


def _write(path: Path, tree: Any) -> None:
    files.write_private(path, content=canonical_json(tree).encode())


def _tree(site: Site, *, cases: Sequence[FrozenCase], refused: Sequence[Refused]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "patient_is": site.settings.patient_is,
        "split": site.settings.split.model_dump(),
        "cases": [[one.case.image, one.case.label, one.case.patient, one.content] for one in cases],
        "refused": sorted([one.image, one.code] for one in refused),
    }


def _version(tree: dict[str, Any], *, secret: bytes) -> str:
    return split.pseudonym("cohort:" + canonical_json(tree), secret=secret).hex()


def _is_whole(tree: Any, *, secret: bytes) -> bool:
    if not isinstance(tree, dict) or set(tree) != {"version", "table", "list"}:
        return False
    return hmac.compare_digest(str(tree["version"]), _version(tree["list"], secret=secret))


def _check_unchanged(site: Site, listed: dict[str, Any]) -> None:
    for key in ("patient_is", "split"):
        found = site.settings.model_dump()[key]
        if found != listed[key]:
            raise ConfigError(
                f"{site.directory / 'site.yaml'}: expected {key} as frozen ({listed[key]}), found {found}; "
                "set it back, since a patient trained on must never be tested on."
            )
