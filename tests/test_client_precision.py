from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from client import precision, processor
from client.bookkeeping import BookKeeping
from client.precision import NO_GAIN, compute_type
from client.training import Batch, PlainGradient
from common import model
from common.errors import ConfigError
from common.plan import NO_PRIVATE_BFLOAT16
from tests.plans import plan
from tests.test_common_model import PARAMS, images_of, targets_of

BF16 = torch.bfloat16


@pytest.fixture(params=[True, False])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("privacy", ["none", "dp_sgd"])
def test_a_plan_that_names_a_type_gets_it_on_every_processor(privacy: str, has_bfloat16: bool) -> None:
    assert compute_type(plan(privacy=privacy, training__precision="fp32")) is None
    assert compute_type(plan(privacy=privacy, training__precision="bf16")) is BF16


def test_auto_is_bfloat16_where_processor_model_and_clipping_gain_from_it(has_bfloat16: bool) -> None:
    expected = BF16 if has_bfloat16 else None
    assert compute_type(plan(training__precision="auto")) is expected
    assert compute_type(plan(training__precision="auto", privacy="none")) is expected
    assert compute_type(plan(training__precision="auto", privacy__clipping="hooks")) is None
    for name in NO_GAIN - {"unet"}:
        assert compute_type(plan(training__precision="auto", model=name)) is None


@pytest.mark.parametrize("way", ["hooks", "ghost", "ew"])
def test_bfloat16_with_a_way_to_clip_that_has_it_not_is_refused(way: str) -> None:
    asked = {"training__precision": "bf16", "training__cases_per_patient": 1}
    with pytest.raises(ConfigError, match=f"bf16 is not possible with privacy.clipping={way}"):
        plan(**asked, privacy__clipping=way)


def test_a_network_in_which_rounding_mixes_patients_is_not_trained_so() -> None:
    """Its deepest layers normalise a few values, which magnifies the last digit of each."""
    masks = {"model": "unet", "target": "mask", "training__precision": "bf16"}
    with pytest.raises(ConfigError, match="bf16 cannot train model=unet privately"):
        plan(**masks)
    assert set(NO_PRIVATE_BFLOAT16) <= NO_GAIN
    assert compute_type(plan(**masks, privacy="none")) is BF16


SMOOTH = [case for case in PARAMS if case.values[0].get("model") not in NO_PRIVATE_BFLOAT16]


def contributions(asked: Any, chosen: list[int], *, compute: torch.dtype | None) -> torch.Tensor:
    """What the first of the chosen cases contributes, and all others beside it in the batch do not change."""
    network = model.build(asked)
    images, targets = images_of(asked, num_cases=6), torch.from_numpy(targets_of(asked, num_cases=6))
    batch = Batch(
        images=images[chosen],
        values=torch.zeros(len(chosen), 0),
        targets=targets[chosen],
        owners=torch.arange(len(chosen)),
        num_patients=len(chosen),
    )
    found, _ = BookKeeping(network, compute=compute).contributions(batch)
    assert all(one.rows().dtype == torch.float32 for one in found)
    assert all(one.squared_norms().dtype == torch.float32 for one in found)
    return torch.cat([one.rows()[0].reshape(-1) for one in found])


@pytest.fixture(params=[False, True], ids=["no tiles", "tiles"])
def has_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(processor, "has_tiles", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    ("channels", "groups", "fills"), [((16, 32), 1, True), ((8, 16), 1, False), ((16, 16), 2, False)]
)
def test_only_bfloat16_is_slow_in_groups_and_only_on_tiles_that_are_not_full(
    has_tiles: bool, channels: tuple[int, int], groups: int, fills: bool
) -> None:
    layer = nn.Conv2d(*channels, 3, groups=groups)
    assert precision.is_slow_in_groups(BF16, layer) is (has_tiles and not fills)
    assert not precision.is_slow_in_groups(torch.float32, layer)


def test_channels_lie_side_by_side_in_bfloat16_where_no_layer_normalises_groups_of_them() -> None:
    article, grouped = model.build(plan(model="article_cnn", preprocessing="rgb64")), model.build(plan())
    assert precision.memory_format(article, BF16) == torch.channels_last
    assert precision.memory_format(article, None) == torch.contiguous_format
    assert precision.memory_format(grouped, BF16) == torch.contiguous_format


@pytest.mark.parametrize("channels", [1, 3])
def test_every_layer_of_images_takes_them_in_that_order(channels: int) -> None:
    """Also a first one of one channel, to which both orders are the same."""
    network = model.build(plan(model="article_cnn", preprocessing="rgb64"))
    seen = []
    for layer in network.modules():
        if isinstance(layer, nn.ReLU | nn.MaxPool2d | nn.Flatten):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    if channels == 1:
        network[0] = nn.Conv2d(1, 32, kernel_size=3)
    batch = Batch(
        images=torch.rand(4, channels, 64, 64),
        values=torch.zeros(4, 0),
        targets=torch.arange(4) % 2,
        owners=torch.arange(4),
        num_patients=4,
    )
    plain = PlainGradient(network, expected_batch=4, compute=BF16)
    for run in (plain.accumulate, BookKeeping(network, compute=BF16).contributions):
        seen.clear()
        run(batch)
        images = [one for one in seen if one.dim() == 4]
        assert len(images) == 4
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in images)


@pytest.mark.usefixtures("has_tiles")
@pytest.mark.parametrize("changes", SMOOTH)
def test_in_bfloat16_a_patient_contributes_nearly_the_same(changes: dict[str, Any]) -> None:
    asked = plan(**changes)
    exact, found = (contributions(asked, [0, 1], compute=kind) for kind in (None, BF16))
    assert not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.8


@pytest.mark.usefixtures("has_tiles")
@pytest.mark.parametrize("changes", SMOOTH)
@pytest.mark.parametrize("compute", [None, BF16])
def test_what_a_patient_contributes_does_not_depend_on_the_rest_of_the_batch(
    changes: dict[str, Any], compute: torch.dtype | None
) -> None:
    """But for rounding: else adding a patient would change more of the sum than the clipped bound."""
    asked = plan(**changes)
    alone = contributions(asked, [0], compute=compute)
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 5, 2], [0, 3]):
        beside = contributions(asked, chosen, compute=compute)
        assert (beside - alone).norm() <= 1e-4 * alone.norm()
