"""The round loop against sites that misbehave in every way that was seen to break Flower's own."""

from __future__ import annotations

import gc
import io
import math
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from common import exchange, metrics, model
from common.arrays import STYPE, packed, unpacked
from common.calibration import measure_noise_std
from common.errors import QuorumNotReached
from common.exchange import Scored
from common.metrics import Histogram
from common.plan import Plan
from server import app, checkpoint
from server.heads import Heads
from server.norm import largest_norm
from server.report import Report
from server.strategy import FedAvg
from tests.grid import Behaviour, InlineGrid
from tests.rounds import Edit, dies, moved, run, site, tiny_plan


def test_the_model_moves_by_the_mean_update_of_every_round(tmp_path: Path) -> None:
    plan = tiny_plan()
    nodes = {f"s{i}": site(plan, f"s{i}", step) for i, step in enumerate([0.5, 0.25, 0.125, 0.125])}
    rounds = run(plan, nodes, tmp_path)
    np.testing.assert_allclose(moved(rounds, plan), 2 * 0.25, atol=1e-6)
    assert [entry.sites_valid for entry in rounds.state.rounds] == [4, 4]


def test_no_reply_is_kept_once_it_is_added(tmp_path: Path) -> None:
    """Not even until the garbage collector comes, which counts objects and not their 100 MB."""
    plan = tiny_plan()
    made: list[weakref.ref[RecordDict]] = []
    alive: list[int] = []

    def watched(behave: Behaviour) -> Behaviour:
        def answer(message: Message) -> Message | None:
            alive.append(sum(one() is not None for one in made))
            reply = behave(message)
            if reply is not None and message.metadata.message_type == exchange.TRAIN:
                made.append(weakref.ref(reply.content))
            return reply

        return answer

    gc.collect()
    gc.disable()
    try:
        run(plan, {f"s{i}": watched(site(plan, f"s{i}", 0.5)) for i in range(4)}, tmp_path)
    finally:
        gc.enable()
    assert len(made) == 8 and max(alive) == 0


def test_server_learning_rate_scales_the_mean_update(tmp_path: Path) -> None:
    plan = tiny_plan(**{"strategy__server_learning_rate": 0.5, "rounds": 1})
    nodes = {f"s{i}": site(plan, f"s{i}", 0.5) for i in range(4)}
    np.testing.assert_allclose(moved(run(plan, nodes, tmp_path), plan), 0.25, atol=1e-6)


def test_server_momentum_takes_part_of_the_last_step_again(tmp_path: Path) -> None:
    plan = tiny_plan(**{"strategy__server_momentum": 0.5, "strategy__server_learning_rate": 0.5, "rounds": 3})
    nodes = {f"s{i}": site(plan, f"s{i}", 0.5) for i in range(4)}
    steps = 0.5 + 0.75 + 0.875  # v = 0.5 v + 0.5
    np.testing.assert_allclose(moved(run(plan, nodes, tmp_path), plan), 0.5 * steps, atol=1e-6)


def _raises(record: RecordDict, message: Message) -> Message:
    return Message(Error(code=2, reason="<class 'RuntimeError'>:<patient no-4711>"), reply_to=message)


def _edited(record: RecordDict, name: str, array: Array) -> RecordDict:
    return RecordDict({**record, "arrays": ArrayRecord({name: array})})


def _with_metrics(record: RecordDict, **fields: float) -> RecordDict:
    known = dict(record.metric_records["metrics"])
    return RecordDict({**record, "metrics": MetricRecord({**known, **fields})})


def _values(record: RecordDict) -> np.ndarray[Any, Any]:
    return unpacked(record.array_records["arrays"]["update"])


MISBEHAVIOUR: dict[str, tuple[Edit, str]] = {
    "raises": (_raises, "error_2"),
    "dies": (dies, "error_8"),
    "refuses": (lambda r, m: exchange.refusal_record("budget_exceeded"), "refused_budget_exceeded"),
    "refuses with text": (lambda r, m: exchange.refusal_record("Mr Smith /data/x.dcm"), "refused"),
    "NaN": (lambda r, m: _edited(r, "update", packed(_values(r) * np.float32("nan"))), "non_finite"),
    "infinity": (lambda r, m: _edited(r, "update", packed(_values(r) * np.float32("inf"))), "non_finite"),
    "wrong shape": (lambda r, m: _edited(r, "update", packed(_values(r)[:-1])), "shape"),
    "two-dimensional": (lambda r, m: _edited(r, "update", packed(_values(r)[None])), "shape"),
    "lying shape": (
        lambda r, m: _edited(r, "update", _lying(_values(r))),
        "shape",
    ),
    "float64": (lambda r, m: _edited(r, "update", packed(_values(r).astype(np.float64))), "dtype"),
    "other key": (lambda r, m: _edited(r, "weights", packed(_values(r))), "records"),
    "no metrics": (lambda r, m: RecordDict({"arrays": r["arrays"]}), "records"),
    "extra record": (lambda r, m: RecordDict({**r, "more": ConfigRecord({"patient": "x"})}), "records"),
    "extra metric": (lambda r, m: _with_metrics(r, **{"num-examples": 3}), "records"),
    "negative weight": (lambda r, m: _with_metrics(r, weight=-10), "weight"),
    "zero weight": (lambda r, m: _with_metrics(r, weight=0), "weight"),
    "huge weight": (lambda r, m: _with_metrics(r, weight=1e12), "weight"),
    "NaN weight": (lambda r, m: _with_metrics(r, weight=float("nan")), "non_finite"),
    "other round": (lambda r, m: _with_metrics(r, **{"server-round": 7}), "server_round"),
    "executable": (lambda r, m: _edited(r, "update", _executable(_values(r))), "shape"),
    "a million parts": (lambda r, m: _edited(r, "update", packed(np.tile(_values(r), 1000))), "shape"),
    "text as weight": (lambda r, m: RecordDict({**r, "metrics": ConfigRecord({"weight": "1"})}), "records"),
    "large norm": (lambda r, m: _edited(r, "update", packed(_values(r) * 0 + np.float32(9))), "norm"),
    "out of bound": (lambda r, m: _edited(r, "update", packed(_values(r) + np.float32(1e3))), "out_of_bound"),
    "silent": (lambda r, m: None, "missing"),
}


class _Trap:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def _executable(values: np.ndarray[Any, Any]) -> Array:
    """An array of objects, which numpy would unpickle, that says it is what it should be."""
    stream = io.BytesIO()
    np.save(stream, np.array([_Trap()] * len(values)), allow_pickle=True)
    return Array(dtype="float32", shape=values.shape, stype=STYPE, data=stream.getvalue())


def _lying(values: np.ndarray[Any, Any]) -> Array:
    honest = packed(np.zeros(3, dtype=np.float32))
    return Array(dtype="float32", shape=tuple(values.shape), stype=honest.stype, data=honest.data)


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_a_site_that_misbehaves_is_left_out_and_named_and_the_run_completes(
    kind: str, tmp_path: Path
) -> None:
    edit, code = MISBEHAVIOUR[kind]
    plan = tiny_plan(**{"sites": 3, "reply_deadline_seconds": 0.3, "strategy__max_update_norm": 100.0})
    nodes = {
        "good-a": site(plan, "good-a", 0.5),
        "good-b": site(plan, "good-b", 0.25),
        "bad": site(plan, "bad", 1.0, edit=edit),
    }
    rounds = run(plan, nodes, tmp_path)
    np.testing.assert_allclose(moved(rounds, plan), 2 * 0.375, atol=1e-6)
    assert rounds.state.attendance["bad"].problems == {code: 2}
    assert rounds.state.attendance["bad"].valid == 0
    told = (tmp_path / "events.jsonl").read_text()
    assert "no-4711" not in told and "Smith" not in told


class BrokenGrid(InlineGrid):
    """Raises over the replies of one site, as Flower's does over parts that are not what they say."""

    error: Exception = ValueError("not JSON")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            is_training = self.pushed[-1].metadata.message_type == exchange.TRAIN
            if is_training and self.names[reply.metadata.src_node_id] == "bad":
                raise self.error
        return replies


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), TypeError("x"), RecursionError(), MemoryError(), DecodeError()]
)
def test_a_reply_that_flower_cannot_put_together_costs_its_site_only(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(**{"sites": 3})
    monkeypatch.setattr(BrokenGrid, "error", error)
    nodes = {name: site(plan, name, step) for name, step in (("a", 0.5), ("bad", 9.0), ("c", 0.25))}
    rounds = run(plan, nodes, tmp_path, grid=BrokenGrid)
    np.testing.assert_allclose(moved(rounds, plan), 2 * 0.375, atol=1e-6)
    assert rounds.state.attendance["bad"].problems == {"unreadable": 2}


class RepeatingGrid(InlineGrid):
    """Hands out every reply, and behind it another by the same site."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in super().pull_messages(message_ids):
            yield reply
            if "arrays" in reply.content:
                twice = _edited(reply.content, "update", packed(_values(reply.content) * np.float32(8)))
                yield Message(twice, reply_to=self.pushed[-1])


def test_a_second_reply_to_one_message_is_never_looked_at(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 2})
    nodes = {name: site(plan, name, step) for name, step in (("a", 0.5), ("b", 0.25))}
    rounds = run(plan, nodes, tmp_path, grid=RepeatingGrid)
    np.testing.assert_allclose(moved(rounds, plan), 2 * 0.375, atol=1e-6)


class Doubled(FedAvg):
    """Asks every site twice."""

    def configure_train(self, *arguments: Any) -> list[Message]:
        return [message for message in super().configure_train(*arguments) for _ in range(2)]


def test_a_second_reply_of_a_site_in_one_round_is_rejected(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 2, "rounds": 1})
    nodes = {name: site(plan, name, step) for name, step in (("a", 0.5), ("b", 0.25))}
    rounds = run(plan, nodes, tmp_path, strategy=Doubled)
    np.testing.assert_allclose(moved(rounds, plan), 0.375, atol=1e-6)
    assert rounds.state.rounds[0].sites_valid == 2
    assert rounds.state.attendance["a"].problems == {"second_reply": 1}


class StallingGrid(InlineGrid):
    """Waits for a reply that was begun, past the deadline, as Flower's grid does."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message = self.pending.get(next(iter(message_ids)))
        is_training = message is not None and message.metadata.message_type == exchange.TRAIN
        if message is not None and is_training and self.names[message.metadata.dst_node_id] == "slow":
            time.sleep(0.5)
            return []
        return super().pull_messages(message_ids)


def test_a_site_that_never_ends_its_reply_does_not_cost_the_replies_of_others(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 3, "rounds": 1, "reply_deadline_seconds": 0.3})
    begun: list[float] = []

    def after_the_first_look(record: RecordDict, message: Message) -> RecordDict | None:
        begun.append(time.monotonic())
        return record if len(begun) > 1 else None

    nodes = {
        "a": site(plan, "a", 0.5, edit=after_the_first_look),
        "b": site(plan, "b", 0.25),
        "slow": site(plan, "slow", 9.0),
    }
    rounds = run(plan, nodes, tmp_path, grid=StallingGrid)
    np.testing.assert_allclose(moved(rounds, plan), 0.375, atol=1e-6)
    assert rounds.state.attendance["slow"].problems == {"missing": 1}


def test_a_private_update_longer_than_an_honest_one_is_rejected(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 3, "rounds": 1, "privacy": "dp_sgd"})
    start = model.flatten(model.build(plan))
    longest = largest_norm(plan, nominal_patients=10, parameters=start) / math.sqrt(len(start))
    steps = {"a": 0.5 * longest, "b": 0.99 * longest, "bad": 1.01 * longest}
    nodes = {name: site(plan, name, step) for name, step in steps.items()}
    rounds = run(plan, nodes, tmp_path)
    assert rounds.state.attendance["bad"].problems == {"norm": 1}
    np.testing.assert_allclose(moved(rounds, plan), (steps["a"] + steps["b"]) / 2, rtol=1e-4)


def test_every_site_failing_raises_quorum_not_reached_and_keeps_the_last_good_model(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 2})

    def fails_later(record: RecordDict, message: Message) -> RecordDict | Message:
        return record if message.metadata.group_id == "1" else _raises(record, message)

    nodes = {name: site(plan, name, 0.5, edit=fails_later) for name in ("a", "b")}
    with pytest.raises(QuorumNotReached, match="found 0 of 2 asked; a: error_2; b: error_2"):
        run(plan, nodes, tmp_path)
    kept = checkpoint.latest(tmp_path / "checkpoints", run="r", plan_hash=plan.hash)
    assert kept is not None and kept.server_round == 1
    np.testing.assert_allclose(kept.parameters - model.flatten(model.build(plan)), 0.5, atol=1e-6)


def test_a_missed_quorum_leaves_a_report_that_tells_it(tmp_path: Path, monkeypatch: Any) -> None:
    plan = tiny_plan(**{"sites": 2})
    nodes = {"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5, edit=dies)}
    with pytest.raises(QuorumNotReached):
        app.coordinate(
            InlineGrid(nodes),
            plan,
            run="r",
            directory=tmp_path,
            heads=Heads(tmp_path / "heads"),
            engine="test",
        )
    report = Report.read(tmp_path)
    assert report.status == "quorum_not_reached"
    assert report.participation["b"].story == "trained 0 of 0 rounds; 1 x error_8"
    assert (tmp_path / "model.safetensors").exists()


def test_waiting_for_sites_ends_at_the_node_deadline(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 9, "node_deadline_seconds": 0.2})
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    start = time.monotonic()
    rounds = run(plan, nodes, tmp_path)
    assert time.monotonic() - start < 5
    assert [entry.sites_asked for entry in rounds.state.rounds] == [2, 2]


def test_a_reply_after_the_deadline_is_counted_as_late_and_never_averaged(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 3, "reply_deadline_seconds": 0.3})
    rounds_begun: set[str] = set()

    def remember(record: RecordDict, message: Message) -> RecordDict:
        rounds_begun.add(message.metadata.group_id)
        return record

    def late_in_round_one(record: RecordDict, message: Message) -> RecordDict | None:
        return record if "2" in rounds_begun else None

    nodes = {
        "a": site(plan, "a", 0.5, edit=remember),
        "b": site(plan, "b", 0.5),
        "slow": site(plan, "slow", 8.0, edit=late_in_round_one),
    }
    rounds = run(plan, nodes, tmp_path)
    seen = rounds.state.attendance["slow"]
    assert (seen.late, seen.missing, seen.valid) == (1, 1, 1)
    np.testing.assert_allclose(moved(rounds, plan), 0.5 + (0.5 + 0.5 + 8.0) / 3, atol=1e-5)


def test_a_task_that_flower_lost_is_pushed_again(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 2, "rounds": 1, "reply_deadline_seconds": 5})
    lost: list[bool] = []

    def lost_once(record: RecordDict, message: Message) -> RecordDict | Message:
        if lost:
            return record
        lost.append(True)
        return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)

    nodes = {"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.25, edit=lost_once)}
    rounds = run(plan, nodes, tmp_path)
    assert rounds.state.rounds[0].sites_valid == 2


def test_replies_are_pulled_one_at_a_time(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 4, "rounds": 1})
    grid = InlineGrid({f"s{i}": site(plan, f"s{i}", 0.5) for i in range(4)})
    app.coordinate(grid, plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test")
    assert grid.largest_batch == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, momentum: float) -> None:
    plan = tiny_plan(**{"rounds": 4, "sites": 2, "strategy__server_momentum": momentum})

    def nodes(dies_in: str) -> dict[str, Behaviour]:
        def edit(record: RecordDict, message: Message) -> RecordDict | Message:
            values = _values(record) * np.float32(0.1) * np.float32(message.metadata.group_id)
            good = _edited(record, "update", packed(values.astype(np.float32)))
            return dies(record, message) if message.metadata.group_id == dies_in else good

        return {name: site(plan, name, step, edit=edit) for name, step in (("a", 0.3), ("b", 0.7))}

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    app.coordinate(
        InlineGrid(nodes("never")),
        plan,
        run="r",
        directory=whole,
        heads=Heads(whole / "heads"),
        engine="test",
    )
    with pytest.raises(QuorumNotReached):
        app.coordinate(
            InlineGrid(nodes("3")),
            plan,
            run="r",
            directory=broken,
            heads=Heads(broken / "heads"),
            engine="test",
        )
    grid = InlineGrid(nodes("never"))
    app.coordinate(grid, plan, run="r", directory=broken, heads=Heads(broken / "heads"), engine="test")
    assert {m.metadata.group_id for m in grid.pushed if m.metadata.message_type == "train"} == {"3", "4"}
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert [entry.round for entry in Report.read(broken).rounds] == [1, 2, 3, 4]


def test_evaluation_merges_the_sites_scores(tmp_path: Path) -> None:
    plan = tiny_plan(
        **{
            "sites": 2,
            "rounds": 2,
            "evaluation__validation_every": 1,
            "evaluation__test_at_end": True,
        }
    )
    grid = InlineGrid({name: site(plan, name, 0.0) for name in ("a", "b")})
    app.coordinate(grid, plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test")
    report = Report.read(tmp_path)
    assert [entry.auroc for entry in report.rounds] == [1.0, 1.0]
    assert report.final.auroc == 1.0 and set(report.final.per_site) == {"a", "b"}
    assert report.privacy.unit == "none" and report.privacy.max_epsilon is None


COUNTS = np.array([[[30.0, 20, 12, 8, 5, 3, 2, 1, 0, 0], [0, 0, 1, 2, 4, 6, 9, 14, 20, 30]]])


def scoring_site(plan: Plan, name: str, **facts: Any) -> Behaviour:
    """A site that answers as the installed one does, and an evaluation with a histogram."""
    others = site(plan, name, 0.0, **facts)

    def behave(message: Message) -> Message | None:
        task = exchange.read_task(message.content)
        if task.purpose != "evaluate":
            return others(message)
        scored = Scored(server_round=task.server_round, part=task.part, arrays={"histogram": COUNTS})
        return Message(exchange.scored_record(scored), reply_to=message)

    return behave


def test_noise_in_released_counts_is_computed_from_public_values(tmp_path: Path) -> None:
    """With a named multiplier it differs from site to site, by the sampling rate of each."""
    plan = tiny_plan(
        **{
            "sites": 2,
            "rounds": 1,
            "evaluation__test_at_end": True,
            "privacy": "dp_sgd",
            "privacy__target_epsilon": None,
            "privacy__noise_multiplier": 1.5,
        }
    )
    nominal = {"a": 100, "b": 4000}
    stds = {n: measure_noise_std(plan, nominal_patients=nominal[n], part="test") for n in nominal}
    assert stds["b"] > 2 * stds["a"] > 0
    grid = InlineGrid({n: scoring_site(plan, n, nominal_patients=nominal[n]) for n in nominal})
    app.coordinate(grid, plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test")
    report = Report.read(tmp_path)
    for name, std in stds.items():
        expected = metrics.interval(Histogram(counts=COUNTS), noise_std=std)
        assert report.final.per_site[name].auroc_interval == pytest.approx(expected)
        cost = report.privacy.per_site[name]
        assert cost.noise_multiplier == 1.5
        assert cost.sample_rate == min(1, plan.training.expected_batch / nominal[name])
    together = metrics.interval(Histogram(counts=2 * COUNTS), noise_std=math.hypot(*stds.values()))
    assert report.final.auroc_interval == pytest.approx(together)


def test_a_site_whose_number_no_noise_can_serve_is_not_admitted(tmp_path: Path) -> None:
    """An honest one declines by itself; the coordinator could not say what such a site costs."""
    plan = tiny_plan(
        **{
            "sites": 3,
            "rounds": 1,
            "privacy": "dp_sgd",
            "privacy__target_epsilon": 0.02,
            "privacy__delta": 1e-6,
            "training__local_steps": 100_000,
            "training__expected_batch": 1,
        }
    )
    nominal = {"a": 10**9, "b": 10**9, "c": 1}
    nodes = {name: site(plan, name, 0.0, nominal_patients=nominal[name]) for name in nominal}
    rounds = run(plan, nodes, tmp_path)
    assert set(rounds.state.sites) == {"a", "b"}
    trail = (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    assert '"unreachable_target"' in trail


def test_the_report_has_the_bytes_of_each_round_and_of_each_site(tmp_path: Path) -> None:
    """Of a round those of all sites asked; of a site also those of preparing and of the final model."""
    plan = tiny_plan(sites=2, rounds=3)
    grid = InlineGrid({name: site(plan, name, 0.5) for name in ("a", "b")})
    app.coordinate(grid, plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test")
    report = Report.read(tmp_path)
    model_bytes = 4 * model.num_parameters(model.build(plan))
    for entry in report.rounds:
        assert entry.bytes_down is not None and entry.bytes_up is not None
        assert 2 * model_bytes < entry.bytes_down < 2 * (model_bytes + 1000)
        assert 2 * model_bytes < entry.bytes_up < 2 * (model_bytes + 1000)
    for part in report.participation.values():
        assert 4 * model_bytes < part.bytes_down < 4 * model_bytes + 5000
        assert 3 * model_bytes < part.bytes_up < 3 * model_bytes + 4000
