"""The bins of released scores: the same for every plan, site and model, since data must not choose them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Bins are equally wide in asinh(logit / 1.5), over [-2.5, 2.5]: 10 of them have their edges at logits of 0,
# +-0.8, +-1.8, +-3.2 and +-5.4. Fine about 0, where a shy model's scores lie, and still apart at 0.996, where
# a sure model's pile up in the outermost of equally wide bins; chosen on models simulated over such scales.
_LOGIT_SCALE, _REACH = 1.5, 2.5


def bin_indices(scores: npt.ArrayLike, bins: int) -> npt.NDArray[np.int64]:
    """Returns the bin of each score, 0 to ``bins`` - 1; a function of the score and nothing else.

    Equally wide in asinh(logit / 1.5); the outermost bins reach to 0 and 1. With an even number of bins 0.5
    is an edge.

    >>> bin_indices([0.0, 0.02, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0], 10).tolist()
    [0, 1, 3, 5, 6, 7, 8, 9]
    """
    probs = np.asarray(scores, dtype=np.float64)
    with np.errstate(divide="ignore"):  # 0 and 1 have infinite logits, which belong to the outermost bins
        place = np.arcsinh((np.log(probs) - np.log1p(-probs)) / _LOGIT_SCALE) / _REACH
    indices: npt.NDArray[np.int64] = np.floor((np.clip(place, -1, 1) + 1) / 2 * bins).astype(np.int64)
    return np.minimum(indices, bins - 1)


def bin_edges(bins: int) -> Floats:
    """Returns float64 (bins + 1,): the scores between which the bins lie, from 0 to 1.

    >>> bin_edges(10).round(3).tolist()
    [0.0, 0.004, 0.039, 0.146, 0.314, 0.5, 0.686, 0.854, 0.961, 0.996, 1.0]
    """
    places = np.linspace(-1, 1, bins + 1)[1:-1]
    return np.concatenate([[0.0], _probs(places), [1.0]])


def bin_centres(bins: int) -> Floats:
    """Returns float64 (bins,): the score in the middle of each bin, by which the bin is judged."""
    return _probs((np.arange(bins) + 0.5) * 2 / bins - 1)


def _probs(places: Floats) -> Floats:
    logits = _LOGIT_SCALE * np.sinh(_REACH * places)
    probs: Floats = 0.5 * (1 + np.tanh(logits / 2))
    return probs
