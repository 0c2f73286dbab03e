"""What segmentation asks of training and evaluation: a loss and a Dice for each case by itself.

Nothing is ever pooled over cases: the Dice of a batch would make one patient's gradient depend on the
others, and no clip could bound what a patient does.

Source: Milletari, Navab, Ahmadi (2016), V-Net (the Dice loss); Dice (1945), Measures of the Amount of
Ecologic Association Between Species.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from common.dice import DiceScores

Floats = npt.NDArray[np.float64]

_SMOOTH = 1.0
"""Voxels added to overlap and sizes, so that a class that is nowhere has a Dice of 1 and a gradient."""


def case_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns each case's mean cross-entropy, in nats, and 1 - its mean soft Dice: float32, (cases,), >= 0.

    Cross-entropy alone is content with background everywhere; Dice alone tells nothing where both are empty.

    Args:
        outputs: logits, (cases, classes, *size).
        targets: uint8, (cases, *size), the number of each voxel's class.
    """
    numbers = targets.long()
    entropy = functional.cross_entropy(outputs, numbers, reduction="none").flatten(1).mean(dim=1)
    shown = functional.one_hot(numbers, outputs.shape[1]).movedim(-1, 1)[:, 1:].flatten(2).to(outputs.dtype)
    probs = outputs.softmax(dim=1)[:, 1:].flatten(2)
    overlap = 2 * (probs * shown).sum(dim=2) + _SMOOTH
    dice = overlap / (probs.sum(dim=2) + shown.sum(dim=2) + _SMOOTH)
    return entropy + (1 - dice.mean(dim=1))


def case_dice(outputs: torch.Tensor, targets: torch.Tensor) -> Floats:
    """Returns each case's Dice by class, without the background: float64, (cases, classes - 1), in [0, 1].

    A voxel has the class of its largest logit. A class that is neither in the mask nor in the answer has a
    Dice of 1. A NaN logit counts as 0: an exception would itself be a release.

    Args:
        outputs: logits, (cases, classes, *size).
        targets: uint8, (cases, *size).
    """
    answers = outputs.nan_to_num(nan=0.0).argmax(dim=1)
    by_class = [_overlap(answers == number, targets == number) for number in range(1, outputs.shape[1])]
    return torch.stack(by_class, dim=1).numpy()


def _overlap(answer: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    both = (answer & truth).flatten(1).sum(dim=1).double()
    sizes = (answer.flatten(1).sum(dim=1) + truth.flatten(1).sum(dim=1)).double()
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)


def patient_dice(dice: Floats, *, patients: Sequence[npt.NDArray[np.int64]]) -> DiceScores:
    """Returns the Dice of each patient: the mean over the patient's cases, so many images count as one.

    Args:
        dice: float64, (cases, classes - 1), see ``case_dice``.
        patients: for each patient the indices of their cases.
    """
    means = [dice[cases].mean(axis=0) for cases in patients]
    return DiceScores(dice=np.array(means).reshape(len(patients), dice.shape[1]))
