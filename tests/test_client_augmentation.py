from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import nn

from client import clinical, work
from client.augmentation import (
    UNCHANGED,
    RandomCopies,
    affine_maps,
    augmenter_of,
    moved,
    moved_masks,
    noised,
    raised,
)
from client.cohort import Part
from client.noise import Key
from client.training import Trained, batches, case_losses, to_input, train_by_plan
from common import model
from common.augmented import Augmentation
from common.calibration import Mechanism
from common.errors import ConfigError
from common.exchange import Task
from common.plan import DpSgd, Plan
from tests.plans import TINY, plan
from tests.sites import write_site

Images = npt.NDArray[np.float32]

KEY = Key(secret=bytes(range(32)))
NOISELESS = 1e-14
MOVES: dict[str, Any] = {
    "copies": 3,
    "max_shift_fraction": 0.2,
    "max_rotation_degrees": 30.0,
    "max_zoom_fraction": 0.2,
    "flip_axes": [1],
    "max_gamma": 1.5,
    "max_noise_std": 0.05,
}
SMALL: dict[str, Any] = {
    **TINY,
    "training__local_steps": 1,
    "training__expected_batch": 4,
    "training__cases_per_patient": 8,
    "training__augmentation": MOVES,
}
CASES = (1, 3, 2, 4, 1)


def asked(**changes: Any) -> Augmentation:
    still = {"copies": 1, "max_shift_fraction": 0, "max_rotation_degrees": 0, "max_zoom_fraction": 0}
    return Augmentation.model_validate(
        {**still, "flip_axes": [], "max_gamma": 1, "max_noise_std": 0, **changes}
    )


def copies_of(images: torch.Tensor, chosen: Augmentation, *, key: Key = KEY) -> torch.Tensor:
    made, _ = RandomCopies(chosen, key=key)(images, torch.zeros(len(images)))
    return made


def part_of(cases: Sequence[int] = CASES, *, size: int = 8) -> Part:
    """Random images; the numbers are those of the cases of each patient."""
    rng = np.random.default_rng(7)
    bounds = np.cumsum((0, *cases))
    patients = tuple(np.arange(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
    images = rng.integers(0, 256, (bounds[-1], 1, size, size), dtype=np.uint8)
    return Part(
        images=images,
        targets=rng.integers(0, 2, bounds[-1]),
        values=clinical.none(len(images)),
        patients=patients,
    )


def trained(chosen: Plan, part: Part, *, noise: float = NOISELESS, rate: float = 1.0) -> Trained:
    how = Mechanism(sample_rate=rate, noise_multiplier=noise, evaluation_noise_multiplier={})
    return train_by_plan(model.build(chosen), part, plan=chosen, mechanism=how, key=KEY)


def image(rows: int, columns: int) -> Images:
    return np.random.default_rng(3).random((rows, columns), dtype=np.float32)


def maps_of(chosen: Augmentation, size: Sequence[int], **numbers: float) -> torch.Tensor:
    """The map of named numbers in [-1, 1], where 1 is the largest that is asked for."""
    order: tuple[str, ...] = ("right", "down", "turn", "grown", "mirror")
    if len(size) == 3:
        order = ("third", "second", "first", "about_first", "about_second", "about_third", "grown", "mirror")
    drawn = np.minimum([[(numbers.get(name, 0.0) + 1) / 2 for name in order]], np.nextafter(1, 0))
    return affine_maps(drawn, asked=chosen, size=size)


def moved_by(start: Images, chosen: Augmentation, **numbers: float) -> Images:
    """The image or volume moved by named numbers."""
    maps = maps_of(chosen, start.shape, **numbers)
    result: Images = moved(torch.from_numpy(start)[None, None], maps)[0, 0].numpy()
    return result


def test_nothing_drawn_moves_nothing() -> None:
    start = image(6, 10)
    everything = asked(max_shift_fraction=0.5, max_rotation_degrees=180, max_zoom_fraction=0.5)
    np.testing.assert_allclose(moved_by(start, everything), start, atol=1e-6)


def test_shift_is_a_fraction_of_width_and_height_and_repeats_the_border() -> None:
    start, chosen = image(6, 10), asked(max_shift_fraction=0.5)
    two_columns = moved_by(start, chosen, right=2 / 5)
    np.testing.assert_allclose(two_columns[:, :8], start[:, 2:], atol=1e-5)
    np.testing.assert_allclose(two_columns[:, 8:], start[:, [9, 9]], atol=1e-5)
    three_rows = moved_by(start, chosen, down=-1)
    np.testing.assert_allclose(three_rows[3:], start[:3], atol=1e-5)


def test_flip_mirrors_along_its_axis_in_half_of_the_copies() -> None:
    start, sideways, upside = image(6, 10), asked(flip_axes=[1]), asked(flip_axes=[0])
    np.testing.assert_allclose(moved_by(start, sideways, mirror=-1), start[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(moved_by(start, sideways, mirror=1), start, atol=1e-6)
    np.testing.assert_allclose(moved_by(start, upside, mirror=-1), start[::-1], atol=1e-6)
    still = asked(max_shift_fraction=0.1)
    np.testing.assert_allclose(moved_by(start, still, mirror=-1), start, atol=1e-6)
    made = copies_of(torch.from_numpy(start).expand(2000, 1, 6, 10), sideways)
    mirrored = sum(np.allclose(one[0].numpy(), start[:, ::-1], atol=1e-6) for one in made)
    assert abs(mirrored - 1000) < 4 * math.sqrt(500)


@pytest.mark.parametrize("axes", [[0, 1], [0, 2], [0, 1, 2]], ids=str)
def test_flips_along_several_axes_are_tossed_independently(axes: list[int]) -> None:
    size = (4, 5, 6)[: max(2, max(axes) + 1)]
    start = np.random.default_rng(3).random(size, dtype=np.float32)
    made = copies_of(torch.from_numpy(start).expand(4000, 1, *size), asked(flip_axes=axes))[:, 0].numpy()
    total = 0
    for number in range(2 ** len(axes)):
        chosen = [axis for place, axis in enumerate(axes) if number >> place & 1]
        found = int(np.isclose(made, np.flip(start, chosen), atol=1e-5).reshape(4000, -1).all(axis=1).sum())
        expected = 4000 / 2 ** len(axes)
        assert abs(found - expected) < 4 * math.sqrt(expected)
        total += found
    assert total == 4000


def test_rotation_turns_by_degrees() -> None:
    start = image(7, 7)
    quarter = moved_by(start, asked(max_rotation_degrees=90), turn=1)
    other = moved_by(start, asked(max_rotation_degrees=180), turn=-0.5)
    np.testing.assert_allclose(quarter, np.rot90(start), atol=1e-5)
    np.testing.assert_allclose(other, np.rot90(start, -1), atol=1e-5)
    half = moved_by(image(6, 10), asked(max_rotation_degrees=180), turn=1)
    np.testing.assert_allclose(half, image(6, 10)[::-1, ::-1], atol=1e-5)


def test_rotation_of_an_oblong_image_keeps_its_pixels_square() -> None:
    """A quarter turn: what is two pixels right of the middle goes two up, what is one above it one left."""
    start = np.zeros((5, 9), dtype=np.float32)
    start[2, 6] = start[1, 4] = 1
    found = moved_by(start, asked(max_rotation_degrees=90), turn=1)
    assert np.argwhere(found > 0.5).tolist() == [[0, 4], [2, 3]]


def test_zoom_makes_things_larger_or_smaller() -> None:
    ramp = np.tile(np.linspace(-1, 1, 9, dtype=np.float32), (9, 1))
    chosen = asked(max_zoom_fraction=0.5)
    np.testing.assert_allclose(moved_by(ramp, chosen, grown=1), ramp / 1.5, atol=1e-5)
    inner = slice(3, 6)
    np.testing.assert_allclose(moved_by(ramp, chosen, grown=-1)[:, inner], 2 * ramp[:, inner], atol=1e-5)


def test_every_number_is_uniform_between_its_bounds_and_independent_of_the_others() -> None:
    """Read off the maps: the shift is in their last column, rotation and zoom in the first two."""
    chosen = asked(max_shift_fraction=0.25, max_rotation_degrees=40, max_zoom_fraction=0.3)
    drawn = KEY.stream("augmentation").random((5000, 5))
    maps = affine_maps(drawn, asked=chosen, size=(8, 8)).double().numpy()
    found = {
        "right": maps[:, 0, 2] / 0.5,
        "down": maps[:, 1, 2] / 0.5,
        "turn": np.rad2deg(np.arctan2(maps[:, 1, 0], maps[:, 1, 1])) / 40,
        "grown": (1 / np.hypot(maps[:, 1, 0], maps[:, 1, 1]) - 1) / 0.3,
    }
    for values in found.values():
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() <= 1.00001
        assert abs(values.mean()) < 4 * math.sqrt(1 / 3 / 5000)
        assert abs(values.var() - 1 / 3) < 0.02
    assert np.abs(np.corrcoef(list(found.values())) - np.eye(4)).max() < 4 / math.sqrt(5000)


PLACES: dict[str, Any] = {**MOVES, "max_gamma": 1, "max_noise_std": 0}


def test_copies_of_pictures_are_the_golden_ones() -> None:
    """Taken before volumes, masks, gamma and noise were added, which changed no copy of a picture."""
    ramp = torch.arange(2 * 64, dtype=torch.float32).reshape(2, 1, 8, 8) / 127
    made = copies_of(ramp, asked(**PLACES))
    means = [0.23809655, 0.31168017, 0.29672664, 0.66610783, 0.75121927, 0.72782558]
    np.testing.assert_allclose(made.mean(dim=(1, 2, 3)), means, atol=1e-6)
    pixels = [0.09238789, 0.25963378, 0.18100515, 0.54855215, 0.65200239, 0.61760646]
    np.testing.assert_allclose(made[:, 0, 2, 5], pixels, atol=1e-6)
    oblong = torch.from_numpy(np.random.default_rng(3).random((2, 3, 12, 20), dtype=np.float32))
    pixels = [0.00833571, 0.68199468, 0.30637759, 0.12323794, 0.61756177, 0.76611573]
    np.testing.assert_allclose(copies_of(oblong, asked(**PLACES))[:, 1, 3, 17], pixels, atol=1e-6)


def volume() -> Images:
    return np.random.default_rng(4).random((6, 8, 10), dtype=np.float32)


def test_volumes_are_shifted_by_a_fraction_of_each_axis() -> None:
    start, chosen = volume(), asked(max_shift_fraction=0.5)
    np.testing.assert_allclose(moved_by(start, chosen), start, atol=1e-6)
    np.testing.assert_allclose(moved_by(start, chosen, first=2 / 3)[:4], start[2:], atol=1e-5)
    np.testing.assert_allclose(moved_by(start, chosen, second=1 / 4)[:, :7], start[:, 1:], atol=1e-5)
    np.testing.assert_allclose(moved_by(start, chosen, third=-2 / 5)[:, :, 2:], start[:, :, :8], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plane"), [("about_first", (1, 2)), ("about_second", (0, 2)), ("about_third", (0, 1))]
)
def test_volumes_are_turned_about_each_axis(name: str, plane: tuple[int, int]) -> None:
    cube = volume()[:6, :6, :6]
    found = moved_by(cube, asked(max_rotation_degrees=90), **{name: 1})
    np.testing.assert_allclose(found, np.rot90(cube, axes=plane), atol=1e-5)
    half = moved_by(volume(), asked(max_rotation_degrees=180), **{name: 1})
    np.testing.assert_allclose(half, np.flip(volume(), plane), atol=1e-5)


def test_all_rotations_and_a_zoom_of_a_volume_keep_its_voxels_cubes() -> None:
    """In voxels, what is left of the map without the zoom turns without stretching, for any lengths."""
    chosen, size = asked(max_rotation_degrees=170, max_zoom_fraction=0.3), (6, 9, 14)
    drawn = KEY.stream("test").random((50, 8))
    maps = affine_maps(drawn, asked=chosen, size=size).double().numpy()
    lengths = np.array(size[::-1])
    in_voxels = maps[:, :, :3] * lengths[:, None] / lengths
    zooms = 1 + 0.3 * (2 * drawn[:, 6] - 1)
    squares = in_voxels @ in_voxels.transpose(0, 2, 1) * zooms[:, None, None] ** 2
    np.testing.assert_allclose(squares, np.tile(np.eye(3), (50, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(in_voxels) * zooms**3, 1, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (12, 16, 10)], ids=str)
def test_masks_move_with_their_images(size: tuple[int, ...]) -> None:
    """The mask says where the image is bright, before and after, for every copy."""
    mask = torch.zeros((5, *size), dtype=torch.uint8)
    for number, one in enumerate(mask):
        one[4:9, 3 + number : 10 + number] = 1 + number % 2
    images = (mask[:, None] > 0).float()
    made, moved_along = RandomCopies(asked(**{**PLACES, "flip_axes": [0, 1], "copies": 20}), key=KEY)(
        images, mask
    )
    assert moved_along.shape == (100, *size) and moved_along.dtype == torch.uint8
    bright, marked = made[:, 0] > 0.5, moved_along > 0
    overlap = 2 * (bright & marked).flatten(1).sum(1) / (bright.flatten(1).sum(1) + marked.flatten(1).sum(1))
    assert overlap.min() > 0.85 and overlap.mean() > 0.95
    same = (moved_along == mask.repeat_interleave(20, dim=0)).flatten(1).all(1)
    assert same.sum() < 10
    classes = [set(one.unique().tolist()) for one in moved_along.unflatten(0, (5, 20)).flatten(1)]
    assert classes == [{0, 1 + number % 2} for number in range(5)], "a class is never averaged into another"


def test_mask_that_is_turned_a_quarter_is_the_turned_mask() -> None:
    mask = np.random.default_rng(5).integers(0, 200, (7, 7)).astype(np.uint8)
    maps = maps_of(asked(max_rotation_degrees=90), (7, 7), turn=1)
    np.testing.assert_array_equal(moved_masks(torch.from_numpy(mask)[None], maps)[0], np.rot90(mask))


def test_labels_are_repeated_and_not_moved() -> None:
    several = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8)
    _, targets = RandomCopies(asked(**MOVES), key=KEY)(torch.zeros(2, 1, 3, 8), several)
    assert targets.tolist() == several.repeat_interleave(3, dim=0).tolist()


def test_gamma_raises_to_powers_that_are_evenly_spread_between_its_bound_and_its_inverse() -> None:
    made = copies_of(torch.full((4000, 1, 8, 8), 0.5), asked(max_gamma=3))[:, 0, 0, 0].double().numpy()
    exponents = np.log(made) / math.log(0.5)
    assert 1 / 3 <= exponents.min() < 0.335 and 2.97 < exponents.max() <= 3.00001
    assert stats.kstest(np.log(exponents) / math.log(3), "uniform", args=(-1, 2)).pvalue > 1e-4
    found = raised(torch.tensor([[[[0.0, 0.25, 1.0]]]]), exponents=np.array([0.5]))
    np.testing.assert_allclose(found[0, 0, 0], (0, 0.5, 1), atol=1e-6)


def test_noise_is_normal_with_a_level_of_its_own_for_each_copy() -> None:
    made = copies_of(torch.full((500, 1, 40, 40), 0.5), asked(max_noise_std=0.08)).numpy() - 0.5
    levels = made.std(axis=(1, 2, 3))
    assert stats.kstest(levels / 0.08, "uniform").pvalue > 1e-4
    assert stats.kstest((made / levels[:, None, None, None])[:20].ravel(), "norm").pvalue > 1e-4
    normal = np.array([[[[-3.0, 0.0, 3.0]]]], np.float32)
    np.testing.assert_allclose(
        noised(torch.full((1, 1, 1, 3), 0.9), normal, stds=np.array([0.1]))[0, 0, 0], (0.6, 0.9, 1)
    )


def test_noise_owes_nothing_to_the_numbers_of_places_and_levels() -> None:
    made = copies_of(torch.full((200, 1, 8, 8), 0.5), asked(max_noise_std=0.05)).numpy() - 0.5
    made /= made.std(axis=(1, 2, 3), keepdims=True)
    for purpose in ("augmentation", "augmentation of intensities", "noise"):
        other = KEY.stream(purpose).standard_normal(made.shape, dtype=np.float32)
        assert abs(np.corrcoef(made.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(made.size)


def test_gamma_and_noise_move_nothing() -> None:
    images, masks = torch.rand(3, 1, 8, 8), torch.ones(3, 8, 8, dtype=torch.uint8)
    made, along = RandomCopies(asked(max_gamma=2), key=KEY)(images, masks)
    assert torch.equal(along, masks)
    assert torch.equal(made.flatten(1).argsort(1), images.flatten(1).argsort(1))


@pytest.mark.parametrize("size", [(8, 8), (8, 9, 10)], ids=str)
def test_cutting_changes_no_number_of_any_kind(size: tuple[int, ...]) -> None:
    images = torch.rand(7, 2, *size)
    whole, cut = RandomCopies(asked(**MOVES), key=KEY), RandomCopies(asked(**MOVES), key=KEY)
    expected, _ = whole(images, torch.zeros(7))
    parts = [cut(images[start:end], torch.zeros(end - start))[0] for start, end in ((0, 1), (1, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)


def test_masks_reach_the_batch_with_their_copies() -> None:
    masks = np.zeros((3, 8, 8), np.uint8)
    masks[:, 2:6, 1:4] = [[[1]], [[2]], [[3]]]
    part = Part(
        images=(masks[:, None] > 0).astype(np.uint8) * 255,
        targets=masks,
        values=clinical.none(3),
        patients=(np.arange(1), np.arange(1, 3)),
    )
    copies = augmenter_of(asked(flip_axes=[1], copies=4), key=KEY)
    (batch,) = batches(part, part.patients, physical_batch=12, augmenter=copies)
    assert batch.targets.shape == (12, 8, 8) and batch.targets.dtype == torch.uint8
    assert torch.equal(batch.targets > 0, batch.images[:, 0] > 0.5)
    assert batch.targets.flatten(1).amax(1).tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert {tuple(one.any(0).nonzero().flatten().tolist()) for one in batch.targets} == {(1, 2, 3), (4, 5, 6)}
    (plain,) = batches(part, part.patients, physical_batch=12)
    assert torch.equal(plain.targets, torch.from_numpy(masks))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "nothing random; set augmentation to null"),
        ({"flip_axes": [1, 1]}, "flip_axes that increase"),
        ({"flip_axes": [1, 0]}, "flip_axes that increase"),
        ({"flip_axes": [2]}, "flip_axes below 2"),
        ({"flip_axes": [3]}, "flip_axes"),
        ({"max_gamma": 0.5}, "max_gamma"),
        ({"max_noise_std": -1}, "max_noise_std"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], named: str) -> None:
    still = asked(flip_axes=[1]).model_dump() | {"flip_axes": []}
    with pytest.raises(ConfigError) as caught:
        plan(training__augmentation=still | changes)
    assert named in str(caught.value)


@pytest.mark.parametrize("changes", [{"max_gamma": 2}, {"max_noise_std": 0.1}, {"flip_axes": [0]}], ids=str)
def test_one_kind_of_change_is_enough(changes: dict[str, Any]) -> None:
    assert plan(training__augmentation=asked(**changes).model_dump()).training.augmentation == asked(
        **changes
    )


def test_copies_of_a_case_lie_beside_each_other_and_keep_its_label_and_owner() -> None:
    flat = np.repeat(np.arange(6, dtype=np.uint8), 64).reshape(6, 1, 8, 8)
    patients = (np.arange(2), np.arange(2, 6))
    part = Part(images=flat, targets=np.arange(6), values=clinical.none(6), patients=patients)
    copies = augmenter_of(asked(max_shift_fraction=0.3, copies=2), key=KEY)
    (batch,) = batches(part, part.patients, physical_batch=12, augmenter=copies)
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (batch.images.mean(dim=(1, 2, 3)) * 255).round().tolist() == expected
    assert batch.targets.tolist() == expected
    assert batch.owners.tolist() == [0] * 4 + [1] * 8
    assert batch.num_patients == 2


def test_no_augmentation_is_the_cases_themselves() -> None:
    assert augmenter_of(None, key=KEY) is UNCHANGED
    (batch,) = batches(part_of((2, 1)), part_of((2, 1)).patients, physical_batch=8)
    assert torch.equal(batch.images, to_input(part_of((2, 1)).images))


def test_physical_batch_counts_copies() -> None:
    copies = augmenter_of(asked(flip_axes=[1], copies=4), key=KEY)
    part = part_of((1,) * 10)
    sizes = [len(one.images) for one in batches(part, part.patients, physical_batch=12, augmenter=copies)]
    assert sizes == [12, 12, 12, 4]
    assert [
        len(one.images) for one in batches(part, part.patients, physical_batch=15, augmenter=copies)
    ] == sizes


def copies_of_each(chosen: Plan, part: Part) -> torch.Tensor:
    """The augmented images of the first step where every patient is drawn, float64, case by case."""
    assert chosen.training.augmentation is not None
    made = RandomCopies(chosen.training.augmentation, key=KEY)
    images = torch.cat(
        [made(to_input(part.images[[case]]), torch.zeros(1))[0] for own in part.patients for case in own]
    )
    return images.reshape(len(part.images), -1, *images.shape[1:]).double()


def patient_gradient(network: nn.Module, part: Part, own: Any, copies: torch.Tensor) -> tuple[Any, ...]:
    """The gradient of the mean over the patient's cases of the mean over their copies, by plain autograd."""
    means = [
        torch.stack([loss(network, one, int(part.targets[case])) for one in copies[case]]).mean()
        for case in own
    ]
    return torch.autograd.grad(torch.stack(means).mean(), list(network.parameters()))


def loss(network: nn.Module, one: torch.Tensor, label: int) -> torch.Tensor:
    return torch.log1p(torch.exp(-(2 * label - 1) * network(one[None])[0, 0]))


def oracle(chosen: Plan, part: Part) -> npt.NDArray[np.float64]:
    """The update of one step by the book, in float64, one patient at a time."""
    privacy, network, copies = chosen.privacy, model.build(chosen).double(), copies_of_each(chosen, part)
    total = np.zeros(model.num_parameters(network))
    for own in part.patients:
        found = patient_gradient(network, part, own, copies)
        flat = np.concatenate([one.reshape(-1).numpy() for one in found])
        bound = privacy.max_grad_norm if isinstance(privacy, DpSgd) else math.inf
        total += flat * min(1.0, bound / float(np.linalg.norm(flat)))
    return -chosen.training.learning_rate * total / chosen.training.expected_batch


@pytest.mark.parametrize(
    "changes",
    [{"privacy__max_grad_norm": bound} for bound in (0.5, 2.0, 1e6)] + [{"privacy": "none"}],
    ids=["all clipped", "some clipped", "none clipped", "no privacy"],
)
def test_step_is_the_sum_of_patients_mean_gradients_over_all_their_copies_clipped_once(
    changes: dict[str, Any],
) -> None:
    chosen, part = plan(**SMALL, **changes), part_of()
    expected = oracle(chosen, part)
    found = trained(chosen, part).update
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 + 2e-5 * float(np.abs(expected).max()))
    plain = trained(plan(**{**SMALL, "training__augmentation": None}, **changes), part).update
    assert np.abs(plain - found).max() > 0.01 * np.abs(plain).max(), "the copies are others than the cases"


@pytest.mark.parametrize("bound", [0.1, 1.0])
def test_one_more_patient_moves_the_sum_by_at_most_the_clipping_bound(bound: float) -> None:
    chosen = plan(**SMALL, privacy__max_grad_norm=bound)
    whole = part_of()
    without = replace(whole, patients=whole.patients[:-1])
    difference = trained(chosen, whole).update - trained(chosen, without).update
    moved_sum = difference / chosen.training.learning_rate * chosen.training.expected_batch
    assert np.linalg.norm(moved_sum) == pytest.approx(bound, rel=1e-4), "it is clipped, and once"


@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
@pytest.mark.parametrize("physical_batch", [3, 16])
def test_cutting_a_step_changes_no_copy(physical_batch: int, privacy: str) -> None:
    changes = {**SMALL, "training__local_steps": 3, "privacy": privacy}
    whole = trained(plan(**changes), part_of(), noise=1.0, rate=0.7)
    cut = trained(plan(**changes, training__physical_batch=physical_batch), part_of(), noise=1.0, rate=0.7)
    np.testing.assert_allclose(cut.update, whole.update, rtol=1e-4, atol=1e-6)
    assert cut.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


def test_same_key_gives_the_same_copies_and_every_step_others() -> None:
    chosen = plan(**{**SMALL, "training__local_steps": 4})
    assert trained(chosen, part_of()).update.tobytes() == trained(chosen, part_of()).update.tobytes()
    copies = RandomCopies(asked(**MOVES), key=KEY)
    images = to_input(part_of().images)
    (first, _), (second, _) = copies(images, images), copies(images, images)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert (first[0::3] - first[1::3]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_loss_of_a_patient_is_the_mean_over_the_copies() -> None:
    chosen, part = plan(**SMALL, privacy="none"), part_of()
    network, copies = model.build(chosen).double(), copies_of_each(chosen, part)
    means = [
        case_losses(network(copies[own].flatten(0, 1)), repeated(part, own)).mean().item()
        for own in part.patients
    ]
    assert trained(chosen, part).train_loss == pytest.approx(sum(means) / 4, rel=1e-5)


def repeated(part: Part, own: Any) -> torch.Tensor:
    return torch.from_numpy(part.targets[own].repeat(MOVES["copies"]))


def test_evaluation_sees_the_cases_as_they_are(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north")
    scores = []
    for augmentation in (None, MOVES):
        chosen = plan(**{**SMALL, "training__augmentation": augmentation}, privacy="none")
        network = model.build(chosen)
        task = Task(
            run=f"run-{len(scores)}",
            plan_hash=chosen.hash,
            server_round=chosen.rounds,
            purpose="evaluate",
            part="test",
            parameters=model.flatten(network),
        )
        scores.append(work.evaluate(site, chosen, task, network=network).arrays["scores"])
    np.testing.assert_array_equal(scores[0], scores[1])
