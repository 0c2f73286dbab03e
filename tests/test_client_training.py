from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client import clinical
from client.cohort import Part
from client.noise import Key
from client.training import (
    Batch,
    PoissonSampler,
    Trained,
    batches,
    case_losses,
    patient_means,
    to_input,
    train_by_plan,
)
from common import model
from common.calibration import Mechanism
from common.plan import DpSgd, Plan
from tests.plans import TINY, plan

Floats = npt.NDArray[np.float64]

KEY = Key(secret=bytes(range(32)))
NOISELESS = 1e-14
SMALL: dict[str, Any] = {
    **TINY,
    "training__local_steps": 1,
    "training__expected_batch": 4,
    "training__cases_per_patient": 8,
}


def part_of(cases: tuple[int, ...] = (1, 3, 2, 4, 1), *, num_classes: int = 2, size: int = 8) -> Part:
    """Random images; the numbers are those of the cases of each patient."""
    rng = np.random.default_rng(7)
    bounds = np.cumsum((0, *cases))
    patients = tuple(np.arange(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
    images = rng.integers(0, 256, (bounds[-1], 1, size, size), dtype=np.uint8)
    targets = rng.integers(0, num_classes, bounds[-1])
    return Part(images=images, targets=targets, values=clinical.none(len(images)), patients=patients)


def mechanism(noise_multiplier: float = NOISELESS, *, sample_rate: float = 1.0) -> Mechanism:
    return Mechanism(
        sample_rate=sample_rate, noise_multiplier=noise_multiplier, evaluation_noise_multiplier={}
    )


def trained(asked: Plan, part: Part, how: Mechanism | None = None, *, key: Key = KEY) -> Trained:
    return train_by_plan(model.build(asked), part, plan=asked, mechanism=how or mechanism(), key=key)


def sampler(cases_per_patient: int) -> PoissonSampler:
    """A sampler that draws every patient."""
    return PoissonSampler(
        sample_rate=1.0,
        cases_per_patient=cases_per_patient,
        sampling=KEY.stream("sampling"),
        choosing=KEY.stream("cases"),
    )


def oracle(asked: Plan, part: Part, *, sample_rate: float = 1.0, bad: tuple[int, ...] = ()) -> Floats:
    """The update by the book, in float64: one patient at a time with plain autograd, SGD written out."""
    settings, privacy = asked.training, asked.privacy
    network = model.build(asked).double().train()
    parameters = list(network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    sampling = KEY.stream("sampling")
    for _ in range(settings.local_steps):
        summed = [torch.zeros_like(parameter) for parameter in parameters]
        for number, is_in in enumerate(sampling.random(len(part.patients)) < sample_rate):
            if is_in and number not in bad:
                gradients = patient_gradient(network, part, number)
                norm = math.sqrt(sum(float((one**2).sum()) for one in gradients))
                factor = min(1.0, privacy.max_grad_norm / norm) if isinstance(privacy, DpSgd) else 1.0
                summed = [total + factor * one for total, one in zip(summed, gradients, strict=True)]
        with torch.no_grad():
            for own, total, past, origin in zip(parameters, summed, velocity, start, strict=True):
                gradient = total / settings.expected_batch + settings.proximal_mu * (own - origin)
                gradient += settings.weight_decay * own
                past.mul_(settings.momentum).add_(gradient)
                own.sub_(settings.learning_rate * past)
    moved = [(own.detach() - origin).reshape(-1) for own, origin in zip(parameters, start, strict=True)]
    return torch.cat(moved).numpy()


def patient_gradient(network: nn.Module, part: Part, number: int) -> tuple[torch.Tensor, ...]:
    """The gradient of the mean loss over a patient's cases, written out from the definition of the loss."""
    losses = []
    for case in part.patients[number]:
        image = torch.from_numpy(part.images[case]).double() / 255
        logits = network(image[None])[0]
        if len(logits) == 1:
            sign = 2 * int(part.targets[case]) - 1
            losses.append(torch.log1p(torch.exp(-sign * logits[0])))
        else:
            losses.append(torch.logsumexp(logits, 0) - logits[part.targets[case]])
    return torch.autograd.grad(torch.stack(losses).mean(), list(network.parameters()))


def close(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7 + 2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("clip", [1.0, 3.0, 1e6], ids=["all clipped", "some clipped", "none clipped"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_step_is_the_noised_sum_of_patient_gradients_clipped_once(clip: float, num_classes: int) -> None:
    classes = ("a", "b", "c")[:num_classes]
    asked = plan(**SMALL, classes=classes, privacy__max_grad_norm=clip)
    part = part_of(num_classes=num_classes)
    close(trained(asked, part).update, oracle(asked, part))


def test_some_patients_are_clipped_and_some_are_not_in_the_test_above() -> None:
    network, part = model.build(plan(**SMALL)).double(), part_of()
    norms = [
        math.sqrt(sum(float((one**2).sum()) for one in patient_gradient(network, part, number)))
        for number in range(len(part.patients))
    ]
    assert 1.0 < min(norms) < 3.0 < max(norms)


@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__momentum": 0.9},
        {"training__weight_decay": 0.1},
        {"training__proximal_mu": 0.7},
        {"training__momentum": 0.5, "training__weight_decay": 0.2, "training__proximal_mu": 0.3},
    ],
    ids=["plain", "momentum", "weight decay", "proximal term", "all"],
)
def test_round_without_noise_is_sgd_on_the_sampled_patients(privacy: str, changes: dict[str, Any]) -> None:
    """FedProx adds mu (w - w_received) to every gradient; momentum and weight decay as in torch's SGD."""
    asked = plan(**(SMALL | {"privacy": privacy, "training__local_steps": 5} | changes))
    if privacy == "dp_sgd":
        asked = plan(**(SMALL | {"training__local_steps": 5, "privacy__max_grad_norm": 1e6} | changes))
        asked_noise = mechanism(1e-14, sample_rate=0.5)
    else:
        asked_noise = mechanism(0.0, sample_rate=0.5)
    close(trained(asked, part_of(), asked_noise).update, oracle(asked, part_of(), sample_rate=0.5))


def test_options_of_the_test_above_all_matter() -> None:
    base: dict[str, Any] = SMALL | {"privacy": "none", "training__local_steps": 5}
    options = [
        {},
        {"training__momentum": 0.9},
        {"training__weight_decay": 0.1},
        {"training__proximal_mu": 0.7},
    ]
    updates = [oracle(plan(**(base | one)), part_of(), sample_rate=0.5) for one in options]
    for first in range(len(updates)):
        for second in range(first):
            assert np.abs(updates[first] - updates[second]).max() > 0.01 * np.abs(updates[0]).max()


@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
@pytest.mark.parametrize("physical_batch", [1, 3, 5])
def test_physical_batch_changes_nothing(physical_batch: int, privacy: str) -> None:
    changes: dict[str, Any] = SMALL | {"privacy": privacy, "training__local_steps": 3}
    whole = trained(plan(**changes), part_of(), mechanism(1.0, sample_rate=0.7))
    cut = plan(**changes, training__physical_batch=physical_batch)
    parts = train_by_plan(
        model.build(cut), part_of(), plan=cut, mechanism=mechanism(1.0, sample_rate=0.7), key=KEY
    )
    np.testing.assert_allclose(parts.update, whole.update, rtol=1e-4, atol=1e-6)
    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
def test_divisor_is_the_expected_batch_and_not_the_actual_one(privacy: str) -> None:
    """Five patients are sampled; half the expected batch moves the model twice as far."""
    small = trained(plan(**SMALL, privacy=privacy), part_of())
    large = trained(plan(**(SMALL | {"privacy": privacy, "training__expected_batch": 8})), part_of())
    np.testing.assert_allclose(small.update, 2 * large.update, rtol=1e-3, atol=1e-7)
    assert small.train_loss == pytest.approx(2 * (large.train_loss or 0), rel=1e-6)


def constant_loss(asked: Plan) -> nn.Module:
    """A network whose outputs are all zero, so that every patient's loss is log 2."""
    network = model.build(asked)
    model.load(network, np.zeros(model.num_parameters(network), dtype=np.float32))
    return network


def num_sampled(asked: Plan, part: Part, *, rate: float, key: Key) -> float:
    """The number of patients in all steps of a round, read off the exact loss of a constant network."""
    how = mechanism(0.0, sample_rate=rate)
    told = train_by_plan(constant_loss(asked), part, plan=asked, mechanism=how, key=key)
    assert told.train_loss is not None
    num_steps = asked.training.local_steps
    return told.train_loss * asked.training.expected_batch * num_steps / math.log(2)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_patients_are_sampled_at_the_rate_of_the_mechanism(rate: float) -> None:
    asked = plan(
        **(SMALL | {"training__local_steps": 20, "training__learning_rate": 1e-30, "privacy": "none"})
    )
    trials = 300 * 20
    found = num_sampled(asked, part_of((1,) * 300), rate=rate, key=KEY)
    assert abs(found - trials * rate) < 4 * math.sqrt(trials * rate * (1 - rate))


def test_batch_sizes_vary_as_those_of_poisson_sampling_do() -> None:
    """Not batches of a fixed size: 60 patients at 0.3 give 18 with a variance of 12.6."""
    asked = plan(**(SMALL | {"training__learning_rate": 1e-30, "privacy": "none"}))
    keys = [Key(secret=bytes([number, 1])) for number in range(200)]
    sizes = np.array([num_sampled(asked, part_of((1,) * 60), rate=0.3, key=key) for key in keys])
    np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-4)
    assert abs(sizes.mean() - 18) < 4 * math.sqrt(12.6 / 200)
    assert abs(sizes.var(ddof=1) / 12.6 - 1) < 4 * math.sqrt(2 / 199)


def test_every_step_samples_anew() -> None:
    part, rate = part_of((1,) * 60), 0.3
    steps: dict[str, Any] = {"training__learning_rate": 1e-30, "privacy": "none"}
    one = num_sampled(plan(**(SMALL | steps)), part, rate=rate, key=KEY)
    many = num_sampled(plan(**(SMALL | steps | {"training__local_steps": 7})), part, rate=rate, key=KEY)
    assert abs(many - 7 * one) > 0.5


def kolmogorov(values: npt.NDArray[Any], *, std: float) -> float:
    """The Kolmogorov-Smirnov distance to N(0, std^2) times the root of the number: above 1.95 with 0.1 %."""
    ordered = np.sort(values.astype(np.float64)) / std
    normal = torch.special.ndtr(torch.from_numpy(ordered)).numpy()
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((normal - steps[:-1]).max(), (steps[1:] - normal).max())
    return float(distance * math.sqrt(len(ordered)))


NOBODY = part_of(())


def test_empty_batch_is_a_legal_step_of_pure_noise_at_its_scale() -> None:
    asked = plan(
        **(SMALL | {"model__channels": (32,), "training__learning_rate": 0.25}), privacy__max_grad_norm=3.0
    )
    nobody = trained(asked, NOBODY, mechanism(1.5))
    std = 0.25 * 1.5 * math.sqrt(1 + 10**-2) * 3.0 / 4
    assert kolmogorov(nobody.update, std=std) < 1.95
    assert kolmogorov(nobody.update, std=std * 2 / 3) > 1.95
    assert kolmogorov(nobody.update, std=std * 3 / 2) > 1.95


def test_noise_is_as_large_where_patients_are_sampled() -> None:
    """What two keys make of the same patients differs by two independent noises."""
    asked = plan(**(SMALL | {"model__channels": (32,)}))
    first, second = (
        trained(asked, part_of(), mechanism(50.0), key=Key(secret=bytes([number]))) for number in (1, 2)
    )
    std = math.sqrt(2) * asked.training.learning_rate * 50 * math.sqrt(1 + 10**-2) / 4
    difference = first.update - second.update
    assert kolmogorov(difference, std=std) < 1.95
    assert kolmogorov(difference, std=std * 2 / 3) > 1.95
    assert kolmogorov(difference, std=std * 3 / 2) > 1.95


def test_noise_of_every_step_is_drawn_anew() -> None:
    asked = plan(**(SMALL | {"model__channels": (32,), "training__local_steps": 4}))
    std = asked.training.learning_rate * math.sqrt(1 + 10**-2) / 4
    moved = trained(asked, NOBODY, mechanism(1.0)).update
    assert kolmogorov(moved, std=2 * std) < 1.95
    assert kolmogorov(moved, std=4 * std) > 1.95


def test_nobody_moves_nothing_without_privacy() -> None:
    asked = plan(**SMALL, privacy="none")
    nobody = trained(asked, NOBODY, mechanism(0.0))
    assert not nobody.update.any()
    assert nobody.train_loss == 0


def test_round_without_steps_changes_nothing_and_tells_no_loss() -> None:
    idle = trained(plan(**(SMALL | {"training__local_steps": 0})), part_of(), mechanism(1.0))
    assert not idle.update.any()
    assert idle.train_loss is None


class BlackIsUndefined(nn.Module):
    """Divides an image by its mean: a black one has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        outputs: torch.Tensor = self.linear(flat / flat.mean(dim=1, keepdim=True))
        return outputs


def test_patient_whose_gradient_is_not_finite_moves_nobody_elses() -> None:
    asked, part = plan(**SMALL), part_of()
    black = part.images.copy()
    black[part.patients[1][0]] = 0
    torch.manual_seed(0)
    network = BlackIsUndefined()
    start = model.flatten(network)
    spoilt = train_by_plan(
        network, replace(part, images=black),
        plan=asked, mechanism=mechanism(), key=KEY,
    )  # fmt: skip
    model.load(network, start)
    others = replace(part, patients=part.patients[:1] + part.patients[2:])
    without = train_by_plan(network, others, plan=asked, mechanism=mechanism(), key=KEY)
    assert np.abs(without.update).max() > 0.01
    np.testing.assert_allclose(spoilt.update, without.update, atol=1e-7)
    assert spoilt.train_loss is not None and without.train_loss is not None
    assert spoilt.train_loss - without.train_loss == pytest.approx(2.0 / 4, rel=1e-5), "its loss is the bound"


def test_loss_is_the_mean_over_expected_patients_of_the_mean_over_their_cases() -> None:
    asked, part = plan(**SMALL, privacy="none"), part_of()
    network = model.build(asked)
    losses = case_losses(network(to_input(part.images)), torch.from_numpy(part.targets)).detach()
    means = [float(losses[torch.from_numpy(own)].mean()) for own in part.patients]
    assert trained(asked, part).train_loss == pytest.approx(sum(means) / 4, rel=1e-6)
    assert trained(plan(**SMALL), part).train_loss == pytest.approx(sum(means) / 4, rel=1e-6)


def test_released_loss_of_a_patient_is_bounded() -> None:
    asked = plan(**SMALL, privacy__loss_bound=0.05)
    assert trained(asked, part_of()).train_loss == pytest.approx(5 * 0.05 / 4, rel=1e-6)


def test_released_loss_is_noised_at_its_documented_scale() -> None:
    """The noise: 1 x sqrt(1 + 1/100) x 10 x the bound of 2, over 4 patients; here over 200 keys."""
    asked = plan(**(SMALL | {"model__channels": (2,), "model__head_size": 1}))
    keys = [Key(secret=bytes([number, 2])) for number in range(200)]
    losses = np.array([trained(asked, NOBODY, mechanism(1.0), key=key).train_loss for key in keys])
    std = math.sqrt(1 + 10**-2) * 10 * 2.0 / 4
    assert kolmogorov(losses, std=std) < 1.95
    assert abs(losses.std() / std - 1) < 4 / math.sqrt(2 * 200)
    assert abs(losses.mean()) < 4 * std / math.sqrt(200)


def test_same_key_gives_the_same_bits_and_another_key_others() -> None:
    asked, how = plan(**(SMALL | {"training__local_steps": 3})), mechanism(1.0, sample_rate=0.6)
    first, again = (trained(asked, part_of(), how) for _ in range(2))
    assert first.update.tobytes() == again.update.tobytes()
    assert first.train_loss == again.train_loss
    other = trained(asked, part_of(), how, key=Key(secret=bytes(32)))
    assert not np.array_equal(other.update, first.update)


@pytest.mark.parametrize("privacy", ["dp_sgd", "none"])
def test_torch_and_numpy_generators_have_no_part_in_it(privacy: str) -> None:
    asked, how = plan(**SMALL, privacy=privacy), mechanism(1.0, sample_rate=0.6)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
        results.append(trained(asked, part_of(), how).update.tobytes())
        assert torch.equal(torch.get_rng_state(), state)
        assert str(np.random.get_state()) == numpy_state
    assert results[0] == results[1]


def assert_unhooked(network: nn.Module) -> None:
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for parameter in network.parameters():
        assert getattr(parameter, "grad_sample", None) is None
        assert getattr(parameter, "summed_grad", None) is None


def test_one_network_trains_again_and_again_with_the_same_result() -> None:
    asked = plan(**SMALL)
    network = model.build(asked)
    start, updates = model.flatten(network), []
    for _ in range(3):
        model.load(network, start)
        updates.append(
            train_by_plan(network, part_of(), plan=asked, mechanism=mechanism(1.0), key=KEY).update
        )
        assert_unhooked(network)
    assert updates[0].tobytes() == updates[1].tobytes() == updates[2].tobytes()


def test_network_is_as_good_as_new_after_training_failed() -> None:
    """It is kept for the next task, which must not fail for the same reason."""
    asked = plan(**SMALL)
    network = model.build(asked)
    start = model.flatten(network)

    def fails(step: int, steps: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        train_by_plan(network, part_of(), plan=asked, mechanism=mechanism(1.0), key=KEY, on_step=fails)
    assert_unhooked(network)
    model.load(network, start)
    again = train_by_plan(network, part_of(), plan=asked, mechanism=mechanism(1.0), key=KEY)
    assert again.update.tobytes() == trained(asked, part_of(), mechanism(1.0)).update.tobytes()


def test_steps_are_told_as_they_are_done() -> None:
    asked, told = plan(**(SMALL | {"training__local_steps": 3})), []
    on_step: Callable[[int, int], None] = lambda step, steps: told.append((step, steps))  # noqa: E731
    train_by_plan(
        model.build(asked), part_of(), plan=asked, mechanism=mechanism(1.0), key=KEY, on_step=on_step
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=8), st.integers(1, 4), st.integers(1, 9), st.sets(st.integers(0, 7))
)
def test_batches_hold_every_sampled_patient_whole_and_once(
    cases: list[int], cases_per_patient: int, physical_batch: int, wanted: set[int]
) -> None:
    part = part_of(tuple(cases), size=2)
    sampled = sorted(number for number in wanted if number < len(cases))
    drawn = sampler(cases_per_patient)([part.patients[number] for number in sampled])
    made = list(batches(part, drawn, physical_batch=physical_batch))
    sizes: list[int] = []
    for batch in made:
        own = torch.bincount(batch.owners, minlength=batch.num_patients).tolist()
        assert batch.owners.tolist() == sorted(batch.owners.tolist())
        assert len(batch.images) == len(batch.targets) == sum(own)
        assert sum(own) <= physical_batch or len(own) == 1
        sizes += own
    assert sizes == [min(cases[number], cases_per_patient) for number in sampled]


def test_cases_of_a_patient_are_chosen_at_random_without_repetition() -> None:
    part = part_of((5,), size=2)
    part = replace(part, images=np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1))
    draw = sampler(2)
    counts = np.zeros(5)
    for _ in range(1000):
        (batch,) = batches(part, draw(part.patients), physical_batch=8)
        chosen = (batch.images.flatten() * 255).round().int().tolist()
        assert len(set(chosen)) == 2
        counts[chosen] += 1
    assert np.abs(counts - 400).max() < 4 * math.sqrt(1000 * 0.4 * 0.6)


def test_labels_and_images_stay_together() -> None:
    part = part_of((2, 1, 3))
    (batch,) = batches(part, [part.patients[0], part.patients[2]], physical_batch=8)
    cases = [0, 1, 3, 4, 5]
    assert batch.owners.tolist() == [0, 0, 1, 1, 1]
    assert batch.targets.tolist() == part.targets[cases].tolist()
    assert torch.equal(batch.images, torch.from_numpy(part.images[cases]).float() / 255)


def test_images_become_numbers_between_0_and_1() -> None:
    assert to_input(np.array([0, 51, 255], dtype=np.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_losses_are_cross_entropies() -> None:
    two = case_losses(torch.tensor([[1.5], [-0.5]]), torch.tensor([1, 1]))
    assert two.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(0.5))])
    three = case_losses(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
    assert three.tolist() == pytest.approx([math.log(sum(math.exp(x) for x in (1, 2, 3))) - 2])


def test_means_are_over_each_patients_own_cases() -> None:
    owners = torch.tensor([0, 0, 0, 1])
    batch = Batch(
        images=torch.zeros(4),
        values=torch.zeros(4, 0),
        targets=torch.zeros(4),
        owners=owners,
        num_patients=2,
    )
    rows = torch.tensor([[1.0, 0.0], [2.0, 6.0], [6.0, 0.0], [5.0, 7.0]])
    assert patient_means(rows, batch).tolist() == [[3.0, 2.0], [5.0, 7.0]]
    assert patient_means(rows[:, 0], batch).tolist() == [3.0, 5.0]
