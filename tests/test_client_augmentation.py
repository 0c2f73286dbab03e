from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from client import work
from client.augmentation import UNCHANGED, RandomCopies, affine_maps, augmenter_of, moved
from client.cohort import Part
from client.noise import Key
from client.training import Trained, batches, case_losses, to_input, train_by_plan
from common import model
from common.calibration import Mechanism
from common.exchange import Task
from common.plan import Augmentation, DpSgd, Plan
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
    "flip": True,
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
    return Augmentation.model_validate({**still, "flip": False, **changes})


def part_of(cases: Sequence[int] = CASES, *, size: int = 8) -> Part:
    """Random images; the numbers are those of the cases of each patient."""
    rng = np.random.default_rng(7)
    bounds = np.cumsum((0, *cases))
    patients = tuple(np.arange(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
    images = rng.integers(0, 256, (bounds[-1], 1, size, size), dtype=np.uint8)
    return Part(images=images, labels=rng.integers(0, 2, bounds[-1]), patients=patients)


def trained(chosen: Plan, part: Part, *, noise: float = NOISELESS, rate: float = 1.0) -> Trained:
    how = Mechanism(sample_rate=rate, noise_multiplier=noise, evaluation_noise_multiplier={})
    return train_by_plan(model.build(chosen), part, plan=chosen, mechanism=how, key=KEY)


def image(rows: int, columns: int) -> Images:
    return np.random.default_rng(3).random((rows, columns), dtype=np.float32)


def moved_by(start: Images, chosen: Augmentation, **numbers: float) -> Images:
    """The image moved by named numbers in [-1, 1], where 1 is the largest that is asked for."""
    order = ("right", "down", "turn", "grown", "mirror")
    drawn = np.array([[(numbers.get(name, 0.0) + 1) / 2 for name in order]])
    maps = affine_maps(drawn, asked=chosen, aspect=start.shape[0] / start.shape[1])
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


def test_flip_mirrors_left_and_right_in_half_of_the_copies() -> None:
    start = image(6, 10)
    np.testing.assert_allclose(moved_by(start, asked(flip=True), mirror=-1), start[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(moved_by(start, asked(flip=True), mirror=1), start, atol=1e-6)
    still = asked(max_shift_fraction=0.1)
    np.testing.assert_allclose(moved_by(start, still, mirror=-1), start, atol=1e-6)
    copies = RandomCopies(asked(flip=True), stream=KEY.stream("augmentation"))
    made = copies(torch.from_numpy(start).expand(2000, 1, 6, 10))
    mirrored = sum(np.allclose(one[0].numpy(), start[:, ::-1], atol=1e-6) for one in made)
    assert abs(mirrored - 1000) < 4 * math.sqrt(500)


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
    maps = affine_maps(drawn, asked=chosen, aspect=1.0).double().numpy()
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


def test_copies_of_a_case_lie_beside_each_other_and_keep_its_label_and_owner() -> None:
    flat = np.repeat(np.arange(6, dtype=np.uint8), 64).reshape(6, 1, 8, 8)
    part = Part(images=flat, labels=np.arange(6), patients=(np.arange(2), np.arange(2, 6)))
    copies = augmenter_of(asked(max_shift_fraction=0.3, copies=2), stream=KEY.stream("augmentation"))
    (batch,) = batches(part, part.patients, physical_batch=12, augmenter=copies)
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (batch.images.mean(dim=(1, 2, 3)) * 255).round().tolist() == expected
    assert batch.targets.tolist() == expected
    assert batch.owners.tolist() == [0] * 4 + [1] * 8
    assert batch.num_patients == 2


def test_no_augmentation_is_the_cases_themselves() -> None:
    assert augmenter_of(None, stream=KEY.stream("augmentation")) is UNCHANGED
    (batch,) = batches(part_of((2, 1)), part_of((2, 1)).patients, physical_batch=8)
    assert torch.equal(batch.images, to_input(part_of((2, 1)).images))


def test_physical_batch_counts_copies() -> None:
    copies = augmenter_of(asked(flip=True, copies=4), stream=KEY.stream("augmentation"))
    part = part_of((1,) * 10)
    sizes = [len(one.images) for one in batches(part, part.patients, physical_batch=12, augmenter=copies)]
    assert sizes == [12, 12, 12, 4]
    assert [
        len(one.images) for one in batches(part, part.patients, physical_batch=15, augmenter=copies)
    ] == sizes


def copies_of_each(chosen: Plan, part: Part) -> torch.Tensor:
    """The augmented images of the first step where every patient is drawn, float64, case by case."""
    assert chosen.training.augmentation is not None
    made = RandomCopies(chosen.training.augmentation, stream=KEY.stream("augmentation"))
    images = torch.cat([made(to_input(part.images[[case]])) for own in part.patients for case in own])
    return images.reshape(len(part.images), -1, *images.shape[1:]).double()


def patient_gradient(network: nn.Module, part: Part, own: Any, copies: torch.Tensor) -> tuple[Any, ...]:
    """The gradient of the mean over the patient's cases of the mean over their copies, by plain autograd."""
    means = [
        torch.stack([loss(network, one, int(part.labels[case])) for one in copies[case]]).mean()
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
    without = Part(images=whole.images, labels=whole.labels, patients=whole.patients[:-1])
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
    copies = RandomCopies(asked(**MOVES), stream=KEY.stream("augmentation"))
    images = to_input(part_of().images)
    first, second = copies(images), copies(images)
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
    return torch.from_numpy(part.labels[own].repeat(MOVES["copies"]))


def test_evaluation_sees_the_cases_as_they_are(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north")
    scores = []
    for augmentation in (None, MOVES):
        chosen = plan(**{**SMALL, "training__augmentation": augmentation}, privacy="none")
        network = model.build(chosen)
        task = Task(
            run="r",
            plan_hash=chosen.hash,
            server_round=1,
            purpose="evaluate",
            part="test",
            parameters=model.flatten(network),
        )
        scores.append(work.evaluate(site, chosen, task, network=network).arrays["scores"])
    np.testing.assert_array_equal(scores[0], scores[1])
