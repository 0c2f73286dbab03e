"""A site's cohort as one plan sees it: the frozen list, read, preprocessed and split by patient.

The part of a patient (train, validation, test) is a function of the site's secret and the patient's id
alone, so nobody moves when others come or go. While a run is on a case is judged by itself alone.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from client import (
    cache,
    clinical,
    content,
    decoding,
    files,
    frozen,
    preprocessing,
    quarantine,
    room,
    split,
    usage,
    withdrawal,
)
from client.case import Case, Refused
from client.decoding import Job, Manner
from client.frozen import Frozen, FrozenCase, Progress, freeze
from client.site import Site, SiteSettings
from common.asked import Asked
from common.errors import Refusal, UnusableCase
from common.value import canonical_json

if TYPE_CHECKING:  # takes longer to import than a cohort to open
    import pyarrow

__all__ = ["PARTS", "Cohort", "Part", "freeze", "open_cohort"]

logger = logging.getLogger("feverfew.site")

PARTS = ("train", "validation", "test")


class Neighbours(Sequence[np.ndarray]):
    """The indices of each patient's cases where these stand side by side; in little memory.

    Args:
        counts: of cases, by patient.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[np.ndarray, ...]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | tuple[np.ndarray, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        patient = range(len(self))[place]
        begin = self._ends[patient - 1] if patient else 0
        return np.arange(begin, self._ends[patient], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The usable cases of one part.

    Attributes:
        images: uint8 or float16, (cases, channels, *size), memory-mapped and read only.
        targets: what the plan's ``target`` says: int64, (cases,), index into the plan's classes; uint8,
            (cases, classes), 1 for each label of the case; or uint8, (cases, *size), memory-mapped masks.
        values: float32, (cases, features), clinical values; no feature where the plan asks for none.
        patients: for each patient the indices of their cases; ordered by keyed pseudonym.
    """

    images: np.ndarray
    targets: np.ndarray
    values: np.ndarray
    patients: Sequence[np.ndarray]

    def has_class(self, index: int) -> np.ndarray:
        """Returns whether each case is, bears or shows a class: bool, (cases,)."""
        match self.targets.ndim:
            case 1:
                return np.asarray(self.targets == index)
            case 2:
                return np.asarray(self.targets[:, index] == 1)
        return np.array([(mask == index).any() for mask in self.targets], dtype=bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The usable cases of a site; equal to nothing but itself.

    Attributes:
        version: of the frozen list; keyed, so that it tells nothing about what is in it.
        parts: by name; always train, validation and test, possibly empty.
        sources: by part, what ``usage.listed`` says of the cases, in the order of the part's arrays; private.
        offered: rows of the case table when it was frozen.
        used: cases in all parts; ``offered == used + sum(reasons.values())``.
        reasons: number of refused rows by code.
    """

    version: str
    parts: Mapping[str, Part]
    sources: Mapping[str, pyarrow.Table]
    offered: int
    used: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A case on its way into the cohort: pseudonyms of patient and case, what the plan asks of it beside
    its pixels, and the case itself, with the plan's inputs in the plan's order."""

    patient: bytes
    key: str
    target: int | list[int]
    values: list[float]
    source: FrozenCase


def open_cohort(
    site: Site,
    *,
    asked: Asked,
    on_progress: Progress | None = None,
) -> Cohort:
    """Opens the frozen cohort as a plan wants it, without withdrawn patients; freezes it on first use.

    What cannot be used is counted by code and listed in ``private/quarantine.csv``; it never keeps the
    rest from being used.

    Args:
        on_progress: told (done, total) of the files to freeze, then of the cases to decode.

    Raises:
        UserError, StateError: as ``frozen.freeze``; ``private/withdrawn.json`` is damaged.
        Refusal: the site lists no such images, clinical values or labels at all; or the cache may not be as
            large as it would have to be by the site's public numbers.
    """
    secret = split.read_key(site)
    listed = frozen.read(site, secret=secret) or freeze(site, on_progress=on_progress)
    present, refused = _present(site, listed)
    _check_listed(site, listed, asked)
    entries, unknown = _entries(present, listed=listed, asked=asked, secret=secret)
    store = _open_store(site, entries, listed=listed, asked=asked, on_progress=on_progress)
    used = [entry for entry in entries if entry.key not in store.refused]
    refused += unknown
    refused += [
        Refused(image=entry.source.case.image, code=store.refused[entry.key])
        for entry in entries
        if entry.key in store.refused
    ]
    quarantine.write(site.private / "quarantine.csv", refused=refused)
    cuts, sources = _cuts(site, used), usage.listed([entry.source for entry in used])
    return Cohort(
        version=listed.version,
        parts={name: _part(used[cut], records=store.records[cut], asked=asked) for name, cut in cuts.items()},
        sources={name: sources[cut] for name, cut in cuts.items()},
        offered=len(listed.cases) + len(listed.refused),
        used=len(used),
        reasons=dict(sorted(Counter(one.code for one in refused).items())),
    )


def _present(site: Site, listed: Frozen) -> tuple[list[FrozenCase], list[Refused]]:
    """Returns the cases whose files are as frozen, and everything refused so far.

    Files of withdrawn patients are not looked at.
    """
    refused, present = list(listed.refused), []
    withdrawn = withdrawal.withdrawn(site)
    before = frozen.read_stamps(site, frozen=listed)
    stamps = list(before)
    for position, one in enumerate(listed.cases):
        if one.case.patient in withdrawn:
            refused.append(Refused(image=one.case.image, code=withdrawal.CODE))
            continue
        try:
            if content.stamp(one.case, directory=site.directory) != stamps[position]:
                stamps[position], digest = frozen.stamped_digest(one.case, directory=site.directory)
                _check_content(digest, one)
        except UnusableCase as error:
            stamps[position] = None
            refused.append(Refused(image=one.case.image, code=error.code))
        else:
            present.append(one)
    if stamps != before:
        frozen.write_stamps(site, version=listed.version, stamps=stamps)
    return present, refused


def _check_content(digest: str, one: FrozenCase) -> None:
    if digest != one.content:
        raise UnusableCase("changed_since_frozen", "Expected the file as it was frozen, found another.")


def _check_listed(site: Site, listed: Frozen, asked: Asked) -> None:
    """Refuses a plan that asks for what no case here has; which is a fact of ``site.yaml``, not of data."""
    if not set(asked.preprocessing.inputs) <= set(listed.inputs):
        raise Refusal("lacks_images", f"The plan asks for {asked.preprocessing.inputs}.")
    missing = {value.name for value in asked.clinical} - set(listed.values)
    if missing:
        raise Refusal("lacks_values", f"The plan asks for {sorted(missing)}.")
    if asked.target not in site.settings.cases.targets:
        raise Refusal("lacks_labels", f"The plan asks for target {asked.target}.")


def _entries(
    present: Sequence[FrozenCase], *, listed: Frozen, asked: Asked, secret: bytes
) -> tuple[list[_Entry], list[Refused]]:
    """Returns the cases that the plan can use, ordered by patient pseudonym, and the others."""
    entries, refused = [], []
    for one in present:
        try:
            entries.append(_entry(one, listed=listed, asked=asked, secret=secret))
        except UnusableCase as error:
            refused.append(Refused(image=one.case.image, code=error.code))
    return sorted(entries, key=lambda entry: (entry.patient, entry.key)), refused


def _entry(one: FrozenCase, *, listed: Frozen, asked: Asked, secret: bytes) -> _Entry:
    texts = dict(zip(listed.values, one.case.values, strict=True))
    return _Entry(
        patient=split.pseudonym(one.case.patient, secret=secret),
        key=split.pseudonym(f"case:{one.content}:{one.case.image}", secret=secret).hex()[:32],
        target=_target(one.case, asked),
        values=clinical.features(texts, asked.clinical),
        source=one,
    )


def _target(case: Case, asked: Asked) -> int | list[int]:
    """Returns the index of the case's class, or 0 or 1 for each class; 0 where a mask says it."""
    if asked.target == "mask":
        if not case.mask:
            raise UnusableCase("missing_mask")
        return 0
    if case.labels is None:
        raise UnusableCase("missing_label")
    if not set(case.labels) <= set(asked.classes):
        raise UnusableCase("unknown_label")
    if asked.target == "labels":
        return [int(name in case.labels) for name in asked.classes]
    return asked.classes.index(case.labels[0])


def _open_store(
    site: Site, entries: Sequence[_Entry], *, listed: Frozen, asked: Asked, on_progress: Progress | None
) -> cache.Store:
    settings, dtype = site.settings, preprocessing.record_type(asked)
    most, needed = settings.max_cache_gigabytes, len(entries) * dtype.itemsize
    room.require(_nominal_cases(settings) * dtype.itemsize, most_gigabytes=most)
    jobs = [Job(case=one.source.case, content=one.source.content, name=one.key[:12]) for one in entries]
    manner = Manner(directory=site.directory, inputs=listed.inputs, asked=asked)

    def decode(positions: Sequence[int]) -> Iterator[np.ndarray | str]:
        wanted = [jobs[position] for position in positions]
        return decoding.records(wanted, manner=manner, processes=settings.threads)

    store = files.private_directory(site.cache) / _store_name(asked, dtype)
    if not room.make(site.cache, wanted=store, needed_bytes=needed, most_gigabytes=most):
        logger.warning("the preprocessed cases take more than max_cache_gigabytes: %g allows", most)
    opened = cache.open_store(
        store,
        lock=room.lock(store),
        keys=[entry.key for entry in entries],
        dtype=dtype,
        decode=decode,
        fits=lambda both: room.make(site.cache, wanted=store, needed_bytes=both, most_gigabytes=most),
        on_progress=on_progress,
    )
    room.note_use(store)
    return opened


def _nominal_cases(settings: SiteSettings) -> float:
    """Returns the number of cases that the public numbers say; the true one is not for others to learn."""
    fraction = settings.split.train or 1.0  # an evaluation site's number of patients is that of all
    return settings.nominal_patients / fraction * settings.nominal_cases_per_patient


def _store_name(asked: Asked, dtype: np.dtype[Any]) -> str:
    # The record depends on the classes only where a mask holds their numbers.
    depends = [asked.preprocessing.model_dump(mode="json"), preprocessing.software(), repr(dtype)]
    name = canonical_json([*depends, len(asked.classes) if asked.target == "mask" else 0])
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _cuts(site: Site, used: Sequence[_Entry]) -> dict[str, slice]:
    """Returns where each part lies. Patients ordered by pseudonym are ordered by part as well."""
    sizes = Counter(split.parts_of((entry.patient for entry in used), split=site.settings.split))
    cuts, start = {}, 0
    for name in PARTS:
        cuts[name] = slice(start, start + sizes[name])
        start += sizes[name]
    return cuts


def _part(used: Sequence[_Entry], *, records: np.ndarray, asked: Asked) -> Part:
    groups = itertools.groupby(range(len(used)), key=lambda position: used[position].patient)
    return Part(
        images=records["image"],
        targets=records["mask"] if asked.target == "mask" else _targets(used, asked),
        values=clinical.array([entry.values for entry in used], num_features=asked.num_features),
        patients=Neighbours([len(list(positions)) for _, positions in groups]),
    )


def _targets(used: Sequence[_Entry], asked: Asked) -> np.ndarray:
    several = asked.target == "labels"
    targets = np.array([entry.target for entry in used], dtype=np.uint8 if several else np.int64)
    targets = targets.reshape(len(used), len(asked.classes)) if several else targets
    targets.flags.writeable = False
    return targets
