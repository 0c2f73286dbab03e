from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client import clinical
from client.cohort import Part
from client.noise import Key
from client.training import case_losses, train_by_plan
from common import model
from common.calibration import Mechanism
from common.errors import ConfigError
from common.plan import Plan
from tests.plans import plan

PLANS: dict[str, dict[str, Any]] = {
    "cnn": {"model": "cnn", "preprocessing": "grey28"},
    "cnn of four classes": {"model": "cnn", "preprocessing": "rgb64", "classes": ("a", "b", "c", "d")},
    "cnn of four labels": {"classes": ("a", "b", "c", "d"), "target": "labels"},
    "cnn of volumes": {"preprocessing__size": (16, 8, 16), "preprocessing__inputs": ("t1", "t2")},
    "unet": {"model": "unet", "preprocessing__size": (16, 8)},
    "unet of volumes": {"model": "unet", "preprocessing__size": (8, 16, 8), "classes": ("a", "b", "c")},
    "linear": {"model": "linear", "preprocessing": "grey28"},
    "linear of four labels": {"model": "linear", "classes": ("a", "b", "c", "d"), "target": "labels"},
    "linear of volumes": {"model": "linear", "preprocessing__size": (8, 16, 8)},
    "article_cnn": {"model": "article_cnn", "preprocessing": "rgb64"},
    "densenet121": {"model": "densenet121", "preprocessing__size": (32, 32)},
    "efficientnet_b0": {"model": "efficientnet_b0", "preprocessing__size": (32, 32)},
}


LARGE = ("article_cnn", "densenet121", "efficientnet_b0")
PARAMS = [
    pytest.param(changes, id=name, marks=[pytest.mark.slow] if name in LARGE else [])
    for name, changes in PLANS.items()
]


@pytest.fixture(params=PARAMS)
def asked(request: pytest.FixtureRequest) -> Plan:
    return plan(**request.param)


def images_of(asked: Plan, *, num_cases: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_cases, asked.preprocessing.num_channels, *asked.preprocessing.size)
    return torch.rand(shape, generator=generator)


def targets_of(asked: Plan, *, num_cases: int) -> np.ndarray:
    """Classes in turn, random labels, or random masks."""
    rng = np.random.default_rng(2)
    match asked.target:
        case "class":
            return np.arange(1, num_cases + 1) % len(asked.classes)
        case "labels":
            return rng.integers(0, 2, (num_cases, len(asked.classes)), dtype=np.uint8)
        case "mask":
            shape = (num_cases, *asked.preprocessing.size)
            return rng.integers(0, len(asked.classes), shape, dtype=np.uint8)


def part_of(asked: Plan, *, num_patients: int) -> Part:
    """Two cases a patient."""
    pixels = (images_of(asked, num_cases=2 * num_patients) * 255).to(torch.uint8).numpy()
    patients = tuple(np.arange(2 * num_patients).reshape(num_patients, 2))
    return Part(
        images=pixels,
        targets=targets_of(asked, num_cases=2 * num_patients),
        values=clinical.none(2 * num_patients),
        patients=patients,
    )


def test_network_maps_images_to_one_logit_or_one_a_class_or_pixel(asked: Plan) -> None:
    outputs = model.build(asked)(images_of(asked, num_cases=3))
    of_pixels = asked.preprocessing.size if asked.target == "mask" else ()
    assert outputs.shape == (3, asked.num_outputs, *of_pixels)
    assert outputs.dtype == torch.float32
    assert outputs.isfinite().all()


def test_network_has_nothing_that_dp_sgd_cannot_train(asked: Plan) -> None:
    network = model.build(asked)
    assert list(network.buffers()) == []
    for module in network.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert not getattr(module, "inplace", False)
        assert getattr(module, "p", 0.0) == 0.0
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_output_of_a_case_depends_on_no_other_case_and_on_no_chance(asked: Plan) -> None:
    network = model.build(asked).double().train()
    images = images_of(asked, num_cases=3).double()
    state = torch.get_rng_state()
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_per_sample_gradients_equal_those_taken_one_case_at_a_time(asked: Plan) -> None:
    from opacus.grad_sample import GradSampleModule

    network = model.build(asked).double().train()
    images = images_of(asked, num_cases=3).double()
    targets = torch.from_numpy(targets_of(asked, num_cases=3))
    alone = []
    for image, target in zip(images, targets, strict=True):
        loss = case_losses(network(image[None]), target[None]).sum()
        alone.append(torch.autograd.grad(loss, list(network.parameters())))
    hooked = GradSampleModule(network, batch_first=True, loss_reduction="sum", strict=True)
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        case_losses(hooked(images), targets).sum().backward()  # type: ignore[no-untyped-call]
    for position, parameter in enumerate(network.parameters()):
        rows: Any = parameter.grad_sample  # type: ignore[attr-defined]
        expected = torch.stack([gradients[position] for gradients in alone])
        torch.testing.assert_close(rows, expected, rtol=1e-7, atol=1e-12)
        assert expected.abs().sum() > 0


def test_network_trains_one_private_step(asked: Plan) -> None:
    one_step = Plan.from_tree(
        asked.model_dump(mode="json")
        | {"training": asked.training.model_dump() | {"local_steps": 1, "expected_batch": 3}}
    )
    network = model.build(one_step)
    start = model.flatten(network)
    trained = train_by_plan(
        network,
        part_of(one_step, num_patients=3),
        plan=one_step,
        mechanism=Mechanism(sample_rate=1.0, noise_multiplier=1e-6, evaluation_noise_multiplier={}),
        key=Key(secret=bytes(32)),
    )
    assert np.isfinite(trained.update).all()
    assert 0.01 < np.linalg.norm(trained.update) <= 0.5 * (1 + 1e-5), "a learning rate of 0.5, a clip of 1"
    np.testing.assert_allclose(model.flatten(network), start + trained.update, atol=1e-6)


def test_article_cnn_has_the_parameters_of_the_article() -> None:
    convolutions = (3 * 3 * 3 * 32 + 32) + (3 * 3 * 32 * 64 + 64)
    side = ((64 - 2) // 2) - 2
    dense = (side * side * 64 * 128 + 128) + (128 * 1 + 1)
    network = model.build(plan(**PLANS["article_cnn"]))
    assert model.num_parameters(network) == convolutions + dense == 6_909_121


def test_cnn_has_the_blocks_of_its_config() -> None:
    network = model.build(plan(model__channels=(4, 8), model__pool_sizes=(2, 2), model__groups=2))
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert [(one.in_channels, one.out_channels) for one in convolutions] == [(1, 4), (4, 8)]
    assert [(one.num_groups, one.num_channels) for one in norms] == [(2, 4), (2, 8)]


def test_same_seed_gives_the_same_bits_and_another_seed_others(asked: Plan) -> None:
    first, again = model.flatten(model.build(asked)), model.flatten(model.build(asked))
    assert first.tobytes() == again.tobytes()
    other = Plan.from_tree(asked.model_dump(mode="json") | {"seed": 1})
    assert not np.array_equal(model.flatten(model.build(other)), first)


@pytest.mark.parametrize("bit", [8, 16, 31])
def test_every_bit_of_the_seed_counts(bit: int) -> None:
    small, large = plan(seed=0), plan(seed=2**bit)
    assert not np.array_equal(model.flatten(model.build(small)), model.flatten(model.build(large)))


def test_building_neither_reads_nor_moves_the_global_random_state() -> None:
    first = model.flatten(model.build(plan()))
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert np.array_equal(model.flatten(model.build(plan())), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LSTM(4, 4), "per-sample gradients are not available"),
        (nn.GRU(4, 4), "per-sample gradients are not available"),
        (nn.RNN(4, 4), "per-sample gradients are not available"),
        (nn.MultiheadAttention(4, 1), "per-sample gradients are not available"),
        (nn.SyncBatchNorm(4), "one patient changes the gradients of others"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_that_dp_sgd_cannot_train_is_refused_with_the_reason(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.trainable_privately(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)))
    assert f"found {type(layer).__name__} at '1.0'" in str(caught.value)
    assert reason in str(caught.value)


def test_running_statistics_are_refused_by_name() -> None:
    layer = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.raises(ConfigError, match=r"without buffers, found '0\.running_mean'"):
        model.trainable_privately(layer)


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (24, 8), (10, 2), (7, 1)])
def test_batch_norm_becomes_group_norm(width: int, groups: int) -> None:
    network = model.trainable_privately(nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)))
    norm = list(network.children())[1]
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, width)


def test_in_place_operations_and_dropout_are_taken_out() -> None:
    network = model.trainable_privately(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout2d(0.5)))
    values = -torch.ones(2, 3, 4, 4)
    assert (network.train()(values) == 0).all()
    assert (values == -1).all()
    assert (network.train()(values + 2) == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "densenet121", "preprocessing": "grey28"},
        {"model": "efficientnet_b0", "preprocessing": "grey28"},
        {"model__pool_sizes": (4, 4), "preprocessing__size": (8, 8)},
    ],
)
def test_images_too_small_for_the_network_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"found preprocessing\.size=\[\d+, \d+\] .*choose a larger"):
        model.build(plan(**changes))


def test_flat_array_is_loaded_back_bit_for_bit(asked: Plan) -> None:
    network, other = model.build(asked), model.build(Plan.from_tree(asked.model_dump() | {"seed": 9}))
    flat = model.flatten(network)
    assert flat.dtype == np.float32
    assert flat.shape == (model.num_parameters(network),)
    model.load(other, flat)
    assert model.flatten(other).tobytes() == flat.tobytes()
    images = images_of(asked, num_cases=2)
    assert torch.equal(other(images), network(images))


def test_flat_array_is_a_copy() -> None:
    network = model.build(plan())
    flat = model.flatten(network)
    flat[:] = 7
    assert not (model.flatten(network) == 7).any()
    model.load(network, flat)
    flat[:] = 8
    assert (model.flatten(network) == 7).all()


def test_flat_array_is_in_the_order_of_the_named_parameters() -> None:
    network = model.build(plan())
    named = model.named_arrays(network, model.flatten(network))
    assert list(named) == [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        np.testing.assert_array_equal(named[name], parameter.detach().numpy())
