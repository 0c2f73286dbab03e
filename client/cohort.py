"""A site's cohort as one plan sees it: the frozen list, read, preprocessed and split by patient.

The part of a patient (train, validation, test) is a function of the site's secret and the patient's id
alone, so nobody moves when others come or go. While a run is on a case is judged by itself alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client import cache, files, frozen, preprocessing, quarantine, split
from client.frozen import Frozen, FrozenCase, Progress, freeze
from client.site import Site
from client.table import Refused
from common.errors import UnusableCase
from common.plan import Preprocessing, canonical_json

__all__ = ["PARTS", "Cohort", "Part", "freeze", "open_cohort"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The usable cases of one part.

    Attributes:
        images: uint8, (cases, channels, height, width), memory-mapped and read only.
        labels: int64, (cases,), index into the plan's classes.
        patients: for each patient the indices of their cases; ordered by keyed pseudonym.
    """

    images: np.ndarray
    labels: np.ndarray
    patients: tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The usable cases of a site.

    Attributes:
        version: of the frozen list; keyed, so that it tells nothing about what is in it.
        parts: by name; always train, validation and test, possibly empty.
        offered: rows of the case table when it was frozen.
        used: cases in all parts; ``offered == used + sum(reasons.values())``.
        reasons: number of refused rows by code.
    """

    version: str
    parts: Mapping[str, Part]
    offered: int
    used: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A case on its way into the cohort: pseudonyms of patient and case, class, and the case itself."""

    patient: bytes
    key: str
    label: int
    source: FrozenCase


def open_cohort(
    site: Site,
    *,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    on_progress: Progress | None = None,
) -> Cohort:
    """Opens the frozen cohort as a plan wants it; freezes it on first use.

    What cannot be used is counted by code and listed in ``private/quarantine.csv``; it never keeps the
    rest from being used.

    Args:
        on_progress: told (done, total) of the files to freeze, then of the cases to decode.

    Raises:
        UserError, StateError: as ``frozen.freeze``.
    """
    secret = split.read_key(site)
    listed = frozen.read(site, secret=secret) or freeze(site, on_progress=on_progress)
    present, refused = _present(site, listed)
    entries, unknown = _entries(present, classes=classes, secret=secret)
    store = _open_store(site, entries, asked=preprocessing, on_progress=on_progress)
    used = [entry for entry in entries if entry.key not in store.refused]
    refused += unknown
    refused += [
        Refused(image=entry.source.case.image, code=store.refused[entry.key])
        for entry in entries
        if entry.key in store.refused
    ]
    quarantine.write(site.private / "quarantine.csv", refused=refused)
    return Cohort(
        version=listed.version,
        parts=_parts(site, used, images=store.images),
        offered=len(listed.cases) + len(listed.refused),
        used=len(used),
        reasons=dict(sorted(Counter(one.code for one in refused).items())),
    )


def _present(site: Site, listed: Frozen) -> tuple[list[FrozenCase], list[Refused]]:
    """Returns the cases whose files are as frozen, and everything refused so far."""
    refused, present = list(listed.refused), []
    before = frozen.read_stamps(site, frozen=listed)
    stamps = list(before)
    for position, one in enumerate(listed.cases):
        path = site.directory / one.case.image
        try:
            if files.stamp(path) != stamps[position]:
                stamps[position], content = frozen.stamped_digest(path)
                _check_content(content, one)
        except UnusableCase as error:
            stamps[position] = None
            refused.append(Refused(image=one.case.image, code=error.code))
        else:
            present.append(one)
    if stamps != before:
        frozen.write_stamps(site, version=listed.version, stamps=stamps)
    return present, refused


def _check_content(content: str, one: FrozenCase) -> None:
    if content != one.content:
        raise UnusableCase("changed_since_frozen", "Expected the file as it was frozen, found another.")


def _entries(
    present: Sequence[FrozenCase], *, classes: tuple[str, ...], secret: bytes
) -> tuple[list[_Entry], list[Refused]]:
    """Returns the cases with a known class, ordered by patient pseudonym, and the others."""
    index = {name: number for number, name in enumerate(classes)}
    entries, refused = [], []
    for one in present:
        if one.case.label not in index:
            refused.append(Refused(image=one.case.image, code="unknown_label"))
            continue
        entry = _Entry(
            patient=split.pseudonym(one.case.patient, secret=secret),
            key=split.pseudonym(f"case:{one.content}:{one.case.image}", secret=secret).hex()[:32],
            label=index[one.case.label],
            source=one,
        )
        entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.patient, entry.key)), refused


def _open_store(
    site: Site, entries: Sequence[_Entry], *, asked: Preprocessing, on_progress: Progress | None
) -> cache.Store:
    def decode(position: int) -> np.ndarray:
        from client import images  # its decoders take long to import, and a warm start does without

        source = entries[position].source
        content = files.load(site.directory / source.case.image)
        _check_content(hashlib.sha256(content).hexdigest(), source)
        return preprocessing.apply(images.decode(content), asked)

    name = canonical_json([asked.model_dump(mode="json"), preprocessing.software()])
    return cache.open_store(
        files.private_directory(site.cache) / hashlib.sha256(name.encode()).hexdigest()[:32],
        keys=[entry.key for entry in entries],
        shape=(asked.channels, *asked.size),
        decode=decode,
        on_progress=on_progress,
    )


def _parts(site: Site, used: Sequence[_Entry], *, images: np.ndarray) -> dict[str, Part]:
    """Cuts the store into parts. Patients ordered by pseudonym are ordered by part as well."""
    fractions = site.settings.split
    sizes = Counter(split.part_of(entry.patient, split=fractions) for entry in used)
    parts, start = {}, 0
    for name in PARTS:
        end = start + sizes[name]
        parts[name] = _part(used[start:end], images=images[start:end])
        start = end
    return parts


def _part(used: Sequence[_Entry], *, images: np.ndarray) -> Part:
    labels = np.array([entry.label for entry in used], dtype=np.int64)
    labels.flags.writeable = False
    groups = itertools.groupby(range(len(used)), key=lambda position: used[position].patient)
    patients = tuple(np.array(list(positions), dtype=np.int64) for _, positions in groups)
    return Part(images=images, labels=labels, patients=patients)
