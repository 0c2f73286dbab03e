from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from client.segmentation import case_losses
from common import unet
from common.errors import ConfigError
from common.model import trainable_privately
from common.unet import Unet

LEVELS: dict[str, Any] = {"name": "unet", "channels": (4, 8, 8), "strides": (1, 2), "groups": 2}
SIZES = [(8, 12), (4, 8, 12)]


def network(size: tuple[int, ...], **changes: Any) -> nn.Module:
    asked = Unet(**LEVELS | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = unet.build(asked, spatial_dims=len(size), in_channels=1, out_channels=3)
    return trainable_privately(built).double().train()


def images(size: tuple[int, ...], *, num_cases: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_cases, 1, *size, generator=generator, dtype=torch.double)


def masks(size: tuple[int, ...], *, num_cases: int = 3) -> torch.Tensor:
    return torch.randint(0, 3, (num_cases, *size), generator=torch.Generator().manual_seed(2)).byte()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (2, 1)])
def test_network_gives_every_pixel_one_logit_a_class(size: tuple[int, ...], strides: tuple[int, ...]) -> None:
    assert network(size, strides=strides)(images(size)).shape == (3, 3, *size)


def test_size_that_the_levels_do_not_divide_does_not_fit() -> None:
    assert Unet(**LEVELS).divisor == 2
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        network((8, 9))(images((8, 9)))


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_a_case_depend_on_no_other_case_and_on_no_chance(size: tuple[int, ...]) -> None:
    built = network(size)
    state = torch.get_rng_state()
    together = built(images(size))
    alone = torch.cat([built(image[None]) for image in images(size)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_network_has_nothing_that_dp_sgd_cannot_train() -> None:
    built = network((4, 8, 12))
    assert list(built.buffers()) == []
    for module in built.modules():
        assert not getattr(module, "inplace", False)
        assert getattr(module, "p", 0.0) == 0.0
    norms = [module for module in built.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 2 * len(LEVELS["channels"]) - 2, "one a convolution but the last"


def test_only_group_norm_is_there_so_that_nothing_is_replaced() -> None:
    built = unet.build(Unet(**LEVELS), spatial_dims=3, in_channels=1, out_channels=3)
    before = [type(module) for module in built.modules()]
    assert [type(module) for module in trainable_privately(built).modules()] == before


@pytest.mark.parametrize("size", SIZES)
def test_per_sample_gradients_equal_those_taken_one_case_at_a_time(size: tuple[int, ...]) -> None:
    from opacus.grad_sample import GradSampleModule

    built = network(size)
    pairs = list(zip(images(size), masks(size), strict=True))
    alone = []
    for image, mask in pairs:
        loss = case_losses(built(image[None]), mask[None]).sum()
        alone.append(torch.autograd.grad(loss, list(built.parameters())))
    hooked = GradSampleModule(built, batch_first=True, loss_reduction="sum", strict=True)
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        case_losses(hooked(images(size)), masks(size)).sum().backward()
    for place, parameter in enumerate(built.parameters()):
        expected = torch.stack([gradients[place] for gradients in alone])
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=1e-9, atol=1e-13)
    hooked.to_standard_module()


def test_network_learns_a_mask_from_an_image() -> None:
    size = (4, 8, 12)
    built, seen = network(size), images(size)
    drawn = (seen[:, 0] > 0.6).byte()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = case_losses(built(seen), drawn).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strides": (2, 2, 2)}, "one stride less than channels"),
        ({"strides": ()}, "one stride less than channels"),
        ({"strides": (1, 3)}, "strides"),
        ({"groups": 3}, "divisible by groups=3"),
        ({"channels": (4,), "strides": ()}, "channels"),
    ],
)
def test_levels_that_do_not_fit_together_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Unet(**LEVELS | changes)


def test_batch_norm_in_its_place_would_be_replaced_and_others_refused() -> None:
    from monai.networks.nets import UNet

    mixing = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")
    replaced = trainable_privately(mixing)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in replaced.modules())
    keeping = UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(4, 8),
        strides=(2,),
        norm=("instance", {"track_running_stats": True}),
    )
    with pytest.raises(ConfigError, match="buffers"):
        trainable_privately(keeping)
