from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client.clipping import Clipping, PatientOptimizer, PrivateGradient, patient_gradients, split_noise
from client.gaussian import Gaussian
from client.noise import Key
from client.training import Batch
from common.plan import DpSgd
from common.privacy import Spend, epsilon

KEY = Key(secret=bytes(range(32)))
WAYS: tuple[Clipping, ...] = ("bookkeeping", "hooks", "ghost", "ew")


def private_gradient(
    network: nn.Module,
    *,
    noise_multiplier: float = 1e-14,
    max_grad_norm: float = 1.0,
    loss_bound: float = 2.0,
    loss_noise_ratio: float = 10.0,
    expected_batch: int = 1,
    clipping: Clipping = "auto",
) -> PrivateGradient:
    privacy = DpSgd(
        mechanism="dp_sgd",
        target_epsilon=None,
        noise="own",
        noise_multiplier=1.0,
        max_noise_multiplier=100.0,
        delta=1e-4,
        max_grad_norm=max_grad_norm,
        loss_bound=loss_bound,
        loss_noise_ratio=loss_noise_ratio,
        clipping=clipping,
    )
    return PrivateGradient(
        network,
        privacy=privacy,
        noise_multiplier=noise_multiplier,
        expected_batch=expected_batch,
        noise=Gaussian(KEY.derived("noise")),
    )


def linear() -> nn.Linear:
    """x -> w x + b with w = b = 0, so that the gradient of a case is (p - y) (x, 1) with p = 1/2."""
    layer = nn.Linear(2, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def batch_of(rows: list[list[float]], targets: list[int], owners: list[int]) -> Batch:
    return Batch(
        images=torch.tensor(rows),
        values=torch.zeros(len(rows), 0),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        num_patients=max(owners) + 1,
    )


def written(network: nn.Module) -> list[float]:
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None]).tolist()


@pytest.mark.parametrize("clipping", WAYS)
def test_gradient_of_a_linear_network_is_its_closed_form(clipping: Clipping) -> None:
    network = linear()
    gradient = private_gradient(network, clipping=clipping, max_grad_norm=100.0, expected_batch=4)
    gradient.accumulate(batch_of([[3.0, 4.0], [1.0, -2.0]], [1, 0], [0, 1]))
    gradient.finish()
    expected = [(-0.5 * 3 + 0.5 * 1) / 4, (-0.5 * 4 + 0.5 * -2) / 4, 0.0]
    assert written(network) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("clipping", WAYS)
def test_gradient_over_the_bound_is_scaled_to_it_as_a_whole(clipping: Clipping) -> None:
    """Weight and bias together: (-1.5, -2, -0.5) has the norm sqrt(6.5)."""
    network = linear()
    gradient = private_gradient(network, clipping=clipping, max_grad_norm=0.1)
    gradient.accumulate(batch_of([[3.0, 4.0]], [1], [0]))
    gradient.finish()
    expected = [0.1 * part / math.sqrt(6.5) for part in (-1.5, -2.0, -0.5)]
    assert written(network) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks", "ew"])
def test_cases_of_a_patient_are_averaged_before_they_are_clipped(clipping: Clipping) -> None:
    """Opposite cases of one patient cancel; clipped one by one, they would not."""
    network = linear()
    gradient = private_gradient(network, clipping=clipping, max_grad_norm=0.1)
    gradient.accumulate(batch_of([[3.0, 0.0], [1.0, 0.0]], [1, 0], [0, 0]))
    gradient.finish()
    assert written(network) == pytest.approx([-0.1, 0.0, 0.0], abs=1e-6), "the mean is (-0.5, 0, 0)"


@pytest.mark.parametrize("clipping", WAYS)
def test_batches_of_a_step_add_up_and_the_next_step_begins_at_zero(clipping: Clipping) -> None:
    network = linear()
    gradient = private_gradient(network, clipping=clipping, max_grad_norm=100.0)
    for row in ([1.0, 0.0], [0.0, 2.0]):
        gradient.accumulate(batch_of([row], [1], [0]))
    gradient.finish()
    assert written(network) == pytest.approx([-0.5, -1.0, -1.0], abs=1e-6)
    gradient.finish()
    assert written(network) == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


FLOATS = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(FLOATS, FLOATS, st.integers(0, 1)), min_size=1, max_size=6),
    st.lists(st.tuples(FLOATS, FLOATS, st.integers(0, 1)), min_size=1, max_size=4),
)
def test_one_patient_more_moves_the_sum_by_the_bound_at_most(
    others: list[tuple[float, float, int]], patient: list[tuple[float, float, int]]
) -> None:
    def gradient_of(cases: list[tuple[float, float, int]], owners: list[int]) -> npt.NDArray[Any]:
        network = linear()
        gradient = private_gradient(network, max_grad_norm=0.7)
        rows, targets = [[first, second] for first, second, _ in cases], [case[2] for case in cases]
        gradient.accumulate(batch_of(rows, targets, owners))
        gradient.finish()
        return np.array(written(network))

    without = gradient_of(others, list(range(len(others))))
    owners = list(range(len(others))) + [len(others)] * len(patient)
    moved = np.linalg.norm(gradient_of(others + patient, owners) - without)
    assert moved <= 0.7 * (1 + 1e-5)


def test_loss_is_averaged_per_patient_and_bounded() -> None:
    network = linear()
    nn.init.ones_(network.weight)
    gradient = private_gradient(network, loss_bound=2.0)
    rows, targets = [[5.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [0, 1, 1]
    losses = [math.log1p(math.exp(5)), math.log1p(math.exp(-1)), math.log(2)]
    told = gradient.accumulate(batch_of(rows, targets, [0, 0, 1]))
    assert (losses[0] + losses[1]) / 2 > 2.0
    assert told == pytest.approx(2.0 + losses[2], rel=1e-6)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 1)),
    )


def images_of(images: torch.Tensor, owners: list[int]) -> Batch:
    targets = torch.arange(len(images)) % 2
    values = torch.zeros(len(images), 0)
    return Batch(
        images=images,
        values=values,
        targets=targets,
        owners=torch.tensor(owners),
        num_patients=max(owners) + 1,
    )


def gradient_of(network: nn.Module, batch: Batch, *, clipping: Clipping) -> npt.NDArray[Any]:
    gradient = private_gradient(network, max_grad_norm=0.05, clipping=clipping)
    gradient.accumulate(batch)
    gradient.finish()
    gradient.close()
    return np.array(written(network))


def test_all_ways_to_clip_give_one_gradient() -> None:
    images = torch.rand(5, 1, 8, 8)
    single, several = list(range(5)), [0, 0, 1, 2, 2]
    ways: list[tuple[Clipping, list[int]]] = [(way, single) for way in WAYS]
    ways += [("bookkeeping", several), ("hooks", several), ("ew", several)]
    found = {
        (way, len(set(owners))): gradient_of(convolutional(), images_of(images, owners), clipping=way)
        for way, owners in ways
    }
    for (way, number), gradient in found.items():
        np.testing.assert_allclose(gradient, found["hooks", number], rtol=1e-4, atol=1e-6, err_msg=way)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("clipping", WAYS)
def test_patient_without_a_finite_gradient_counts_as_nothing(clipping: Clipping, bad: float) -> None:
    images = torch.rand(3, 1, 8, 8)
    expected = gradient_of(convolutional(), images_of(images[[0, 2]], [0, 1]), clipping=clipping)
    images[1, 0, 3, 3] = bad
    batch = images_of(images, [0, 1, 2])
    others = images_of(images[[0, 2]], [0, 1])
    batch.targets[[0, 2]] = others.targets
    found = gradient_of(convolutional(), batch, clipping=clipping)
    if math.isfinite(bad):
        assert np.linalg.norm(found - expected) <= 0.05 * (1 + 1e-5)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clipping", WAYS)
def test_gradient_too_long_for_its_own_norm_still_moves_by_the_bound_at_most(clipping: Clipping) -> None:
    """Its norm overflows, though every element is finite."""
    network = linear()
    gradient = private_gradient(network, clipping=clipping, max_grad_norm=1.0)
    gradient.accumulate(batch_of([[3e38, 3e38], [1.0, 0.0]], [1, 1], [0, 1]))
    gradient.finish()
    gradients = np.array(written(network))
    assert np.isfinite(gradients).all()
    assert np.linalg.norm(gradients) <= 2.0


@pytest.mark.parametrize("ratio", [1.0, 3.0, 10.0, 1000.0])
@pytest.mark.parametrize("noise_multiplier", [0.5, 4.0])
def test_gradient_and_loss_together_cost_what_one_release_would(
    noise_multiplier: float, ratio: float
) -> None:
    gradient, loss = split_noise(noise_multiplier, loss_noise_ratio=ratio)
    assert loss / gradient == pytest.approx(ratio)
    history = [Spend(noise_multiplier=one, sample_rate=1.0, steps=1) for one in (gradient, loss)]
    one = Spend(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1)
    assert epsilon(history, delta=1e-5).value == pytest.approx(epsilon([one], delta=1e-5).value, rel=1e-9)


def kolmogorov(values: npt.NDArray[Any], *, std: float) -> float:
    """The Kolmogorov-Smirnov distance to N(0, std^2) times the root of the number: above 1.95 with 0.1 %."""
    ordered = np.sort(values.astype(np.float64)) / std
    normal = torch.special.ndtr(torch.from_numpy(ordered)).numpy()
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((normal - steps[:-1]).max(), (steps[1:] - normal).max())
    return float(distance * math.sqrt(len(ordered)))


def test_noise_of_gradient_and_loss_have_their_documented_scales() -> None:
    network = linear()
    gradient = private_gradient(
        network,
        noise_multiplier=1.5,
        max_grad_norm=3.0,
        loss_bound=2.0,
        loss_noise_ratio=4.0,
        expected_batch=5,
    )
    losses, gradients = [], []
    for _ in range(2000):
        losses.append(gradient.finish())
        gradients.append(written(network))
    multiplier = 1.5 * math.sqrt(1 + 4.0**-2)
    for values, std in (
        (np.array(gradients).reshape(-1), multiplier * 3.0 / 5),
        (np.array(losses), multiplier * 4.0 * 2.0),
    ):
        assert kolmogorov(values, std=std) < 1.95
        assert kolmogorov(values, std=std * 2 / 3) > 1.95
        assert kolmogorov(values, std=std * 3 / 2) > 1.95


def test_noise_of_parameters_steps_and_loss_is_uncorrelated() -> None:
    network = linear()
    gradient = private_gradient(network, noise_multiplier=1.0)
    drawn = []
    for _ in range(4000):
        loss = gradient.finish()
        drawn.append([loss, *written(network)])
    columns = np.array(drawn)
    both_steps = np.concatenate([columns[:-1], columns[1:]], axis=1)
    correlations = np.corrcoef(both_steps, rowvar=False) - np.eye(8)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(4000)


@pytest.mark.parametrize("clipping", WAYS)
def test_closing_takes_everything_off_the_network(clipping: Clipping) -> None:
    network = linear()
    gradient = private_gradient(network, clipping=clipping)
    gradient.accumulate(batch_of([[1.0, 1.0]], [1], [0]))
    gradient.finish()
    gradient.close()
    assert not network._forward_hooks and not network._backward_hooks
    again = private_gradient(network, clipping=clipping, max_grad_norm=100.0)
    again.accumulate(batch_of([[1.0, 0.0]], [1], [0]))
    again.finish()
    assert written(network) == pytest.approx([-0.5, 0.0, -0.5], abs=1e-6)


class Scaled(nn.Module):
    """A parameter of its own beside a layer: book-keeping does not know such a module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(inputs) * self.scale
        return found


@pytest.mark.parametrize(("network", "way"), [(linear(), "book-keeping"), (Scaled(), "Opacus' hooks")])
def test_auto_says_which_way_it_takes(network: nn.Module, way: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="feverfew.worker")
    patient_gradients(network, clipping="auto").detach()
    assert f"clipping=auto is by {way}" in caplog.text


def test_noise_is_added_to_what_patients_gave_and_alone_where_nobody_did() -> None:
    sizes = [3, 5, 7]
    network = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    optimizer = PatientOptimizer(
        SimpleNamespace(param_groups=[{"params": list(network)}], defaults={}, state={}),
        noise=Gaussian(bytes(32)),
        noise_multiplier=0.5,
        max_grad_norm=3.0,
        expected_batch_size=4,
        loss_reduction="mean",
    )
    network[1].summed_grad = torch.full((5,), 2.0)
    optimizer.add_noise()
    expected = [np.full(size, 2.0 * (place == 1), dtype=np.float32) for place, size in enumerate(sizes)]
    Gaussian(bytes(32)).add_to(expected, std=0.5 * 3 / 4, threads=1)
    for parameter, noised in zip(network, expected, strict=True):
        np.testing.assert_array_equal(parameter.grad.numpy(), noised)
