"""A case between two steps of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A case on its way through the steps.

    Attributes:
        images: for each input float32, (1 or 3, *spatial); grey has one channel until the end.
        mask: uint8, (*spatial), or ``None``.
        spacing_mm: along each spatial axis; ``None`` where the files have none.
    """

    images: tuple[np.ndarray, ...]
    mask: np.ndarray | None
    spacing_mm: tuple[float, ...] | None
