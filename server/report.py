"""The report of a run: one typed value, written as ``report.json`` and ``report.html``.

Keys that are unknown are left out or written as null: see ``server/result.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AwareDatetime, ValidationError

from common import durable, measure
from common.dice import DiceScores
from common.errors import StateError
from common.measure import Exact, Headline
from common.metrics import Scores
from server import page
from server.result import Interval, Part, Result

JSON_NAME, HTML_NAME = "report.json", "report.html"

P = TypeVar("P", bound=Part)


class Versions(Part):
    """Versions of the software that the server ran."""

    feverfew: str
    flwr: str
    torch: str
    monai: str
    opacus: str


class Round(Part):
    """What one round cost and gave. AUROC, Dice and accuracy are those of the validation part."""

    round: int
    seconds: float
    sites_asked: int
    sites_valid: int
    train_loss: float | None
    auroc: float | None = None
    auroc_interval: Interval | None = None
    dice: float | None = None
    dice_interval: Interval | None = None
    accuracy: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None


class SitePrivacy(Part):
    """What this run cost a site, and what it was computed from; public values all of them.

    ``budget`` and ``total_epsilon`` are the site's own and known in a simulation only.
    """

    epsilon: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int
    nominal_patients: int
    budget: float | None = None
    total_epsilon: float | None = None


class Privacy(Part):
    """The guarantee of this run, or that there is none."""

    unit: Literal["patient", "none"]
    delta: float | None
    max_epsilon: float | None
    seeded: bool
    accountant: str | None
    per_site: dict[str, SitePrivacy]


class Participation(Part):
    """A site's part in the run; ``story`` tells it in one line.

    ``tasks_sent_again`` counts those over which the site went away; ``bytes_down`` and ``bytes_up`` are those
    of the messages to the site and from it, without headers and TLS; ``waiting_since`` is when a site said
    first that nobody there had approved the plan, where that is so still.
    """

    status: str
    role: str
    rounds_valid: int
    rounds_late: int
    rounds_rejected: int
    tasks_sent_again: int
    bytes_down: int
    bytes_up: int
    story: str
    patient_is: str
    waiting_since: AwareDatetime | None = None
    offered: int | None = None
    used: int | None = None
    quarantined: int | None = None
    reasons: dict[str, int] | None = None


class LandmarkResult(Part):
    """What was found of the intensities of all sites, for the step ``landmarks`` of a later plan.

    ``uncertainty``: what noise adds to the place of a median, as a standard deviation in fractions of the
    patients. ``override`` is that plan's preprocessing.
    """

    percentiles: tuple[float, ...]
    values: tuple[float, ...]
    uncertainty: float
    sites: int
    override: str


class Timing(Part):
    """Where the time went. ``training_seconds`` counts the time in which at least one site trained."""

    wall_seconds: float
    training_seconds: float | None
    overhead_seconds: float | None


class Report(Part):
    """Everything that a run tells about itself.

    ``restarts`` counts, by name, the processes of the coordinator that were started again while it went on.
    """

    plan_hash: str
    run: str
    study: str
    engine: str
    versions: Versions
    started: AwareDatetime
    finished: AwareDatetime
    status: Literal["completed", "quorum_not_reached", "failed"]
    rounds: tuple[Round, ...]
    final: Result
    privacy: Privacy
    participation: dict[str, Participation]
    timing: Timing
    restarts: dict[str, int]
    plan: dict[str, Any]
    landmarks: LandmarkResult | None = None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Returns the text of ``report.json``."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, directory: Path) -> None:
        """Writes ``report.json`` and ``report.html``; a reader sees an old file or a whole new one."""
        directory.mkdir(parents=True, exist_ok=True)
        durable.write(directory / JSON_NAME, self.to_json().encode())
        durable.write(directory / HTML_NAME, page.render(self).encode())

    @classmethod
    def read(cls, directory: Path) -> Report:
        """Reads ``report.json`` back.

        Raises:
            StateError: the file is missing or is not a report.
        """
        path = directory / JSON_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise StateError(f"Expected a report in {path}, found {type(error).__name__}: {error}") from error

    @property
    def asks_for_landmarks(self) -> bool:
        """Says whether the run trained nothing and asked for landmarks of intensity instead."""
        return self.plan.get("landmarks") is not None

    @property
    def headline(self) -> Headline:
        """The one number that says how good the model is: AUROC, or Dice where the plan is about masks."""
        return measure.headline(str(self.plan.get("target", "class")))

    def with_exact(self, exact: Mapping[str, Exact]) -> Report:
        """Returns the report with ``auroc_exact`` or ``dice_exact``: only the simulation harness knows it.

        Args:
            exact: by site, the scores of the very cases that the site's released statistic is about.
        """
        if not exact:
            return self
        target = str(self.plan.get("target", "class"))
        per_site = {
            site: result.with_exact(exact[site], target=target) if site in exact else result
            for site, result in self.final.per_site.items()
        }
        pooled = measure.merge(exact)
        assert isinstance(pooled, Scores | DiceScores), "exact scores merge into exact ones"
        final = self.final.model_copy(update={"per_site": per_site}).with_exact(pooled, target=target)
        return self.model_copy(update={"final": final})

    def with_site_facts(
        self,
        *,
        privacy: Mapping[str, Mapping[str, Any]],
        participation: Mapping[str, Mapping[str, Any]],
    ) -> Report:
        """Returns the report with what stands in the sites' own files: simulation only.

        Args:
            privacy: by site, any of ``budget`` and ``total_epsilon``.
            participation: by site, any of ``offered``, ``used``, ``quarantined`` and ``reasons``.

        Raises:
            ValueError: a site or a key that the report does not have.
        """
        costs = self.privacy.model_copy(update={"per_site": _updated(self.privacy.per_site, privacy)})
        parts = _updated(self.participation, participation)
        return self.model_copy(update={"privacy": costs, "participation": parts})


def _updated(parts: Mapping[str, P], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, P]:
    unknown = set(facts) - set(parts)
    if unknown:
        raise ValueError(f"expected facts about {sorted(parts)}, found {sorted(unknown)}")
    return {
        site: type(part).model_validate({**part.model_dump(), **facts.get(site, {})})
        for site, part in parts.items()
    }
