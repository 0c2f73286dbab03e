"""Text that seems to be burned into a picture: a line of small, sharp shapes in its extreme grey.

This is a guess by shape, and called one: it misses text that is faint, large or handwritten, and takes
some rulers and markers for text.
"""

from __future__ import annotations

import numpy as np

MOST_PIXELS = 1200  # along an axis; of a larger picture every second or third pixel is looked at
LEAST_HEIGHT = 5  # pixels; below it no letter can be told from grain
MOST_HEIGHT_FRACTION = 0.08  # of the picture
EXTREME_FRACTIONS = (0.03, 0.15, 0.3)  # of the range of values: what counts as black or white
LEAST_LETTERS = 4
MANY_SHAPES = 100
MOST_SHAPES_FRACTION = 0.005  # of the pixels: more shapes than this are grain
MOST_INK_FRACTION = 0.2  # of the picture in the extreme grey, letters and all


def is_suspected(picture: np.ndarray) -> bool:
    """Says whether a picture seems to show text.

    Args:
        picture: (channels, rows, columns), finite.
    """
    coarser = -(-max(picture.shape[1:]) // MOST_PIXELS)
    grey = picture[:, ::coarser, ::coarser].mean(axis=0)
    low, high = float(grey.min()), float(grey.max())
    margins = [fraction * (high - low) for fraction in EXTREME_FRACTIONS]
    return any(_has_line(grey >= high - margin) or _has_line(grey <= low + margin) for margin in margins)


def _has_line(ink: np.ndarray) -> bool:
    if not 0 < ink.mean() <= MOST_INK_FRACTION:
        return False
    from scipy import ndimage  # takes long to import, and is of use to check alone

    labelled, num_shapes = ndimage.label(ink, structure=np.ones((3, 3)))
    if not LEAST_LETTERS <= num_shapes <= max(MANY_SHAPES, MOST_SHAPES_FRACTION * ink.size):
        return False
    areas = np.bincount(labelled.ravel())[1:]
    boxes = np.array(
        [
            (rows.start, rows.stop, columns.start, columns.stop)
            for rows, columns in ndimage.find_objects(labelled)
        ]
    )
    letters = boxes[_letters(boxes, areas, height=ink.shape[0])]
    return any(_num_beside(letters, one) >= LEAST_LETTERS for one in letters)


def _letters(boxes: np.ndarray, areas: np.ndarray, *, height: int) -> np.ndarray:
    """Returns which shapes are of a letter's size and slenderness, and neither full nor empty; bool."""
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    filled = areas / (heights * widths)
    sized = (heights >= LEAST_HEIGHT) & (heights <= max(LEAST_HEIGHT, MOST_HEIGHT_FRACTION * height))
    shaped = (widths <= 1.5 * heights) & (widths >= 0.15 * heights) & (filled < 0.85) & (filled > 0.15)
    return np.asarray(sized & shaped)


def _num_beside(letters: np.ndarray, one: np.ndarray) -> int:
    """Counts the letters of one line: they stand on one base line, are as high, and follow closely."""
    height = one[1] - one[0]
    heights = letters[:, 1] - letters[:, 0]
    alike = (abs(letters[:, 1] - one[1]) <= 0.2 * height) & (abs(heights - height) <= 0.35 * height)
    line = letters[alike]
    line = line[np.argsort(line[:, 2])]
    gaps = line[1:, 2] - line[:-1, 3]
    close = np.concatenate([[False], (gaps >= 0) & (gaps <= 1.2 * height), [False]])
    breaks = np.flatnonzero(~close)
    return int(np.diff(breaks).max())
