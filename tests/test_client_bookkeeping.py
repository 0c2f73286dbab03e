"""What book-keeping says of each patient is what autograd says, taken one patient at a time."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from client import convolution, precision
from client.book import Book
from client.bookkeeping import BookKeeping, NotSupported
from client.contribution import Postponed, Products, Rows
from client.hooked import ExpandedWeights
from client.patches import Patches
from client.training import Batch, case_losses
from common import model
from common.layout import with_quick_layers
from common.plan import NO_EXPANDED_WEIGHTS
from tests.plans import plan
from tests.test_common_model import PARAMS, images_of, targets_of

PRECISION = {torch.float64: 1e-5, torch.float32: 1e-4}


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of each case that no layer makes trivial."""
    return (outputs * targets).flatten(1).tanh().sum(dim=1)


def batch_of(images: Tensor, targets: Tensor, cases: list[int]) -> Batch:
    """``cases``: how many belong to each patient."""
    owners = torch.repeat_interleave(torch.arange(len(cases)), torch.tensor(cases))
    return Batch(
        images=images,
        values=torch.zeros(len(images), 0),
        targets=targets,
        owners=owners,
        num_patients=len(cases),
    )


def one_by_one(network: nn.Module, batch: Batch, losses: Any = summed) -> list[Tensor]:
    """The oracle: for each parameter (num_patients, *shape), by one ordinary backward pass a patient."""
    by_patient = []
    for patient in range(batch.num_patients):
        own = batch.owners == patient
        loss = losses(network(batch.images[own].clone()), batch.targets[own]).mean()
        by_patient.append(
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True)
        )
    return [torch.stack(parts) for parts in zip(*by_patient, strict=True)]


def require_equal(network: nn.Module, batch: Batch, losses: Any = summed) -> None:
    """Rows, norms and weighted sums are those of the oracle."""
    nearness = PRECISION[next(network.parameters()).dtype]
    expected = one_by_one(network, batch, losses)
    keeping = BookKeeping(network)
    found, _ = keeping.contributions(batch, losses=losses)
    keeping.detach()
    weights = torch.linspace(0.1, 1.0, batch.num_patients, dtype=expected[0].dtype)
    scale = max(float(rows.abs().max()) for rows in expected)
    for one, rows in zip(found, expected, strict=True):
        near = {"rtol": nearness, "atol": nearness * max(scale, 1e-3)}
        torch.testing.assert_close(one.rows(), rows, **near)
        torch.testing.assert_close(one.weighted_sum(weights), torch.tensordot(weights, rows, 1), **near)
    norms = (
        torch.stack([rows.reshape(len(rows), -1).square().sum(dim=1) for rows in expected]).sum(dim=0).sqrt()
    )
    told = torch.stack([one.squared_norms() for one in found]).sum(dim=0).sqrt()
    torch.testing.assert_close(told, norms, rtol=nearness, atol=nearness)
    assert all(parameter.grad is None for parameter in network.parameters())


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer and the shape of one case."""
    kind = draw(
        st.sampled_from(["linear", "sequence", "convolution", "transposed", "group", "layer", "instance"])
    )
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    width, widened = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    side = draw(st.integers(5, 6))
    bias = draw(st.booleans())
    match kind:
        case "linear":
            return nn.Linear(width, widened, bias=bias), (width,)
        case "sequence":
            return nn.Linear(width, widened, bias=bias), (side, width)
        case "group":
            return nn.GroupNorm(groups, width), (width, *[side] * dims)
        case "layer":
            return nn.LayerNorm((side, width), bias=bias), (3, side, width)
        case "instance":
            return NORMS[dims](width, affine=True), (width, *[side] * dims)
    settings: dict[str, Any] = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "groups": groups,
        "bias": bias,
    }
    if kind == "transposed":
        return TRANSPOSED[dims](width, widened, **settings), (width, *[side] * dims)
    if draw(st.booleans()):
        settings |= {"padding": draw(st.sampled_from(["same", "valid"])), "stride": 1}
    settings["padding_mode"] = draw(st.sampled_from(["zeros", "circular"]))
    return CONVOLUTIONS[dims](width, widened, **settings), (width, *[side] * dims)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=60, deadline=None)
@given(
    layer=layers(),
    cases=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    is_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_patient_contributes_what_autograd_says(
    dtype: torch.dtype,
    layer: tuple[nn.Module, tuple[int, ...]],
    cases: list[int],
    is_first: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    module, shape = layer
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    network = nn.Sequential(module if is_first else nn.Sequential(_Scaled(), module)).to(dtype)
    images = torch.randn(sum(cases), *shape, dtype=dtype)
    targets = torch.randn_like(network(images))
    require_equal(network, batch_of(images, targets, cases))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("is_cut", [False, True])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_patches_that_are_cut_and_cases_as_groups_contribute_the_same(
    dims: int, is_cut: bool, data: st.DataObject
) -> None:
    kernel, stride, padding = (data.draw(st.tuples(*[st.integers(*ends)] * dims)) for ends in GEOMETRY)
    layer = CONVOLUTIONS[dims](3, 4, kernel, stride, padding, bias=data.draw(st.booleans())).double()
    images = torch.randn(6, 3, *[8] * dims, dtype=torch.float64)
    targets = torch.randn_like(layer(images))
    channels = 10**6 if is_cut else 0
    with pytest.MonkeyPatch.context() as changed, calls_of(convolution, "_by_position") as cuts:
        changed.setattr(convolution, "FEW_CHANNELS", {False: channels, True: channels})
        changed.setattr(convolution, "PATCH_NUMBERS", data.draw(st.sampled_from([1, 10**4])))
        require_equal(nn.Sequential(layer), batch_of(images, targets, [2, 1, 3]))
    assert bool(cuts) is is_cut


GEOMETRY = ((2, 3), (1, 2), (0, 2))
"""The least and the greatest kernel, stride and padding."""


@contextmanager
def calls_of(module: Any, name: str) -> Iterator[list[Any]]:
    """Yields the arguments of each call of a function while it is open."""
    calls: list[Any] = []
    function = getattr(module, name)

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(module, name, called)
        yield calls


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_channels_that_lie_side_by_side_contribute_what_rows_do(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each kind of convolution, and what stands between them, which keeps that order of memory."""
    monkeypatch.setattr(precision, "memory_format", lambda *_: torch.channels_last)
    monkeypatch.setattr(convolution, "PATCH_NUMBERS", 1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(channels, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 12, 3, stride=2, padding=(1, 2)),
        nn.Conv2d(12, 12, 3, groups=3, padding="same"),
        nn.Conv2d(12, 10, 3, dilation=2, padding=2),
        nn.ConvTranspose2d(10, 9, 2),
        nn.Conv2d(9, 8, 1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 7, 2),
    ).double()
    images = torch.randn(6, channels, 20, 20, dtype=torch.float64)
    batch = batch_of(images, torch.randn(6, 2, dtype=torch.float64), [2, 1, 3])
    with calls_of(convolution, "_by_channel") as cuts:
        require_equal(with_quick_layers(network), batch)
    in_order = [outer.is_contiguous(memory_format=torch.channels_last) for outer, _ in cuts]
    assert len(in_order) >= len(images) and all(in_order)


class _Scaled(nn.Module):
    """A layer of a kind that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.scale).sin()


@pytest.mark.parametrize("side", [4, 9])
@pytest.mark.parametrize("layer", [nn.Conv1d(3, 40, 1), nn.Conv2d(3, 40, 1, bias=False), nn.Conv3d(3, 40, 1)])
def test_pointwise_layers_contribute_the_same_as_products_and_as_convolutions(
    layer: nn.Module, side: int
) -> None:
    """The first are of few positions; of a flat image's 16 and 81, the latter are not."""
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[type(layer)]
    network = nn.Sequential(copy.deepcopy(layer), nn.Tanh(), type(layer)(40, 50, 1), nn.Tanh())
    images = torch.randn(5, 3, *[side] * axes, generator=torch.Generator().manual_seed(1))
    require_equal(network, batch_of(images, torch.randn_like(network(images)), [1, 3, 1]))


@pytest.mark.parametrize("cases", [[1, 1, 1], [2, 1, 3]])
def test_an_embedding_is_counted_by_patient(cases: list[int]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)).double()
    words = torch.randint(0, 5, (sum(cases), 4))
    targets = torch.randn(sum(cases), 2, dtype=torch.float64)
    require_equal(network, batch_of(words, targets, cases))


class _Residual(nn.Module):
    """Adds in place to what a layer gave, and uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.GroupNorm(3, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        seen: Tensor = self.norm(self.layer(images))
        seen += images
        seen = self.layer(seen.relu_())
        seen += images
        return seen


@pytest.mark.parametrize("cases", [[1, 1, 1], [2, 1, 3]])
def test_a_layer_used_twice_and_additions_in_place_are_counted_rightly(cases: list[int]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), _Residual()).double()
    images = torch.randn(sum(cases), 1, 6, 6, dtype=torch.float64)
    require_equal(network, batch_of(images, torch.randn(sum(cases), 3, 6, 6).double(), cases))


@pytest.mark.parametrize("cases", [[1, 1, 1], [2, 1]])
@pytest.mark.parametrize("changes", PARAMS)
def test_every_network_of_conf_is_known_and_exact(changes: dict[str, Any], cases: list[int]) -> None:
    asked = plan(**changes)
    network = model.build(asked).double()
    images = images_of(asked, num_cases=3).double()
    targets = torch.from_numpy(targets_of(asked, num_cases=3))
    require_equal(network, batch_of(images, targets, cases), case_losses)


@pytest.mark.parametrize("changes", PARAMS)
def test_expanded_weights_train_the_networks_for_which_a_plan_may_ask_for_them(
    changes: dict[str, Any],
) -> None:
    asked = plan(**changes)
    batch = batch_of(images_of(asked, num_cases=2), torch.from_numpy(targets_of(asked, num_cases=2)), [1, 1])
    expanded = ExpandedWeights(model.build(asked))
    if asked.model.name in NO_EXPANDED_WEIGHTS:
        with pytest.raises(RuntimeError):
            expanded.contributions(batch)
    else:
        found, _ = expanded.contributions(batch)
        assert all(one.rows().isfinite().all() for one in found)


def test_a_module_with_parameters_beside_its_layers_is_refused_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.layer = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1)

    with pytest.raises(NotSupported, match="Own"):
        BookKeeping(Own())


def test_detached_layers_have_their_own_forward_again() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    BookKeeping(network).detach()
    assert all("forward" not in layer.__dict__ for layer in network.modules())
    network(torch.zeros(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("changes", PARAMS)
def test_nothing_of_a_batch_is_kept_when_its_contributions_are_gone(changes: dict[str, Any]) -> None:
    """Contributions may share memory with the graph that made them; such a ring is never collected."""
    asked = plan(**changes)
    network = model.build(asked)
    images, targets = images_of(asked, num_cases=2), torch.from_numpy(targets_of(asked, num_cases=2))
    batch = batch_of(images, targets, [1, 1])
    keeping = BookKeeping(network)
    before = alive()
    for _ in range(2):
        found, _ = keeping.contributions(batch)
        del found
    assert alive() == before


def alive() -> int:
    """How many books, contributions and parts of graphs there are in this process."""
    gc.collect()
    return sum(
        isinstance(one, Book | Patches | Postponed | Products | Rows | BackwardCFunction)
        for one in gc.get_objects()
    )


@pytest.mark.parametrize("changes", PARAMS)
def test_contributions_are_no_part_of_a_graph(changes: dict[str, Any]) -> None:
    """What is computed of them would keep every step of it in memory until the batch is over."""
    asked = plan(**changes)
    images, targets = images_of(asked, num_cases=2), torch.from_numpy(targets_of(asked, num_cases=2))
    found, losses = BookKeeping(model.build(asked)).contributions(batch_of(images, targets, [1, 1]))
    told = [losses, *(one.squared_norms() for one in found), *(one.weighted_sum(losses) for one in found)]
    assert not any(one.requires_grad for one in told)


@pytest.mark.parametrize("side, is_postponed", [(6, True), (30, False)])
def test_rows_wait_while_what_they_are_made_of_is_smaller(side: int, is_postponed: bool) -> None:
    """While the backward pass goes on, the network's activations are in memory."""
    network = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * side**2, 2))
    batch = batch_of(torch.randn(3, 32, side, side), torch.randn(3, 2), [1, 2])
    keeping = BookKeeping(network)
    (weights, *_), _ = keeping.contributions(batch, losses=summed)
    assert isinstance(weights, Postponed) == is_postponed
    keeping.detach()
    require_equal(network, batch)
