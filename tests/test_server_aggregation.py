"""Robust rules against the published definitions, computed here in a few lines of numpy."""

from __future__ import annotations

import gc
import logging
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from common import exchange, flower, model
from common.arrays import unpacked
from common.config import compose_plan
from common.errors import ConfigError, QuorumNotReached
from common.exchange import Update
from common.plan import Plan
from server import app
from server.aggregation import Robust, strategy_of
from server.heads import Heads
from server.report import Report
from tests.grid import InlineGrid
from tests.rounds import site, tiny_plan

Array = np.ndarray[Any, np.dtype[Any]]
ROBUST = ("krum", "multikrum", "fedtrimmedavg", "fedmedian", "bulyan")
SIZE = 20


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """As in a coordinator: Flower's Bulyan collects garbage for every update."""
    gc.freeze()


def robust_plan(name: str, *, sites: int = 11, quorum: int = 7, **changes: Any) -> Plan:
    fields: dict[str, Any] = {f"strategy__{key}": value for key, value in changes.items()}
    fields = {"strategy__weights": "equal", "rounds": 1, "sites": sites, "quorum": quorum} | fields
    return tiny_plan(strategy=name, **fields)


def messages(
    updates: Array, *, weights: list[float] | None = None, losses: list[float] | None = None
) -> list[Message]:
    flower.set_identity(1, node_id=1)
    replies = []
    for number, values in enumerate(updates):
        update = Update(
            server_round=1,
            arrays={"values": values.astype(np.float32)},
            weight=(weights or [1.0] * len(updates))[number],
            train_loss=(losses or [1.0] * len(updates))[number],
        )
        replies.append(Message(exchange.update_record(update), dst_node_id=number, message_type="train"))
    return replies


def aggregated(plan: Plan, updates: Array, **said: Any) -> Array:
    arrays, _ = strategy_of(plan, nodes=lambda purpose: []).aggregate_train(1, messages(updates, **said))
    assert arrays is not None
    found: Array = unpacked(arrays["update"])
    assert found.dtype == np.float32
    return found


def krum_scores(updates: Array, f: int) -> Array:
    """For each update the sum of squared distances to its n - f - 2 nearest others."""
    n = len(updates)
    scores = []
    for i in range(n):
        distances = sorted(float(((updates[i] - updates[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(distances[: max(1, n - f - 2)]))
    return np.array(scores)


def krum(updates: Array, f: int) -> Array:
    return updates[np.argmin(krum_scores(updates, f))]


def multikrum(updates: Array, f: int, m: int, weights: Array) -> Array:
    chosen = np.argsort(krum_scores(updates, f))[:m]
    return np.average(updates[chosen], axis=0, weights=weights[chosen])


def trimmed_mean(updates: Array, beta: float) -> Array:
    cut = int(beta * len(updates))
    return np.sort(updates, axis=0)[cut : len(updates) - cut].mean(axis=0)


def bulyan(updates: Array, f: int) -> Array:
    """Krum selects n - 2f one after another; for each coordinate the mean of the n - 4f about the median.

    Near the end two updates that are each other's nearest have one score: the definition leaves open which
    comes first, and ours takes them in the order of their bytes.
    """
    left, selected = sorted(updates, key=lambda values: values.tobytes()), []
    while len(selected) < len(updates) - 2 * f:
        selected.append(left.pop(int(np.argmin(krum_scores(np.array(left), f)))))
    chosen, result = np.array(selected), []
    for column, median in zip(chosen.T, np.median(chosen, axis=0), strict=True):
        subsets = {
            some: np.abs(np.array(some) - median).sum() for some in combinations(column, len(chosen) - 2 * f)
        }
        result.append(np.mean(min(subsets, key=lambda some: subsets[some])))
    return np.array(result)


def drawn(seed: int, n: int, *, hostile: int = 0) -> Array:
    """Updates as rows; those of hostile sites, the last, are far away."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(n, SIZE))
    updates[n - hostile :] *= 5
    return updates.astype(np.float32).astype(np.float64)


CASES = st.tuples(st.integers(0, 2**32 - 1), st.integers(7, 11), st.integers(0, 2))


@settings(deadline=None, max_examples=30)
@given(CASES, st.integers(1, 2))
def test_krum_is_that_of_blanchard(case: tuple[int, int, int], f: int) -> None:
    updates = drawn(case[0], case[1], hostile=case[2])
    found = aggregated(robust_plan("krum", num_malicious_nodes=f), updates)
    np.testing.assert_array_equal(found, krum(updates, f).astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(CASES, st.integers(2, 4))
def test_multikrum_is_the_weighted_mean_of_the_best_by_krum(case: tuple[int, int, int], m: int) -> None:
    updates = drawn(case[0], case[1], hostile=case[2])
    weights = [float(1 + number % 3) for number in range(len(updates))]
    plan = robust_plan("multikrum", num_malicious_nodes=1, num_nodes_to_select=m, weights="nominal")
    found = aggregated(plan, updates, weights=weights)
    np.testing.assert_allclose(found, multikrum(updates, 1, m, np.array(weights)), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(CASES, st.sampled_from([0.15, 0.2, 0.4]))
def test_trimmed_mean_is_that_of_yin(case: tuple[int, int, int], beta: float) -> None:
    updates = drawn(case[0], case[1], hostile=case[2])
    found = aggregated(robust_plan("fedtrimmedavg", beta=beta), updates)
    np.testing.assert_allclose(found, trimmed_mean(updates, beta), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(CASES)
def test_median_is_that_of_yin(case: tuple[int, int, int]) -> None:
    updates = drawn(case[0], case[1], hostile=case[2])
    found = aggregated(robust_plan("fedmedian"), updates)
    np.testing.assert_allclose(found, np.median(updates, axis=0), atol=1e-6)


@settings(deadline=None, max_examples=8)
@given(CASES, st.integers(1, 2))
def test_bulyan_is_that_of_el_mhamdi(case: tuple[int, int, int], f: int) -> None:
    updates = drawn(case[0], max(case[1], 4 * f + 3), hostile=case[2])
    found = aggregated(robust_plan("bulyan", num_malicious_nodes=f, quorum=4 * f + 3), updates)
    np.testing.assert_allclose(found, bulyan(updates, f), atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(9)))
def test_any_order_of_arrival_gives_the_same_bits_under_every_rule(
    name: str, seed: int, order: list[int]
) -> None:
    updates = drawn(seed, 9, hostile=2)
    plan = robust_plan(name)
    losses = [0.1 * number for number in range(9)]
    strategy = strategy_of(plan, nodes=lambda purpose: [])
    replies = messages(updates, losses=losses)
    one = strategy.aggregate_train(1, iter(replies))
    other = strategy.aggregate_train(1, [replies[place] for place in order])
    assert one[0]["update"].data == other[0]["update"].data
    assert dict(one[1]) == dict(other[1])


@pytest.mark.parametrize("name", ROBUST)
def test_one_hostile_update_hardly_moves_the_result(name: str) -> None:
    honest = 1 + 0.1 * drawn(3, 7)
    together = np.concatenate([honest, np.full((1, SIZE), -1000.0)])
    found = aggregated(robust_plan(name), together)
    assert (honest.min(axis=0) - 1e-6 <= found).all() and (found <= honest.max(axis=0) + 1e-6).all()
    assert (aggregated(tiny_plan(strategy__update_bound=1024.0), together) < -100).all()


@pytest.mark.parametrize("name", ROBUST)
def test_the_loss_is_the_median_that_one_site_cannot_choose(name: str) -> None:
    replies = messages(drawn(1, 7), losses=[0.5] * 6 + [1e300])
    _, metrics = strategy_of(robust_plan(name), nodes=lambda purpose: []).aggregate_train(1, replies)
    assert metrics is not None and metrics["train-loss"] == 0.5


def test_updates_that_differ_far_behind_the_decimal_point_of_their_length_are_told_apart() -> None:
    """Flower's distances are differences of squares, which float32 cannot hold."""
    updates = 1000 + 0.01 * drawn(5, 7)
    updates = updates.astype(np.float32).astype(np.float64)
    found = aggregated(robust_plan("krum"), updates)
    np.testing.assert_array_equal(found, krum(updates, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "changes", "least"),
    [
        ("krum", {"num_malicious_nodes": 1}, 5),
        ("krum", {"num_malicious_nodes": 3}, 9),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 2}, 5),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 5}, 8),
        ("fedtrimmedavg", {"beta": 0.2}, 5),
        ("fedtrimmedavg", {"beta": 0.3}, 4),
        ("fedtrimmedavg", {"beta": 0.1}, 10),
        ("fedmedian", {}, 3),
        ("bulyan", {"num_malicious_nodes": 1}, 7),
        ("bulyan", {"num_malicious_nodes": 2}, 11),
    ],
)
def test_a_quorum_below_the_condition_of_a_rule_is_refused(
    name: str, changes: dict[str, Any], least: int
) -> None:
    plan = robust_plan(name, quorum=least, **changes)
    assert plan.strategy.least_updates == least
    told = rf"expected plan.quorum >= {least} with strategy={name} \(.*found {least - 1}"
    with pytest.raises(ConfigError, match=told):
        robust_plan(name, quorum=least - 1, **changes)


@pytest.mark.parametrize("name", sorted({*ROBUST} - {"fedtrimmedavg"}))
def test_a_rule_promises_nothing_below_its_condition(name: str) -> None:
    plan = robust_plan(name)
    strategy = strategy_of(plan, nodes=lambda purpose: [])
    least = plan.strategy.least_updates
    assert strategy.aggregate_train(1, messages(drawn(1, least)))[0] is not None
    assert strategy.aggregate_train(1, messages(drawn(1, least - 1))) == (None, None)


@pytest.mark.parametrize("n", [3, 5, 7, 10, 49, 107])
def test_a_trimmed_mean_leaves_something_out_from_its_least_number_on(n: int) -> None:
    """Flower cuts int(beta * n) values, which in floats may be one fewer than one thinks."""
    plan = robust_plan("fedtrimmedavg", beta=1 / n - 1e-9, sites=500, quorum=300)
    least = plan.strategy.least_updates
    assert all(int(plan.strategy.beta * number) >= 1 for number in range(least, least + 50))
    assert int(plan.strategy.beta * (least - 1)) == 0


@pytest.mark.parametrize("name", sorted({*ROBUST} - {"multikrum"}))
def test_weights_are_refused_where_a_rule_knows_none(name: str) -> None:
    with pytest.raises(ConfigError, match="strategy.*weights"):
        robust_plan(name, weights="nominal")


@pytest.mark.parametrize("name", ROBUST)
def test_every_rule_composes_from_conf(name: str) -> None:
    overrides = ["plan.classes=[a,b]", "plan.sites=9", "plan.quorum=9", f"strategy={name}"]
    assert compose_plan(overrides).strategy.name == name


@pytest.mark.parametrize("name", ROBUST)
def test_a_run_with_a_hostile_site_moves_with_the_honest_ones(name: str, tmp_path: Path) -> None:
    plan = robust_plan(name, sites=7, quorum=7)
    steps = {f"s{number}": 0.5 for number in range(6)} | {"bad": -15.0}
    nodes = {name: site(plan, name, step) for name, step in steps.items()}
    grid = InlineGrid(nodes)
    app.coordinate(grid, plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test")
    report = Report.read(tmp_path)
    assert report.rounds[0].sites_valid == 7
    from safetensors.numpy import load_file

    moved = load_file(tmp_path / "model.safetensors")
    start = model.named_arrays(model.build(plan), model.flatten(model.build(plan)))
    for key, values in moved.items():
        np.testing.assert_allclose(values - start[key], 0.5, atol=1e-6)


def test_a_round_below_the_condition_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    plan = robust_plan("krum", sites=6, quorum=5)
    nodes = {f"s{number}": site(plan, f"s{number}", 0.5) for number in range(4)}
    grid, heads = InlineGrid(nodes), Heads(tmp_path / "heads")
    told = "at least 5 valid updates in round 1 for strategy=krum, found 4 of 4"
    with pytest.raises(QuorumNotReached, match=told):
        app.coordinate(grid, plan, run="r", directory=tmp_path, heads=heads, engine="test")


def test_flowers_rules_write_nothing_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("flwr").propagate = True
        aggregated(robust_plan("krum"), drawn(1, 7))
        logging.getLogger("flwr").propagate = False
    assert not caplog.records


def test_the_mean_needs_no_rule_and_streams() -> None:
    strategy = strategy_of(tiny_plan(), nodes=lambda purpose: [])
    assert not isinstance(strategy, Robust)
