"""From the files of cases to what the cache keeps of them, by one process or by several."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from client import content, crew, preprocessing
from client.case import Case
from common.asked import Asked
from common.errors import UnusableCase

CHUNK = 16
FEW = 256  # cases, for which it is not worth while to start processes

logger = logging.getLogger("feverfew.site")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A case to be decoded, its frozen hash, and the pseudonym by which logs know it."""

    case: Case
    content: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Manner:
    """What is the same for all jobs: where files lie, the names of a case's images, and the plan's wishes."""

    directory: Path
    inputs: tuple[str, ...]
    asked: Asked


def records(jobs: Sequence[Job], *, manner: Manner, processes: int) -> Iterator[np.ndarray | str]:
    """Yields for each job, in their order, its record or the code for which it cannot be used.

    The records are the same bytes, whatever the number of processes.
    """
    if processes == 1 or len(jobs) <= FEW:
        yield from (_outcome(job, manner=manner) for job in jobs)
        return
    chunks = (jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK))
    for outcomes in crew.done(partial(_outcomes, manner=manner), chunks, processes=processes):
        yield from outcomes


def _outcomes(jobs: Sequence[Job], *, manner: Manner) -> list[np.ndarray | str]:
    return [_outcome(job, manner=manner) for job in jobs]


def _outcome(job: Job, *, manner: Manner) -> np.ndarray | str:
    try:
        return _record(job, manner=manner)
    except UnusableCase as error:
        return error.code
    except Exception as error:
        logger.error("case %s could not be read: %s", job.name, type(error).__name__)
        error.add_note(f"case {job.name} is {job.case.image}")
        raise


def _record(job: Job, *, manner: Manner) -> np.ndarray:
    from client import images  # its decoders take long to import, and a warm start does without

    asked = manner.asked
    loaded = content.load(job.case, directory=manner.directory)
    if loaded.digest != job.content:
        raise UnusableCase("changed_since_frozen", "Expected the file as it was frozen, found another.")
    by_input = dict(zip(manner.inputs, loaded.images, strict=True))
    mask = loaded.mask if asked.target == "mask" else None
    return preprocessing.apply(
        [images.decode(*by_input[name]) for name in asked.preprocessing.inputs],
        asked,
        mask=None if mask is None else images.decode_mask(mask),
    )
