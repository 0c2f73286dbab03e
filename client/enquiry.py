"""Which series of a PACS a hospital's query means. Every condition is judged here, whatever the server does.

Only dates are asked of the server: filters by description are matched by few servers, and some lose results
of a search that has both a filter and pages.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from client import answers, wildcard
from client.answers import Attributes, NotGiven
from client.dicomweb import Archive
from client.pacs import is_uid
from client.pacs_settings import Query
from common.errors import DeploymentError

STUDY: Final = "0020000D"
SERIES: Final = "0020000E"
INSTANCE: Final = "00080018"
STUDY_DATE: Final = "00080020"
ACCESSION: Final = "00080050"
PATIENT: Final = "00100020"
MODALITIES: Final = "00080061"
STUDY_DESCRIPTION: Final = "00081030"
MODALITY: Final = "00080060"
BODY_PART: Final = "00180015"
SERIES_DESCRIPTION: Final = "0008103E"
NUM_INSTANCES: Final = "00201209"


@dataclass(frozen=True, kw_only=True)
class Offered:
    """A series that the query means; ``num_instances`` is ``None`` where the server does not tell it."""

    study: str
    series: str
    accession: str
    patient: str
    modality: str
    description: str
    num_instances: int | None

    @property
    def path(self) -> str:
        """Its address at the server."""
        return f"/studies/{self.study}/series/{self.series}"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a search found.

    Attributes:
        offered: the series that the query means.
        untold: how many studies or series were left out since the PACS does not tell what the query asks of
            them, by the key of the query.
        not_given: how many studies the PACS lists and does not tell more of, by code.
    """

    offered: Sequence[Offered]
    untold: Mapping[str, int]
    not_given: Mapping[str, int]


OnProgress = Callable[[int, int], None]


def ask(archive: Archive, *, query: Query, on_progress: OnProgress) -> Findings:
    """Searches a PACS; ``on_progress`` is told how many studies of how many were looked at.

    Raises:
        DeploymentError: the server is away, refuses us, or does not speak DICOMweb.
    """
    untold: Counter[str] = Counter()
    not_given: Counter[str] = Counter()
    offered: list[Offered] = []
    studies = _studies(archive, query)
    for done, study in enumerate(studies, start=1):
        if _is_meant(_of_study(study, query), untold):
            try:
                offered += _series(archive, study=study, query=query, untold=untold)
            except NotGiven as error:
                not_given[error.code] += 1
        on_progress(done, len(studies))
    named = [one for one in offered if is_uid(one.series)]
    not_given["bad_identifier"] += len(offered) - len(named)
    return Findings(offered=named, untold=dict(untold), not_given=dict(+not_given))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The UIDs of the instances of a series, and by the place of others the code of why they are not told."""

    uids: Sequence[str]
    not_given: Mapping[int, str]


def instances(archive: Archive, series: Offered) -> Listing:
    """Returns the instances of a series, also where the server fails at some.

    Raises:
        NotGiven: the server does not tell any.
    """
    path = f"{series.path}/instances"
    try:
        found = archive.search(path, key=INSTANCE)
    except NotGiven as error:
        # Orthanc reads every file for such a list: one that is lost would take the others with it.
        if error.code != "server_error" or not series.num_instances:
            raise
        return _one_by_one(archive, path, number=series.num_instances)
    uids = [answers.text(one, INSTANCE) for one in found]
    not_given = {place: "bad_identifier" for place, uid in enumerate(uids) if not is_uid(uid)}
    return Listing(uids=list(filter(is_uid, uids)), not_given=not_given)


def _one_by_one(archive: Archive, path: str, *, number: int) -> Listing:
    uids: dict[str, None] = {}
    not_given = {}
    for place in range(number):
        try:
            (uid,) = (answers.text(one, INSTANCE) for one in archive.at(path, place=place))
            uids[uid] = None
        except NotGiven as error:
            not_given[place] = error.code
        except ValueError:
            not_given[place] = "not_listed"
    return Listing(uids=list(filter(is_uid, uids)), not_given=not_given)


def _studies(archive: Archive, query: Query) -> list[Attributes]:
    try:
        return archive.search(
            "/studies",
            key=STUDY,
            fields=(STUDY_DESCRIPTION, ACCESSION, PATIENT, MODALITIES),
            match=_dates(query),
        )
    except NotGiven as error:
        told = f"HTTP {error.status}" if error.status else error.code
        raise DeploymentError(
            f"Expected a list of studies from the PACS, found {told}; see url in site.yaml, which has to be "
            "the root of DICOMweb (QIDO-RS), such as https://pacs.hospital.example/dicom-web."
        ) from None


def _dates(query: Query) -> dict[str, str]:
    if query.date_from is None and query.date_to is None:
        return {}
    first, last = (_day(one) if one else "" for one in (query.date_from, query.date_to))
    return {"StudyDate": f"{first}-{last}"}


def _day(date: datetime.date) -> str:
    return f"{date:%Y%m%d}"


def _series(archive: Archive, *, study: Attributes, query: Query, untold: Counter[str]) -> list[Offered]:
    uid = answers.text(study, STUDY)
    if not is_uid(uid):
        raise NotGiven("bad_identifier")
    found = archive.search(
        f"/studies/{uid}/series",
        key=SERIES,
        fields=(SERIES_DESCRIPTION, BODY_PART, NUM_INSTANCES),
    )
    return [
        Offered(
            study=uid,
            series=answers.text(one, SERIES),
            accession=answers.text(study, ACCESSION) or answers.text(one, ACCESSION),
            patient=answers.text(study, PATIENT) or answers.text(one, PATIENT),
            modality=answers.text(one, MODALITY),
            description=answers.text(one, SERIES_DESCRIPTION),
            num_instances=answers.number(one, NUM_INSTANCES),
        )
        for one in found
        if _is_meant(_of_series(one, query), untold)
    ]


Condition = tuple[str, bool | None]
"""A key of the query, and whether it is fulfilled; ``None`` where the server does not tell."""


def _is_meant(conditions: Iterable[Condition], untold: Counter[str]) -> bool:
    """Returns whether all are fulfilled; if none fails and one cannot be judged, counts the first such."""
    judged = list(conditions)
    if any(is_fulfilled is False for _, is_fulfilled in judged):
        return False
    unclear = [key for key, is_fulfilled in judged if is_fulfilled is None]
    untold.update(unclear[:1])
    return not unclear


def _of_study(study: Attributes, query: Query) -> Iterable[Condition]:
    yield "study_description", _matches(query.study_description, answers.text(study, STUDY_DESCRIPTION))
    told = {one for text in answers.texts(study, MODALITIES) for one in text.split("\\")}
    if told and query.modalities:  # where it is not told, each series says it
        yield "modalities", bool(told & set(query.modalities))
    if _dates(query):
        yield "date_from and date_to", _is_within(answers.text(study, STUDY_DATE), query)


def _of_series(series: Attributes, query: Query) -> Iterable[Condition]:
    if query.modalities:
        modality = answers.text(series, MODALITY)
        yield "modalities", modality in query.modalities if modality else None
    yield "body_part", _matches(query.body_part, answers.text(series, BODY_PART))
    yield "series_description", _matches(query.series_description, answers.text(series, SERIES_DESCRIPTION))


def _is_within(date: str, query: Query) -> bool | None:
    day = date.replace(".", "")  # with dots until DICOM 3.0
    if not (len(day) == 8 and day.isdigit()):
        return None
    return (query.date_from is None or _day(query.date_from) <= day) and (
        query.date_to is None or day <= _day(query.date_to)
    )


def _matches(pattern: str | None, text: str) -> bool | None:
    if pattern is None:
        return True
    return wildcard.matches(pattern, text) if text else None
