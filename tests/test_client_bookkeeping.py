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

from client import contribution, convolution, precision, processor
from client.book import Book
from client.bookkeeping import BookKeeping, NotSupported
from client.contribution import SHORT, Patches, Products, Rows, clip_factors, weighted_sums
from client.hooked import ExpandedWeights
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


@pytest.mark.parametrize("large", [1, 1 << 60])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shares_out", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv1d(3, 40, 1), nn.Conv2d(3, 40, 1, bias=False), nn.Conv3d(3, 40, 1)])
def test_pointwise_layers_contribute_the_same_as_products_and_as_convolutions(
    layer: nn.Module, shares_out: bool, threads: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them is faster depends on the processor, and on the threads that share the work."""
    monkeypatch.setattr(contribution, "LARGE", large)
    monkeypatch.setattr(processor, "shares_out_products", lambda: shares_out)
    sides = {nn.Conv1d: (16,), nn.Conv2d: (4, 5), nn.Conv3d: (2, 3, 4)}[type(layer)]
    network = nn.Sequential(copy.deepcopy(layer), nn.Tanh(), type(layer)(40, 50, 1), nn.Tanh())
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = torch.randn(5, 3, *sides, generator=torch.Generator().manual_seed(1))
        assert convolution._is_better_shared(images) == (threads > 1 and not shares_out)
        targets = torch.randn_like(network(images))
        require_equal(network, batch_of(images, targets, [1, 3, 1]))
    finally:
        torch.set_num_threads(former)


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


@settings(max_examples=60, deadline=None)
@given(
    cases=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    positions=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    shape=st.sampled_from([(4, 5), (40, 50)]),
)
def test_no_patient_of_products_is_longer_than_its_norm_says(
    cases: list[int], positions: int, seed: int, scale: float, shape: tuple[int, int]
) -> None:
    """Also where cases cancel: norms of products are differences of large numbers then. Those of the small
    shape are taken of the gradients themselves, those of the large one mostly of Gram matrices."""
    torch.manual_seed(seed)
    rows, columns = shape
    left = torch.randn(sum(cases), rows, positions) * scale
    right = torch.randn(1, columns, positions).expand(sum(cases), -1, -1) + 1e-4 * torch.randn(
        sum(cases), columns, positions
    )
    owners = torch.repeat_interleave(torch.arange(len(cases)), torch.tensor(cases))
    first = torch.searchsorted(owners, torch.arange(len(cases)))
    left[first] -= torch.zeros(len(cases), rows, positions).index_add_(
        0, owners, left
    )  # a patient's sum is 0
    shares = (1.0 / torch.tensor(cases))[owners]
    products = Products(left, right, torch.Size(shape), owners, shares, len(cases))
    told = products.squared_norms().sqrt()
    for patient in range(len(cases)):
        alone = products.weighted_sum(torch.eye(len(cases))[patient])
        assert float(alone.norm()) <= float(told[patient]) * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_patient_without_a_finite_gradient_counts_as_nothing_and_moves_no_other(bad: float) -> None:
    owners, shares = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.5, 0.5, 1.0])
    left, right = torch.rand(4, 2, 1), torch.rand(4, 3, 1)
    whole = Products(left.clone(), right, torch.Size([2, 3]), owners, shares, 3)
    expected = whole.rows()
    left[2, 0, 0] = bad
    broken = Products(left, right, torch.Size([2, 3]), owners, shares, 3)
    factors, kept = clip_factors([broken, Rows(torch.ones(3, 1))], bound=1e6)
    assert factors.tolist() == [1.0, 0.0, 1.0]
    torch.testing.assert_close(kept[0].weighted_sum(factors), expected[0] + expected[2])
    assert kept[1].weighted_sum(factors).tolist() == [2.0]


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
        isinstance(one, Book | Patches | Products | Rows | BackwardCFunction) for one in gc.get_objects()
    )


@pytest.mark.parametrize("changes", PARAMS)
def test_contributions_are_no_part_of_a_graph(changes: dict[str, Any]) -> None:
    """What is computed of them would keep every step of it in memory until the batch is over."""
    asked = plan(**changes)
    images, targets = images_of(asked, num_cases=2), torch.from_numpy(targets_of(asked, num_cases=2))
    found, losses = BookKeeping(model.build(asked)).contributions(batch_of(images, targets, [1, 1]))
    told = [losses, *(one.squared_norms() for one in found), *(one.weighted_sum(losses) for one in found)]
    assert not any(one.requires_grad for one in told)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3], [2, 2], [0, 3, 1]])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("rows", [4, 40])
def test_norms_of_products_and_patches_are_those_of_their_rows(
    counts: list[int], positions: int, rows: int
) -> None:
    torch.manual_seed(0)
    cases = sum(counts)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = (1.0 / torch.tensor(counts).clamp(min=1))[owners]
    of_patients = (owners, shares, len(counts))
    left, right = torch.randn(cases, rows, positions), torch.randn(cases, 50, positions)
    outer, inputs = torch.randn(cases, rows, 1, positions), torch.randn(cases, 3, 3, positions)
    geometry = ((3, 1), (1, 1), (1, 1))
    for found in (
        Products(left, right, torch.Size([rows, 50]), *of_patients),
        Patches(outer, inputs, geometry, torch.Size([rows, 3, 3, 3]), *of_patients),
    ):
        told, weights = found.rows(), torch.rand(len(counts))
        torch.testing.assert_close(
            found.squared_norms(), told.flatten(1).square().sum(dim=1), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(found.weighted_sum(weights), torch.einsum("p,p...->...", weights, told))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 7), st.integers(5, 6)),
    seed=st.integers(0, 2**31),
)
def test_norms_of_patches_are_those_of_their_rows_for_every_geometry(
    counts: list[int], kernel: Any, stride: Any, padding: Any, dilation: Any, size: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Conv2d(32, 64, kernel, stride, padding, dilation)  # large beside the Gram matrices
    inputs = torch.randn(sum(counts), 32, *size)
    outer = torch.randn_like(layer(inputs)).detach()
    found = patches_of(outer, inputs, counts, geometry=(stride, padding, dilation), shape=layer.weight.shape)
    told = found.rows().flatten(1).square().sum(dim=1)
    torch.testing.assert_close(found.squared_norms(), told, rtol=1e-4, atol=1e-4)


def test_patches_are_cut_only_where_gram_matrices_would_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []
    unfold = torch.nn.functional.unfold

    def noted(inputs: torch.Tensor, *geometry: Any) -> torch.Tensor:
        cut.append(len(inputs))
        return unfold(inputs, *geometry)

    monkeypatch.setattr(torch.nn.functional, "unfold", noted)
    geometry, shape = ((1, 1), (1, 1), (1, 1)), torch.Size([64, 64, 3, 3])
    for cases in (1, 2, 3, 30):
        sides = torch.randn(cases, 64, 4, 4), torch.randn(cases, 64, 4, 4)
        patches_of(*sides, [cases], geometry=geometry, shape=shape).squared_norms()
    assert cut == [3, 30]


def patches_of(
    outer: torch.Tensor, inputs: torch.Tensor, counts: list[int], *, geometry: Any, shape: torch.Size
) -> Patches:
    """Of patients with so many cases each, one at least."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = (1.0 / torch.tensor(counts))[owners]
    return Patches(outer, inputs, geometry, shape, owners, shares, len(counts))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_no_patient_of_patches_is_longer_than_its_norm_says_where_its_cases_cancel(scale: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1, 64, 4, 4).expand(4, -1, -1, -1) + 1e-4 * torch.randn(4, 64, 4, 4)
    outer = torch.randn(2, 64, 4, 4) * scale
    found = patches_of(
        torch.cat([outer, -outer])[[0, 2, 1, 3]],
        inputs,
        [2, 2],
        geometry=((1, 1), (1, 1), (1, 1)),
        shape=torch.Size([64, 64, 3, 3]),
    )
    for patient, told in enumerate(found.squared_norms().sqrt()):
        alone = found.weighted_sum(torch.eye(2)[patient])
        assert float(alone.norm()) <= float(told) * (1 + 1e-5)


def test_sums_done_together_are_those_of_each_parameter() -> None:
    """Short rows, rows of exactly as many numbers and of one more, and what is no rows."""
    torch.manual_seed(0)
    owners, shares = torch.arange(3), torch.ones(3)
    products = Products(torch.randn(3, 4, 2), torch.randn(3, 5, 2), torch.Size([4, 5]), owners, shares, 3)
    rows = [Rows(torch.randn(3, *shape)) for shape in ((), (2, 3), (SHORT,), (SHORT + 1,), (1, 7))]
    contributions = [rows[0], products, *rows[1:]]
    weights = torch.rand(3)
    expected = [one.weighted_sum(weights) for one in contributions]
    together = torch.cat([one.rows().reshape(3, -1) for one in contributions], dim=1).norm(dim=1)
    factors, same = clip_factors(contributions, bound=1.0)  # shorter than all: each norm decides
    torch.testing.assert_close(factors, 1.0 / together, rtol=1e-5, atol=0.0)
    assert same is contributions
    found = weighted_sums(contributions, weights)
    assert contributions == []
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.flatten())
