"""The frozen list of a site's cases, ``private/cohort.json``, and what makes a new version of it.

The list keeps what the site's listing says of a case, and the sha256 of its files, for every case that has
files, and a code for every other, those that the hospital's rules refuse among them. Later changes of
listing, files or rules change nothing until somebody freezes again.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client import content, files, findings, listing, pacs, split, survey
from client.case import Case, Refused
from client.files import Stamp
from client.findings import Finding
from client.rules import Decision
from client.sight import Sight
from client.site import Site
from common import schema
from common.errors import ConfigError, Refusal, SchemaError, StateError
from common.value import canonical_json

FORMAT = 3
"""The schema version of the list; raised with every change of its form."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenCase:
    """A case and the sha256 of its files (``content.Content.digest``), 64 hexadecimal digits."""

    case: Case
    content: str


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A frozen list, ordered by image; private.

    Attributes:
        version: keyed hash of the list and of the split; tells nothing to others.
        inputs: names of the images of a case, in their order there.
        values: names of its clinical values, in their order there.
        listing: sha256 of the listing from which it was made.
        compared: whether cases were compared by their pixels, as ``check`` does, or by their files alone.
        decided: what became of the cases of each finding, by its code.
    """

    version: str
    inputs: tuple[str, ...]
    values: tuple[str, ...]
    cases: tuple[FrozenCase, ...]
    refused: tuple[Refused, ...]
    listing: str
    compared: Literal["pixels", "files"]
    decided: Mapping[str, Decision]


def freeze(
    site: Site,
    *,
    seen: Mapping[str, Sight | str] | None = None,
    decided: Mapping[str, Decision] | None = None,
    on_progress: Progress | None = None,
) -> Frozen:
    """Freezes listing and files as they are now; the list of before is kept beside the new.

    The rules of ``site.yaml`` are applied to what was seen. Without a survey nothing is decoded: cases are
    then compared by their files, and rules about sizes and pixels find nothing.

    Args:
        seen: what ``survey.survey`` returned.
        decided: what a person decided for this time, by code of the finding.
        on_progress: told (done, total) of the files that are read.

    Raises:
        UserError: no usable listing or split key; ``split`` or ``patient_is`` are not those frozen.
        StateError: the list of before is damaged, or was frozen with another split key.
        Refusal: ``undecided``: the rules ask a person.
    """
    secret = split.read_key(site)
    before = read(site, secret=secret)
    digest = listing_digest(site)
    listed, refused = accepted(listed_rows(site))
    looked = survey.completed(site, listed, seen=seen or {}, on_progress=on_progress)
    found = findings.find(site, cases=listed, seen=looked, decided=decided, secret=secret)
    _require_decided(found)
    codes = {image: one for image, one in looked.items() if isinstance(one, str)} | findings.refused(found)
    refused += [Refused(image=case.image, code=codes[case.image]) for case in listed if case.image in codes]
    kept = [(case, one) for case in listed if isinstance(one := looked[case.image], Sight)]
    kept = [(case, one) for case, one in kept if case.image not in codes]
    cases = [FrozenCase(case=case, content=one.content) for case, one in kept]
    tree = _tree(
        site, cases=cases, refused=refused, compared="files" if seen is None else "pixels", found=found
    )
    version = _version(tree, secret=secret)
    if before is not None and before.version != version:
        os.replace(_path(site), _path(site).with_name(f"cohort-{before.version[:16]}.json"))
    _write(_path(site), {"version": version, "listing": digest, "list": tree})
    write_stamps(site, version=version, stamps=[one.stamp for _, one in kept])
    return _frozen({"version": version, "listing": digest, "list": tree})


def _require_decided(found: Iterable[Finding]) -> None:
    questions = findings.open_questions(found)
    if questions:
        raise Refusal(
            "undecided",
            f"Expected a decision about {', '.join(questions)}, found none; see feverfew-client check.",
        )


def read(site: Site, *, secret: bytes) -> Frozen | None:
    """Reads the frozen list; None if the site has none yet.

    Raises:
        ConfigError: ``split`` or ``patient_is`` of the settings are not those frozen.
        StateError: the list is damaged, or was frozen with another split key.
        SchemaError: a newer Feverfew froze it, or an older one.
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
    found = schema.require(listed["format"], newest=FORMAT, what=f"the cohort {path}")
    if found < FORMAT:
        raise SchemaError(
            f"Expected the cohort {path} of schema {FORMAT}, found {found}: an older Feverfew froze it; "
            "leave patient_is and split in site.yaml as they are, move it away, and run: "
            f"feverfew-client check {site.directory} --freeze"
        )
    _check_unchanged(site, listed)
    return _frozen(tree)


def _frozen(tree: dict[str, Any]) -> Frozen:
    listed = tree["list"]
    return Frozen(
        version=tree["version"],
        inputs=tuple(listed["inputs"]),
        values=tuple(listed["values"]),
        cases=tuple(map(_frozen_case, listed["cases"])),
        refused=tuple(Refused(image=image, code=code) for image, code in listed["refused"]),
        listing=tree["listing"],
        compared=listed["compared"],
        decided=listed["decided"],
    )


def _frozen_case(fields: list[Any]) -> FrozenCase:
    images, patient, labels, mask, values, content_digest = fields
    case = Case(
        images=tuple(images),
        patient=patient,
        labels=None if labels is None else tuple(labels),
        mask=mask,
        values=tuple(values),
    )
    return FrozenCase(case=case, content=content_digest)


def _fields(one: FrozenCase) -> list[Any]:
    case = one.case
    labels = None if case.labels is None else list(case.labels)
    return [list(case.images), case.patient, labels, case.mask, list(case.values), one.content]


def has_changed(site: Site) -> bool:
    """Returns whether the listing is another one than that of the frozen list."""
    listed = read(site, secret=split.read_key(site))
    return listed is not None and listed.listing != listing_digest(site)


def accepted(rows: Iterable[Case | Refused]) -> tuple[list[Case], list[Refused]]:
    """Separates the rows of a listing, ordered by image; of contradictory rows the first goes as well."""
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


def stamped_digest(case: Case, *, directory: Path) -> tuple[Stamp, str]:
    """Returns stamp and sha256 of a case's files. The stamp is the older: a later change is noticed.

    Raises:
        UnusableCase: a file cannot be read.
    """
    stamp = content.stamp(case, directory=directory)
    return stamp, content.load(case, directory=directory).digest


def listed_rows(site: Site) -> Iterator[Case | Refused]:
    """Yields what the site lists now; see ``listing.rows``."""
    settings = site.settings
    fetched = pacs.index(site) if listing.names_the_pacs(settings.cases) else ()
    return listing.rows(
        settings.cases, directory=site.directory, patient_is=settings.patient_is, fetched=fetched
    )


def listing_digest(site: Site) -> str:
    """Returns the sha256 of what lists the cases."""
    listed = site.settings.cases
    digest = listing.digest(listed, directory=site.directory)
    return f"{digest}{pacs.digest(site)}" if listing.names_the_pacs(listed) else digest


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


def _tree(
    site: Site,
    *,
    cases: Sequence[FrozenCase],
    refused: Sequence[Refused],
    compared: str,
    found: Iterable[Finding],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "patient_is": site.settings.patient_is,
        "split": site.settings.split.model_dump(),
        "inputs": list(site.settings.cases.inputs),
        "values": list(site.settings.cases.values),
        "cases": [_fields(one) for one in cases],
        "refused": sorted([one.image, one.code] for one in refused),
        "compared": compared,
        "decided": {one.code: one.decision for one in found if one.decision is not None},
    }


def _version(tree: dict[str, Any], *, secret: bytes) -> str:
    return split.pseudonym("cohort:" + canonical_json(tree), secret=secret).hex()


def _is_whole(tree: Any, *, secret: bytes) -> bool:
    if not isinstance(tree, dict) or set(tree) != {"version", "listing", "list"}:
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
