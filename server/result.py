"""What the final model reaches on test patients: every measure, at each site and of all sites together.

A field whose default is ``None`` is one of the keys with ``?`` in the documentation: it is left out of the
JSON where it is unknown. A field that may be ``None`` but has no default is always written, as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer

from common import dice, measure, metrics
from common.asked import Target
from common.measure import Exact, Headline, Statistic
from common.metrics import Histogram, Scores
from common.value import Value

Interval = tuple[float, float]


class Part(Value):
    """A frozen part of the report; unknown optional keys are left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {key: value for key, value in tree.items() if value is not None or fields[key].is_required()}


class SiteResult(Part):
    """What the final model reaches on test patients; ``None`` where it cannot be told.

    ``dice`` and its like are of plans about masks, all others of plans about classes and labels. Values by
    class are in the order of the plan's classes; those of masks leave out the background.
    """

    auroc: float | None
    auroc_interval: Interval | None
    auroc_exact: float | None = None
    auroc_by_class: tuple[float | None, ...] | None = None
    accuracy: float | None
    accuracy_interval: Interval | None
    sensitivity: float | None
    sensitivity_interval: Interval | None
    specificity: float | None
    specificity_interval: Interval | None
    calibration_error: float | None
    calibration_error_interval: Interval | None
    loss: float | None = None
    dice: float | None = None
    dice_interval: Interval | None = None
    dice_exact: float | None = None
    dice_by_class: tuple[float, ...] | None = None

    @classmethod
    def of(cls, statistic: Statistic, *, noise_std: float, bins: int, target: Target = "class") -> Self:
        """Computes every measure of one statistic.

        Args:
            noise_std: standard deviation of the noise in each number; 0 for exact scores.
            bins: those of the calibration error where the statistic is exact scores.
            target: the plan's.
        """
        return cls(**_measures(statistic, noise_std=noise_std, bins=bins, target=target))

    def value(self, headline: Headline) -> float | None:
        """Returns the released headline number."""
        found: float | None = getattr(self, headline.key)
        return found

    def interval(self, headline: Headline) -> Interval | None:
        """Returns the 95 % interval of the headline number."""
        found: Interval | None = getattr(self, f"{headline.key}_interval")
        return found

    def exact(self, headline: Headline) -> float | None:
        """Returns the exact headline number; ``None`` outside of simulations."""
        found: float | None = getattr(self, f"{headline.key}_exact")
        return found

    def with_exact(self, exact: Exact, *, target: str) -> Self:
        """Returns the result with the exact headline number beside the released one."""
        key = measure.headline(target).key
        return self.model_copy(update={f"{key}_exact": measure.value(exact)})


UNKNOWN: Mapping[str, None] = dict.fromkeys(
    name for name, field in SiteResult.model_fields.items() if field.is_required()
)


class Result(SiteResult):
    """The same over the test patients of all sites together, and by site."""

    roc: tuple[tuple[float, float], ...]
    per_site: dict[str, SiteResult]

    @classmethod
    def merged(
        cls,
        statistics: Mapping[str, Statistic],
        *,
        noise_std: Mapping[str, float],
        bins: int,
        target: Target = "class",
    ) -> Result:
        """Computes the measures of each site and of all of them together; nothing of no site.

        Args:
            statistics: by site; exact scores where the site releases them, else noised ones.
            noise_std: standard deviation of the noise in each number of a site's statistic; sites that
                are left out sent exact ones.
            bins: those of the calibration error of exact scores.
            target: the plan's.
        """
        if not statistics:
            return cls(**UNKNOWN, roc=(), per_site={})
        pooled = measure.merge(statistics)
        pooled_std = math.hypot(*(noise_std.get(site, 0.0) for site in sorted(statistics)))
        return cls(
            **_measures(pooled, noise_std=pooled_std, bins=bins, target=target),
            roc=tuple(metrics.roc(pooled)) if isinstance(pooled, Histogram | Scores) else (),
            per_site={
                site: SiteResult.of(statistic, noise_std=noise_std.get(site, 0.0), bins=bins, target=target)
                for site, statistic in sorted(statistics.items())
            },
        )


def _measures(statistic: Statistic, *, noise_std: float, bins: int, target: Target) -> dict[str, Any]:
    if isinstance(statistic, Histogram | Scores):
        return _of_scores(statistic, noise_std=noise_std, bins=bins, target=target)
    return {
        **UNKNOWN,
        "dice": dice.mean(statistic),
        "dice_interval": dice.interval(statistic, noise_std=noise_std),
        "dice_by_class": dice.by_class(statistic),
    }


def _of_scores(
    statistic: Histogram | Scores, *, noise_std: float, bins: int, target: Target
) -> dict[str, Any]:
    return {
        "auroc": metrics.auroc(statistic),
        "auroc_interval": metrics.interval(statistic, noise_std=noise_std),
        "auroc_by_class": metrics.auroc_by_class(statistic) if statistic.num_heads > 1 else None,
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
        "loss": metrics.log_loss(statistic, several_labels=target == "labels"),
    }
