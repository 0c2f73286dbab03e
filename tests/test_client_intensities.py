from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from PIL import Image
from scipy import stats

from client import clinical, intensities, rehearsal
from client.app import app
from client.cohort import Part, open_cohort
from client.site import Site
from common import exchange, flower, model
from common.calibration import landmark_noise_std, mechanism
from common.errors import InvalidReply
from common.exchange import EVALUATE, LANDMARKS, PREPARE, TRAIN, Task
from common.landmarks import LandmarkHistograms
from common.measure import ArrayKind
from common.plan import Plan
from common.privacy import Spend, epsilon
from tests.plans import TINY, plan
from tests.sites import write_site
from tests.test_common_landmarks import ASKED

TYPES = {"prepare": PREPARE, "train": TRAIN, "evaluate": EVALUATE, "landmarks": LANDMARKS}
EXPECTED = {"landmarks": ArrayKind(shape=(3, 20), dtype="float64")}
WANTED = LandmarkHistograms(percentiles=(25, 50, 75), bins=20)


@pytest.fixture(autouse=True)
def identity() -> None:
    flower.set_identity(1, node_id=1)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", size=8, max_epsilon=3.0)


def asking(**changes: Any) -> Plan:
    return plan(**(TINY | ASKED | changes))


def training(**changes: Any) -> Plan:
    every = {"rounds": 1, "training__local_steps": 3, "training__expected_batch": 100}
    return plan(**(TINY | every | {"evaluation__validation_every": 0} | changes))


def answer(site: Site, asked: Plan, purpose: Any) -> RecordDict:
    """The reply to a task as it crosses the wire, without the head of the ledger."""
    without = purpose in ("prepare", "landmarks")
    task = Task(
        run=f"run-{asked.hash[:8]}",
        plan_hash=asked.hash,
        server_round=1,
        purpose=purpose,
        part="test" if purpose == "evaluate" else "",
        parameters=np.zeros(0, np.float32) if without else model.flatten(model.build(asked)),
    )
    message = Message(exchange.task_record(task), 7, TYPES[purpose])
    flower.assign_id(message)
    context = Context(
        run_id=1,
        node_id=7,
        node_config={"site": str(site.directory)},
        state=RecordDict(),
        run_config={"plan": asked.to_json(), "run": f"run-{asked.hash[:8]}"},
    )
    content = flower.unpack_message(flower.pack_message(app(message, context))).content
    exchange.detach_head(content)
    return content


def counted(site: Site, asked: Plan) -> np.ndarray:
    record = answer(site, asked, "landmarks")
    exchange.require_accepted(record)
    scored = exchange.read_scored(record, server_round=1, part="train", expected=EXPECTED)
    return scored.arrays["landmarks"]


def code(site: Site, asked: Plan, purpose: str) -> str:
    with pytest.raises(InvalidReply) as refused:
        exchange.require_accepted(answer(site, asked, purpose))
    return refused.value.code.removeprefix("refused_")


def charges(site: Site) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(site.state / "ledger.sqlite")) as rows:
        rows.row_factory = sqlite3.Row
        found = rows.execute("select * from entries where kind = 'charge'").fetchall()
    return [dict(row) for row in found]


def test_landmarks_are_the_percentiles_of_pooled_images_by_patient() -> None:
    """numpy's, over the images of a case as the plan prepares them, as a mean over a patient's cases."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (7, 2, 9, 8), dtype=np.uint8)
    patients = (np.array([0]), np.array([1, 4, 5]), np.array([2, 3, 6]))
    part = Part(images=images, targets=np.zeros(7, np.int64), values=clinical.none(7), patients=patients)
    asked = plan(preprocessing__inputs=["t1", "t2"], preprocessing__size=[9, 8]).preprocessing
    found = intensities.histograms(part, asked, wanted=WANTED)
    expected = np.zeros((3, 20))
    for own in patients:
        each = [np.percentile(images[case, channel], (25, 50, 75)) for case in own for channel in (0, 1)]
        for landmark, value in enumerate(np.mean(each, axis=0) / 255):
            expected[landmark, int(value * 20)] += 1
    np.testing.assert_array_equal(found, expected)
    halves = (images / np.float32(255)).astype(np.float16)
    floats = intensities.by_case(halves, inputs=2, percentiles=WANTED.percentiles)
    exact = intensities.by_case(images, inputs=2, percentiles=WANTED.percentiles)
    np.testing.assert_allclose(floats, exact, atol=1e-3)


def test_no_patients_give_empty_histograms() -> None:
    images = np.zeros((0, 1, 8, 8), np.uint8)
    part = Part(images=images, targets=np.zeros(0, np.int64), values=clinical.none(0), patients=())
    assert intensities.histograms(part, plan(**TINY).preprocessing, wanted=WANTED).sum() == 0


def test_noise_of_landmarks_is_gaussian_at_its_scale() -> None:
    zeros = np.zeros((4, 5000))
    found = intensities.noised(zeros, noise_multiplier=1.5, noise=np.random.default_rng(0))
    scale = 1.5 * 2.0
    assert stats.kstest(found.ravel(), stats.norm(scale=scale).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(found.ravel(), stats.norm(scale=wrong * scale).cdf).pvalue < 1e-6


def test_without_privacy_every_patient_of_the_training_part_counts_once(site: Site) -> None:
    asked = asking(privacy="none")
    part = open_cohort(site, asked=asked.asked).parts["train"]
    np.testing.assert_array_equal(counted(site, asked).sum(axis=1), [len(part.patients)] * 3)
    assert not (site.state / "ledger.sqlite").exists()


def test_patients_of_other_parts_are_never_looked_at(tmp_path: Path) -> None:
    asked = asking(privacy="none")
    north = write_site(tmp_path / "a", size=8)
    twin = write_site(tmp_path / "b", size=8)
    cohort = open_cohort(north, asked=asked.asked)
    others = [one for part in ("validation", "test") for one in cohort.sources[part]["images"].to_pylist()]
    assert len(others) > 4
    for place, (image,) in enumerate(others):
        pixels = np.random.default_rng(place).integers(0, 256, (8, 8)).astype(np.uint8) // 3 * 3
        Image.fromarray(pixels).save(twin.directory / image)
    np.testing.assert_array_equal(counted(north, asked), counted(twin, asked))


def test_landmarks_are_noised_and_charged_before_they_leave(site: Site) -> None:
    asked = asking(privacy__target_epsilon=2.0)
    found = counted(site, asked)
    (row,) = charges(site)
    chosen = mechanism(asked, nominal_patients=20)
    assert (row["part"], row["purpose"]) == ("train", "landmarks")
    assert (row["noise_multiplier"], row["sample_rate"], row["steps"]) == (chosen.noise_multiplier, 1.0, 1)
    part = open_cohort(site, asked=asked.asked).parts["train"]
    exact = intensities.histograms(part, asked.preprocessing, wanted=WANTED)
    noise = (found - exact) / landmark_noise_std(asked, nominal_patients=20)
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-4
    np.testing.assert_array_equal(counted(site, asked), found)
    assert len(charges(site)) == 1, "the same task again gets the stored reply"


def test_a_crash_before_the_noise_leaves_the_charge(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert len(charges(site)) == 1, "charged before the work"
        raise RuntimeError("planted")

    monkeypatch.setattr(intensities, "histograms", fail)
    assert code(site, asking(), "landmarks") == "site_error"
    assert len(charges(site)) == 1


def test_landmarks_and_training_compose_as_one_accountant_says(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", size=8, max_epsilon=5.0)
    counted(site, asking(privacy__target_epsilon=1.0))
    later = training(privacy__target_epsilon=2.0)
    exchange.require_accepted(answer(site, later, "train"))
    spends = [
        Spend(noise_multiplier=row["noise_multiplier"], sample_rate=row["sample_rate"], steps=row["steps"])
        for row in charges(site)
    ]
    assert sorted(spend.steps for spend in spends) == [1, 3]
    told = rehearsal.rehearse(site, asking(privacy__target_epsilon=0.1))
    assert told.total_epsilon == pytest.approx(epsilon(spends, delta=site.settings.delta).value, rel=0.01)
    assert 2.0 < told.total_epsilon < 3.0, "more than either, less than their sum"


def test_landmarks_over_the_budget_are_refused_and_not_charged(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", size=8, max_epsilon=1.0)
    asked = asking(privacy__target_epsilon=2.0)
    assert exchange.read_prepared(answer(site, asked, "prepare")).reason == "budget_exceeded"
    assert code(site, asked, "landmarks") == "budget_exceeded"
    assert not charges(site)


def test_a_plan_is_about_landmarks_or_about_training(site: Site) -> None:
    for purpose in ("train", "evaluate"):
        assert code(site, asking(), purpose) == "not_in_plan"
    assert code(site, training(), "landmarks") == "not_in_plan"
    assert not (site.state / "ledger.sqlite").exists() or not charges(site)


def test_a_site_that_does_not_train_sends_no_landmarks(tmp_path: Path) -> None:
    public = {"train": 0.0, "validation": 0.0, "test": 1.0}
    east = write_site(tmp_path / "east", size=8, role="evaluation", data="public", split=public)
    assert code(east, asking(), "landmarks") == "evaluation_only"


def test_a_rehearsal_shows_the_histograms_and_nothing_else(site: Site) -> None:
    told = rehearsal.rehearse(site, asking(privacy__target_epsilon=1.0))
    assert {field.message for field in told.fields} == {"prepare", "landmarks"}
    assert "arrays.landmarks" in {field.field for field in told.fields}
    assert 0.99 <= told.run_epsilon <= 1.0
