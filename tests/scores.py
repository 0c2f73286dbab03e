"""Scores of two classes, as tests write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.metrics import Scores


def binary(
    scores: Sequence[float], targets: Sequence[float], weights: Sequence[float] | None = None
) -> Scores:
    """Returns statistics of cases with one head; each weighs 1 unless said otherwise."""
    return Scores(
        scores=np.array(scores)[:, None],
        targets=np.array(targets)[:, None],
        weights=np.ones(len(scores)) if weights is None else np.array(weights),
    )
