"""The report of a run: one typed value, written as ``report.json`` and ``report.html``.

A field whose default is ``None`` is one of the keys with ``?`` in the documentation: it is left out of the
JSON where it is unknown. A field that may be ``None`` but has no default is always written, as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    AwareDatetime,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from common import metrics
from common.errors import StateError
from common.metrics import Scores, Statistic
from common.plan import Value
from server import page

JSON_NAME, HTML_NAME = "report.json", "report.html"

Interval = tuple[float, float]


class Part(Value):
    """A frozen part of the report; unknown optional keys are left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {key: value for key, value in tree.items() if value is not None or fields[key].is_required()}


P = TypeVar("P", bound=Part)


class Versions(Part):
    """Versions of the software that the server ran."""

    feverfew: str
    flwr: str
    torch: str
    monai: str
    opacus: str


class Round(Part):
    """What one round cost and gave. The AUROC is that of the validation part."""

    round: int
    seconds: float
    sites_asked: int
    sites_valid: int
    train_loss: float | None
    auroc: float | None = None
    auroc_interval: Interval | None = None
    accuracy: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None


class SiteResult(Part):
    """What the final model reaches on test patients; ``None`` where it cannot be told."""

    auroc: float | None
    auroc_interval: Interval | None
    auroc_exact: float | None = None
    accuracy: float | None
    accuracy_interval: Interval | None
    sensitivity: float | None
    sensitivity_interval: Interval | None
    specificity: float | None
    specificity_interval: Interval | None
    calibration_error: float | None
    calibration_error_interval: Interval | None
    loss: float | None = None

    @classmethod
    def of(cls, statistic: Statistic, *, noise_std: float, bins: int) -> Self:
        """Computes every metric of one statistic.

        Args:
            noise_std: standard deviation of the noise in each count; 0 for exact scores.
            bins: those of the calibration error where the statistic is exact scores.
        """
        return cls(**_measures(statistic, noise_std=noise_std, bins=bins))


class Result(SiteResult):
    """The same over the test patients of all sites together, and by site."""

    roc: tuple[tuple[float, float], ...]
    per_site: dict[str, SiteResult]

    @classmethod
    def unknown(cls) -> Result:
        """Returns the result of a run that ended before any test."""
        return cls(
            auroc=None,
            auroc_interval=None,
            accuracy=None,
            accuracy_interval=None,
            sensitivity=None,
            sensitivity_interval=None,
            specificity=None,
            specificity_interval=None,
            calibration_error=None,
            calibration_error_interval=None,
            roc=(),
            per_site={},
        )

    @classmethod
    def merged(
        cls, statistics: Mapping[str, Statistic], *, noise_std: Mapping[str, float], bins: int
    ) -> Result:
        """Computes the metrics of each site and of all of them together.

        Args:
            statistics: by site; exact scores where the site releases them, else noised histograms.
            noise_std: standard deviation of the noise in each count of a site's histogram; sites that
                are left out sent exact ones.
            bins: those of the calibration error of exact scores.
        """
        if not statistics:
            return cls.unknown()
        pooled = metrics.merge(statistics.values())
        pooled_std = math.hypot(*(noise_std.get(site, 0.0) for site in statistics))
        return cls(
            **_measures(pooled, noise_std=pooled_std, bins=bins),
            roc=tuple(metrics.roc(pooled)),
            per_site={
                site: SiteResult.of(statistic, noise_std=noise_std.get(site, 0.0), bins=bins)
                for site, statistic in sorted(statistics.items())
            },
        )


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
    """A site's part in the run; ``story`` tells it in one line."""

    status: str
    role: str
    rounds_valid: int
    rounds_late: int
    rounds_rejected: int
    story: str
    patient_is: str
    offered: int | None = None
    used: int | None = None
    quarantined: int | None = None
    reasons: dict[str, int] | None = None


class Timing(Part):
    """Where the time went. ``training_seconds`` counts the time in which at least one site trained."""

    wall_seconds: float
    training_seconds: float | None
    overhead_seconds: float | None


class Report(Part):
    """Everything that a run tells about itself."""

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
    plan: dict[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Returns the text of ``report.json``."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, directory: Path) -> None:
        """Writes ``report.json`` and ``report.html``; a reader sees an old file or a whole new one."""
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / JSON_NAME, self.to_json())
        _replace(directory / HTML_NAME, page.render(self))

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

    def with_exact(self, exact: Mapping[str, Scores]) -> Report:
        """Returns the report with ``auroc_exact``, which only the simulation harness can know.

        Args:
            exact: by site, the scores of the very cases that the site's released statistic is about.
        """
        per_site = {
            site: result.model_copy(update={"auroc_exact": metrics.auroc(exact[site])})
            if site in exact
            else result
            for site, result in self.final.per_site.items()
        }
        pooled = metrics.auroc(metrics.merge(exact.values())) if exact else None
        final = self.final.model_copy(update={"per_site": per_site, "auroc_exact": pooled})
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


def _measures(statistic: Statistic, *, noise_std: float, bins: int) -> dict[str, Any]:
    return {
        "auroc": metrics.auroc(statistic),
        "auroc_interval": metrics.interval(statistic, noise_std=noise_std),
        "accuracy": metrics.accuracy(statistic),
        "accuracy_interval": metrics.accuracy_interval(statistic, noise_std=noise_std),
        "sensitivity": metrics.sensitivity(statistic),
        "sensitivity_interval": metrics.sensitivity_interval(statistic, noise_std=noise_std),
        "specificity": metrics.specificity(statistic),
        "specificity_interval": metrics.specificity_interval(statistic, noise_std=noise_std),
        "calibration_error": metrics.calibration_error(statistic, noise_std=noise_std, bins=bins),
        "calibration_error_interval": metrics.calibration_error_interval(
            statistic, noise_std=noise_std, bins=bins
        ),
        "loss": metrics.log_loss(statistic),
    }


def _updated(parts: Mapping[str, P], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, P]:
    unknown = set(facts) - set(parts)
    if unknown:
        raise ValueError(f"expected facts about {sorted(parts)}, found {sorted(unknown)}")
    return {
        site: type(part).model_validate({**part.model_dump(), **facts.get(site, {})})
        for site, part in parts.items()
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
