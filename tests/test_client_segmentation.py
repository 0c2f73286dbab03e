from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from client import segmentation

SHAPES = [(6, 4), (4, 6, 4)]


def cases(
    size: tuple[int, ...], *, num_cases: int = 5, num_classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, double, and masks; of the last case the mask is empty."""
    generator = torch.Generator().manual_seed(len(size))
    outputs = 2 * torch.randn(num_cases, num_classes, *size, generator=generator, dtype=torch.double)
    targets = torch.randint(0, num_classes, (num_cases, *size), generator=generator, dtype=torch.uint8)
    targets[-1] = 0
    return outputs, targets


def logits_of(answer: torch.Tensor, *, num_classes: int = 3, sure: float = 50.0) -> torch.Tensor:
    """Logits of a network that is sure of an answer: (cases, *size) -> (cases, classes, *size)."""
    return sure * functional.one_hot(answer.long(), num_classes).movedim(-1, 1).double()


# --- loss ---------------------------------------------------------------------------------------------------


def loss_by_hand(outputs: np.ndarray, target: np.ndarray) -> float:
    """One case, voxel by voxel."""
    num_classes, places = len(outputs), list(np.ndindex(target.shape))
    entropy, overlap, size = 0.0, np.zeros(num_classes), np.zeros(num_classes)
    for place in places:
        own = np.exp(outputs[(slice(None), *place)])
        own /= own.sum()
        entropy -= math.log(own[target[place]]) / len(places)
        size += own
        size[target[place]] += 1
        overlap[target[place]] += own[target[place]]
    dice = (2 * overlap[1:] + 1) / (size[1:] + 1)
    return entropy + 1 - float(dice.mean())


@pytest.mark.parametrize("size", SHAPES)
def test_loss_is_cross_entropy_and_one_minus_soft_dice_of_each_case(size: tuple[int, ...]) -> None:
    outputs, targets = cases(size)
    found = segmentation.case_losses(outputs, targets)
    expected = [loss_by_hand(*pair) for pair in zip(outputs.numpy(), targets.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("size", SHAPES)
def test_loss_and_gradient_of_a_case_are_the_same_whatever_the_others_are(size: tuple[int, ...]) -> None:
    outputs, targets = cases(size)
    outputs.requires_grad_()
    losses = segmentation.case_losses(outputs, targets)
    (together,) = torch.autograd.grad(losses.sum(), outputs)
    order = torch.tensor([3, 0, 4])
    chosen = outputs.detach()[order].requires_grad_()
    fewer = segmentation.case_losses(chosen, targets[order])
    (apart,) = torch.autograd.grad(fewer.sum(), chosen)
    torch.testing.assert_close(fewer, losses[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(apart, together[order], rtol=1e-12, atol=1e-15)


def test_gradient_is_that_of_finite_differences() -> None:
    outputs, targets = cases((3, 2))
    assert torch.autograd.gradcheck(lambda x: segmentation.case_losses(x, targets), outputs.requires_grad_())


def test_loss_is_zero_where_the_answer_is_right_and_sure_and_never_negative() -> None:
    outputs, targets = cases((4, 6, 4))
    right = segmentation.case_losses(logits_of(targets), targets)
    torch.testing.assert_close(right, torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert (segmentation.case_losses(outputs, targets) > 0).all()


def test_a_class_that_is_nowhere_in_the_mask_still_has_a_gradient() -> None:
    outputs, targets = cases((4, 6, 4))
    outputs.requires_grad_()
    segmentation.case_losses(outputs, targets)[-1].backward()
    assert outputs.grad is not None and (outputs.grad[-1, 1:] > 0).all()


def test_loss_of_float32_logits_is_float32() -> None:
    outputs, targets = cases((4, 4))
    assert segmentation.case_losses(outputs.float(), targets).dtype == torch.float32


# --- Dice ---------------------------------------------------------------------------------------------------


def dice_by_hand(answer: np.ndarray, truth: np.ndarray, number: int) -> float:
    first = {place for place in np.ndindex(answer.shape) if answer[place] == number}
    second = {place for place in np.ndindex(truth.shape) if truth[place] == number}
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0


@pytest.mark.parametrize("size", SHAPES)
def test_dice_of_a_case_is_twice_the_overlap_over_the_sizes(size: tuple[int, ...]) -> None:
    outputs, targets = cases(size)
    found = segmentation.case_dice(outputs, targets)
    answers = outputs.numpy().argmax(axis=1)
    expected = [
        [dice_by_hand(answer, truth, number) for number in (1, 2)]
        for answer, truth in zip(answers, targets.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.dtype == np.float64


def test_dice_is_one_where_the_answer_is_the_mask_and_zero_where_it_is_another_class() -> None:
    truth = torch.tensor([[[1, 1], [2, 0]]], dtype=torch.uint8)
    other = torch.tensor([[[2, 2], [1, 0]]], dtype=torch.uint8)
    assert segmentation.case_dice(logits_of(truth), truth).tolist() == [[1.0, 1.0]]
    assert segmentation.case_dice(logits_of(other), truth).tolist() == [[0.0, 0.0]]


def test_a_class_in_neither_mask_nor_answer_has_a_dice_of_one_and_in_one_of_them_of_zero() -> None:
    empty = torch.zeros(1, 2, 2, dtype=torch.uint8)
    first = torch.tensor([[[1, 0], [0, 0]]], dtype=torch.uint8)
    assert segmentation.case_dice(logits_of(empty), empty).tolist() == [[1.0, 1.0]]
    assert segmentation.case_dice(logits_of(first), empty).tolist() == [[0.0, 1.0]]
    assert segmentation.case_dice(logits_of(empty), first).tolist() == [[0.0, 1.0]]


def test_case_with_undefined_outputs_has_a_dice_all_the_same() -> None:
    """An error would tell that it is there; whoever chooses the parameters could ask for that."""
    outputs, targets = cases((4, 6, 4))
    expected = segmentation.case_dice(outputs, targets)
    outputs[1] = 5.0
    outputs[1, 1:] = math.nan
    outputs[2, 1] = math.inf
    found = segmentation.case_dice(outputs, targets)
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
    np.testing.assert_array_equal(found[[0, 3, 4]], expected[[0, 3, 4]])
    assert found[1].tolist() == [0.0, 0.0], "what is undefined counts as 0, and background as 5"


def test_dice_of_a_patient_is_the_mean_over_the_cases_whoever_they_stand_between() -> None:
    dice = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.4]])
    found = segmentation.patient_dice(dice, patients=[np.array([0, 2]), np.array([1])])
    np.testing.assert_allclose(found.dice, [[0.5, 0.2], [0.5, 0.5]])


def test_part_without_patients_has_the_dice_of_nobody() -> None:
    assert segmentation.patient_dice(np.zeros((0, 2)), patients=[]).dice.shape == (0, 2)
