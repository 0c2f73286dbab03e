"""The one round of a plan that asks for landmarks, against sites that answer well and badly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from common import exchange, landmarks
from common.calibration import landmark_noise_std
from common.config import compose_plan
from common.errors import QuorumNotReached, RunError
from common.exchange import Prepared, Scored
from common.plan import Plan
from server import app, page
from server.heads import Heads
from server.landmarks import OVERRIDE_NAME, override
from server.report import Report
from server.summary import summary_table
from tests.grid import Behaviour, InlineGrid
from tests.plans import plan
from tests.test_common_landmarks import ASKED

Floats = np.ndarray
QUICK: dict[str, Any] = {
    **ASKED,
    "sites": 3,
    "quorum": 2,
    "node_deadline_seconds": 1,
    "reply_deadline_seconds": 1,
    "preprocessing": "grey28",
}


def patients(centre: float, *, number: int = 400) -> Floats:
    """Landmarks of patients about ``centre``, a tenth below and a tenth above it."""
    rng = np.random.default_rng(round(centre * 1000))
    return centre + np.array([-0.1, 0.0, 0.1]) + 0.05 * rng.normal(size=(number, 3))


def site(name: str, counts: Floats | Callable[[], RecordDict], *, role: str = "training") -> Behaviour:
    def behave(message: Message) -> Message:
        task = exchange.read_task(message.content)
        if task.purpose == "prepare":
            prepared = Prepared(
                site=name,
                status="approved",
                reason="",
                role=role,
                data="private",
                nominal_patients=400,
                patient_is="column",
                parts=("train", "validation", "test"),
                feverfew="0",
            )
            return Message(exchange.prepared_record(prepared), reply_to=message)
        assert (task.purpose, task.parameters.size) == ("landmarks", 0), "nothing else is ever asked"
        assert message.metadata.message_type == exchange.LANDMARKS
        if not isinstance(counts, np.ndarray):
            return Message(counts(), reply_to=message)
        return Message(record(counts), reply_to=message)

    return behave


def record(counts: Floats, *, server_round: int = 1) -> RecordDict:
    arrays = {"landmarks": counts}
    return exchange.scored_record(Scored(server_round=server_round, part="train", arrays=arrays))


def counted(values: Floats) -> Floats:
    return landmarks.histograms(values, bins=20)


def coordinate(asked: Plan, nodes: dict[str, Behaviour], directory: Path) -> Report:
    grid = InlineGrid(nodes)
    app.coordinate(
        grid, asked, run="r", directory=directory, heads=Heads(directory / "heads"), engine="inline"
    )
    return Report.read(directory)


def test_landmarks_are_the_medians_over_the_patients_of_all_sites(tmp_path: Path) -> None:
    values = [patients(0.4), patients(0.5), patients(0.6)]
    nodes = {name: site(name, counted(one)) for name, one in zip("abc", values, strict=True)}
    nodes["east"] = site("east", counted(patients(0.1)), role="evaluation")
    report = coordinate(plan(**QUICK, privacy="none"), nodes, tmp_path)
    assert report.landmarks is not None and report.landmarks.sites == 3
    assert report.landmarks.percentiles == (1.0, 25.0, 50.0, 75.0, 99.0)
    first, *inner, last = report.landmarks.values
    assert (first, last) == (0.0, 1.0)
    np.testing.assert_allclose(inner, np.median(np.concatenate(values), axis=0), atol=0.03)
    assert report.landmarks.uncertainty == 0 and report.privacy.unit == "none"
    assert not (tmp_path / "model.safetensors").exists()


def test_the_override_in_the_run_directory_makes_the_later_plan(tmp_path: Path) -> None:
    nodes = {name: site(name, counted(patients(0.4))) for name in "ab"}
    report = coordinate(plan(**QUICK, privacy="none"), nodes, tmp_path)
    written = (tmp_path / OVERRIDE_NAME).read_text()
    assert report.landmarks is not None and written == report.landmarks.override + "\n"
    later = compose_plan(["plan.classes=[a,b]", "plan.sites=2", "preprocessing=grey28", written.strip()])
    step = later.preprocessing.steps[0]
    assert step.name == "landmarks" and later.landmarks is None
    assert (step.percentiles, step.values) == (report.landmarks.percentiles, report.landmarks.values)


def test_any_step_survives_the_way_through_an_override() -> None:
    steps = [
        {"name": "resample", "spacing_mm": [1.5, 1.5]},
        {"name": "crop_foreground", "above": -1e-05, "margin_pixels": 3},
        {"name": "non_local_means", "patch_radius_pixels": 1, "search_radius_pixels": 2, "strength": 0.8},
        {"name": "percentile", "lower": 0.5, "upper": 99.5},
        {"name": "histogram_normalisation", "bins": 256},
        {"name": "resize"},
    ]
    found = plan(preprocessing__steps=steps).preprocessing.steps
    again = compose_plan(["plan.classes=[a,b]", "plan.sites=2", override(found)]).preprocessing.steps
    assert again == found


def test_noised_landmarks_cost_the_target_and_the_report_says_so(tmp_path: Path) -> None:
    asked = plan(**QUICK, privacy__target_epsilon=2.0)
    std = landmark_noise_std(asked, nominal_patients=400)
    rng = np.random.default_rng(0)
    values = {name: patients(centre) for name, centre in zip("abc", (0.4, 0.5, 0.6), strict=True)}
    noised = {name: counted(one) + std * rng.normal(size=(3, 20)) for name, one in values.items()}
    report = coordinate(asked, {name: site(name, one) for name, one in noised.items()}, tmp_path)
    assert report.landmarks is not None
    together = np.median(np.concatenate(list(values.values())), axis=0)
    np.testing.assert_allclose(report.landmarks.values[1:-1], together, atol=0.06)
    assert 0 < report.landmarks.uncertainty < landmarks.MOST_UNCERTAIN
    for cost in report.privacy.per_site.values():
        assert cost.epsilon is not None and 1.98 <= cost.epsilon <= 2.0
        assert (cost.steps, cost.sample_rate) == (1, 1.0)
    told = page.render(report)
    assert "AUROC" not in told and "What are the landmarks?" in told and report.landmarks.override in told
    names = [column.header for column in summary_table(report).columns]
    assert names == ["site", "role", "cases", "epsilon of target", "rounds"]
    assert "percentile to value: 1 to 0, 25 to 0." in str(summary_table(report).caption)
    assert {part.story for part in report.participation.values()} == {"sent its landmarks"}


def test_noise_that_drowns_the_patients_ends_the_run_and_is_still_counted(tmp_path: Path) -> None:
    asked = plan(**QUICK, privacy__target_epsilon=0.1)
    nodes = {name: site(name, counted(patients(0.5, number=40))) for name in "abc"}
    with pytest.raises(RunError, match=r"noise moves by at most 15%"):
        coordinate(asked, nodes, tmp_path)
    report = Report.read(tmp_path)
    assert report.status == "failed" and report.landmarks is None
    assert report.privacy.max_epsilon is not None and report.privacy.max_epsilon > 0.09
    assert not (tmp_path / OVERRIDE_NAME).exists() and "Unknown: the run ended" in page.render(report)


BAD: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "other shape": (lambda: record(np.zeros((3, 19))), "shape"),
    "other type": (lambda: record(np.zeros((3, 20), np.float32)), "dtype"),
    "not a number": (lambda: record(np.full((3, 20), np.nan)), "non_finite"),
    "another round": (lambda: record(np.zeros((3, 20)), server_round=2), "server_round"),
    "a refusal": (lambda: exchange.refusal_record("budget_exceeded"), "refused_budget_exceeded"),
    "something else": (exchange.delivered_record, "records"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reply_is_left_out_and_named(what: str, tmp_path: Path) -> None:
    reply, code = BAD[what]
    good = counted(patients(0.5))
    nodes = {"a": site("a", good), "b": site("b", good), "c": site("c", reply)}
    report = coordinate(plan(**QUICK, privacy="none"), nodes, tmp_path)
    assert report.landmarks is not None and report.landmarks.sites == 2
    assert report.participation["c"].story == f"sent no landmarks; 1 x {code}"


def test_fewer_sites_than_the_quorum_give_no_landmarks(tmp_path: Path) -> None:
    refuses = lambda: exchange.refusal_record("not_approved")  # noqa: E731
    nodes = {"a": site("a", counted(patients(0.5))), "b": site("b", refuses), "c": site("c", refuses)}
    with pytest.raises(QuorumNotReached, match="at least 2 sites, found 1 of 3"):
        coordinate(plan(**QUICK, privacy="none"), nodes, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "quorum_not_reached"
