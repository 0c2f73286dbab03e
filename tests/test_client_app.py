from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file

from client import approval, training, work
from client.app import app
from client.cohort import open_cohort
from client.noise import seeded_key
from client.release import head_path
from client.site import Site
from common import durable, exchange, flower, keys, measure, model
from common.calibration import measure_noise_std, mechanism
from common.errors import InvalidReply
from common.exchange import DELIVER, EVALUATE, PREPARE, TRAIN, Prepared, Scored, Task, Update
from common.metrics import Scores
from common.plan import Plan
from common.quantisation import BLOCK, Form, carried
from tests.plans import TINY, plan
from tests.sites import write_site

TYPES = {"prepare": PREPARE, "train": TRAIN, "evaluate": EVALUATE, "deliver": DELIVER}
FEW_STEPS: dict[str, Any] = {
    **TINY,
    "rounds": 2,
    "training__local_steps": 2,
    "training__expected_batch": 20,
    "evaluation__validation_every": 1,
}


@pytest.fixture(autouse=True)
def identity() -> None:
    flower.set_identity(1, node_id=1)


def private_plan(**changes: Any) -> Plan:
    """Every patient in every step, so that accounting is exact and quick."""
    return plan(**(FEW_STEPS | changes))


def open_plan(**changes: Any) -> Plan:
    return private_plan(privacy="none", **changes)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", size=8, max_epsilon=3.0)


def parameters_of(asked: Plan) -> model.FlatArray:
    return model.flatten(model.build(asked))


def task_of(asked: Plan, purpose: Any = "train", **changes: Any) -> Task:
    part = changes.get("part", "test" if purpose == "evaluate" else "")
    is_last = part == "test" or purpose == "deliver"
    fields: dict[str, Any] = {
        "run": "run-1",
        "plan_hash": asked.hash,
        "server_round": asked.rounds if is_last else 1,
        "purpose": purpose,
        "part": part,
        "parameters": parameters_of(asked) if purpose != "prepare" else np.zeros(0, np.float32),
    }
    return Task(**(fields | changes))


def answer(
    site: Site, asked: Plan, task: Task, *, content: RecordDict | None = None, run: str = "run-1"
) -> RecordDict:
    """Sends a task to the app as Flower does; the reply crosses as bytes, as it would to another process."""
    record = exchange.task_record(task) if content is None else content
    message = Message(record, 7, TYPES[task.purpose])
    flower.assign_id(message)
    reply = app(message, context(site, asked, run=run))
    assert not reply.has_error()
    content = flower.unpack_message(flower.pack_message(reply)).content
    exchange.detach_head(content)  # as the coordinator does first
    return content


def context(site: Site, asked: Plan, *, run: str = "run-1", **more: bool) -> Context:
    return Context(
        run_id=1,
        node_id=7,
        node_config={"site": str(site.directory), **more},
        state=RecordDict(),
        run_config={"plan": asked.to_json(), "run": run},
    )


@pytest.mark.parametrize("told", [{}, {"durable": True}, {"durable": False}])
def test_everything_waits_for_the_disk_unless_whoever_starts_the_app_says_otherwise(
    site: Site, told: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent says nothing: its tests have that."""
    waited: list[int] = []
    databases: list[str] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    synchronous = durable.synchronous
    monkeypatch.setattr(durable, "synchronous", lambda: databases.append(synchronous()) or databases[-1])
    asked = private_plan()
    keys.own(site.private / "site.key")  # a key is written for good, whoever asks, and so are decoded cases
    open_cohort(site, asked=asked.asked)
    waited.clear()
    for purpose in ("prepare", "train"):
        task = task_of(asked, purpose)
        reply = app(Message(exchange.task_record(task), 7, TYPES[purpose]), context(site, asked, **told))
        exchange.require_accepted(reply.content)
    is_durable = told.get("durable", True)
    assert set(databases) == {"FULL" if is_durable else "OFF"}
    assert len(waited) >= 5 if is_durable else not waited
    assert durable.synchronous() == "FULL", "what the process does besides still waits"


def trained(site: Site, asked: Plan, task: Task | None = None, *, weight: float | None = None) -> Update:
    record = answer(site, asked, task or task_of(asked))
    exchange.require_accepted(record)
    size = len(parameters_of(asked))
    return exchange.read_update(
        record,
        server_round=1,
        num_parameters=size,
        form=asked.exchange.update,
        bound=1e9,
        max_norm=math.inf,
        weight=weight,
    )


def evaluated(site: Site, asked: Plan, *, exact: bool, part: str = "test") -> Scored:
    task = task_of(asked, "evaluate", part=part)
    record = answer(site, asked, task)
    exchange.require_accepted(record)
    expected = measure.arrays_of(asked.asked, bins=10, exact=exact)
    return exchange.read_scored(record, server_round=task.server_round, part=part, expected=expected)


def prepared(site: Site, asked: Plan) -> Prepared:
    return exchange.read_prepared(answer(site, asked, task_of(asked, "prepare")))


def refusal(site: Site, asked: Plan, task: Task, *, content: RecordDict | None = None) -> str:
    """The code of a refusal, which must be all that the reply has."""
    record = answer(site, asked, task, content=content)
    assert list(record) == ["refused"]
    assert list(record.config_records["refused"]) == ["code"]
    with pytest.raises(InvalidReply):
        exchange.require_accepted(record)
    return str(record.config_records["refused"]["code"])


def charges(site: Site) -> list[dict[str, Any]]:
    path = site.state / "ledger.sqlite"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        query = "SELECT * FROM entries WHERE kind = 'charge' ORDER BY number"
        return [dict(row) for row in database.execute(query)]


def test_site_answers_prepare_with_its_public_constants(site: Site) -> None:
    asked = private_plan()
    assert prepared(site, asked) == Prepared(
        site="north",
        status="approved",
        reason="",
        role="training",
        data="private",
        nominal_patients=20,
        patient_is="column",
        parts=("train", "validation", "test"),
        feverfew="0.1.0",
    )
    assert charges(site) == []


@pytest.mark.parametrize(
    ("settings", "changes", "status", "reason"),
    [
        ({"policies": []}, {}, "waiting", "not_approved"),
        ({}, {"randomness": "seeded"}, "declined", "seeded_noise"),
        ({"unsafe_allow_no_privacy": False}, {"privacy": "none"}, "declined", "no_privacy"),
        ({"max_epsilon": 2.9}, {}, "declined", "budget_exceeded"),
        ({"delta": 1e-6}, {}, "declined", "budget_exceeded"),
    ],
)
def test_site_that_does_not_take_part_says_why_before_round_1(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], status: str, reason: str
) -> None:
    asked = private_plan(**changes)
    told = prepared(write_site(tmp_path / "south", size=8, **settings), asked)
    assert (told.status, told.reason) == (status, reason)


def test_whole_run_fits_a_budget_of_its_target(site: Site) -> None:
    """Two rounds, two validations and one test: what prepare found affordable is never refused later."""
    asked = private_plan()
    assert prepared(site, asked).status == "approved"
    for server_round in (1, 2):
        record = answer(site, asked, task_of(asked, server_round=server_round))
        exchange.require_accepted(record)
        record = answer(site, asked, task_of(asked, "evaluate", part="validation", server_round=server_round))
        exchange.require_accepted(record)
    evaluated(site, asked, exact=False)
    assert len(charges(site)) == 5
    again = task_of(asked, parameters=parameters_of(asked) * 2, server_round=2)
    assert refusal(site, asked, again) == "budget_exceeded"
    assert len(charges(site)) == 5


def test_update_is_charged_as_the_mechanism_says(site: Site) -> None:
    asked = private_plan()
    trained(site, asked, weight=20.0)
    (row,) = charges(site)
    chosen = mechanism(asked, nominal_patients=20)
    assert (row["noise_multiplier"], row["sample_rate"], row["steps"]) == (chosen.noise_multiplier, 1.0, 2)
    assert (row["part"], row["purpose"], row["server_round"]) == ("train", "training", 1)
    assert (row["run"], row["plan_hash"], row["study"]) == ("run-1", asked.hash, "chest-demo")
    assert row["task"] == task_of(asked).identity
    assert row["nominal_patients"] == 20


def test_evaluation_is_charged_to_its_part(site: Site) -> None:
    asked = private_plan()
    evaluated(site, asked, exact=False, part="validation")
    evaluated(site, asked, exact=False, part="test")
    sigmas = mechanism(asked, nominal_patients=20).evaluation_noise_multiplier
    found = [
        (row["part"], row["noise_multiplier"], row["sample_rate"], row["steps"]) for row in charges(site)
    ]
    assert found == [("validation", sigmas["validation"], 1.0, 1), ("test", sigmas["test"], 1.0, 1)]


def test_repeated_task_gets_the_same_bits_and_no_second_charge(site: Site) -> None:
    asked = private_plan()
    first, again = trained(site, asked), trained(site, asked)
    assert again.arrays["values"].tobytes() == first.arrays["values"].tobytes()
    assert (again.train_loss, again.weight) == (first.train_loss, first.weight)
    assert len(charges(site)) == 1


def test_repeated_evaluation_gets_the_same_noise(site: Site) -> None:
    asked = private_plan()
    first, again = (evaluated(site, asked, exact=False) for _ in range(2))
    assert again.arrays["histogram"].tobytes() == first.arrays["histogram"].tobytes()
    assert len(charges(site)) == 1


def test_secure_noise_is_fresh_for_every_site_state(site: Site) -> None:
    asked = private_plan()
    first = trained(site, asked)
    shutil.rmtree(site.state)
    assert refusal(site, asked, task_of(asked)) == "ledger_broken"
    head_path(site).unlink()
    shutil.rmtree(site.directory / "plans")
    assert not np.array_equal(trained(site, asked).arrays["values"], first.arrays["values"])


def test_seeded_update_is_that_of_training_on_the_cohort(tmp_path: Path) -> None:
    site = write_site(tmp_path / "lab", name="lab", size=8, unsafe_allow_seeded_noise=True)
    asked = private_plan(randomness="seeded", seed=5)
    part = open_cohort(site, asked=asked.asked).parts["train"]
    expected = training.train_by_plan(
        model.build(asked),
        part,
        plan=asked,
        mechanism=mechanism(asked, nominal_patients=20),
        key=seeded_key(seed=5, plan_hash=asked.hash, server_round=1, site="lab"),
    )
    told = trained(site, asked)
    assert told.arrays["values"].tobytes() == expected.update.tobytes()
    assert told.train_loss == expected.train_loss


@pytest.mark.parametrize("form", tuple(BLOCK))
def test_a_site_rounds_what_was_noised_and_keeps_the_rest_of_that(tmp_path: Path, form: Form) -> None:
    site = write_site(tmp_path / "lab", name="lab", size=8, unsafe_allow_seeded_noise=True)
    asked = private_plan(randomness="seeded", seed=5, exchange__update=form)
    noised = training.train_by_plan(
        model.build(asked),
        open_cohort(site, asked=asked.asked).parts["train"],
        plan=asked,
        mechanism=mechanism(asked, nominal_patients=20),
        key=seeded_key(seed=5, plan_hash=asked.hash, server_round=1, site="lab"),
    ).update
    sent = trained(site, asked).arrays["values"]
    assert sent.tobytes() == carried(noised, form=form).tobytes()
    (kept,) = (site.state / "feedback" / "run-1").iterdir()
    assert load_file(kept)["left"].tobytes() == (noised - sent).tobytes()


def test_training_starts_at_the_parameters_of_the_task(site: Site) -> None:
    """The kept network's own parameters have no part in it."""
    asked = open_plan()
    start = parameters_of(asked) * 2
    first = trained(site, asked, task_of(asked, parameters=start))
    trained(site, asked, task_of(asked, parameters=start * 3))
    shutil.rmtree(site.state / "exact_replies")
    again = trained(site, asked, task_of(asked, parameters=start))
    assert again.arrays["values"].any()
    assert again.arrays["values"].tobytes() == first.arrays["values"].tobytes()


def test_everything_a_site_sends_follows_from_its_nominal_number_and_not_the_true_one(tmp_path: Path) -> None:
    asked = private_plan(
        training__expected_batch=5, privacy__noise_multiplier=1.0, privacy__target_epsilon=None
    )
    told, rows, updates = [], [], []
    for patients in (20, 21, 3):
        site = write_site(
            tmp_path / f"s{patients}", size=8, num_patients=patients, nominal_patients=20, max_epsilon=100.0
        )
        told.append(prepared(site, asked))
        updates.append(trained(site, asked, weight=20.0))
        evaluated(site, asked, exact=False)
        kept = ("task", "noise_multiplier", "sample_rate", "steps", "nominal_patients", "part")
        rows.append([[row[key] for key in kept] for row in charges(site)])
    assert told[0] == told[1] == told[2]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0][2] == 5 / 20


@pytest.mark.parametrize(("weights", "expected"), [("equal", 1.0), ("nominal", 500.0)])
def test_weight_is_the_public_one_of_the_plan(tmp_path: Path, weights: str, expected: float) -> None:
    site = write_site(tmp_path / "north", size=8, nominal_patients=500)
    assert trained(site, open_plan(strategy__weights=weights)).weight == expected


def test_exact_weight_is_the_number_of_training_patients(site: Site) -> None:
    asked = open_plan(strategy__weights="examples")
    part = open_cohort(site, asked=asked.asked).parts["train"]
    assert trained(site, asked).weight == len(part.patients) < 20


def test_noised_histogram_is_all_that_private_data_send(site: Site) -> None:
    asked = private_plan()
    scored = evaluated(site, asked, exact=False)
    counts = scored.arrays["histogram"]
    assert (counts != np.round(counts)).all()
    kept = load_file(next((site.state / "scores").rglob("test.safetensors")))
    noise = counts - Scores(**kept).histogram(10).counts
    std = measure_noise_std(asked, nominal_patients=20, part="test")
    assert 4 < np.square(noise / std).sum() < 60, "chi-squared of 20 degrees: once in 10,000"


def test_exact_scores_are_sent_without_privacy_and_never_charged(site: Site) -> None:
    asked = open_plan()
    trained(site, asked)
    scored = evaluated(site, asked, exact=True)
    part = open_cohort(site, asked=asked.asked).parts["test"]
    assert len(scored.arrays["scores"]) == len(part.targets)
    assert scored.arrays["weights"].sum() == pytest.approx(len(part.patients))
    assert charges(site) == []


def test_public_data_send_exact_scores_also_under_a_private_plan(tmp_path: Path) -> None:
    only_test = {"train": 0.0, "validation": 0.0, "test": 1.0}
    public = write_site(tmp_path / "open", size=8, role="evaluation", data="public", split=only_test)
    asked = private_plan()
    told = prepared(public, asked)
    assert (told.role, told.data, told.parts, told.status) == ("evaluation", "public", ("test",), "approved")
    assert len(evaluated(public, asked, exact=True).arrays["scores"]) == 40
    assert charges(public) == []


def test_private_evaluation_site_sends_noised_histograms(tmp_path: Path) -> None:
    only_test = {"train": 0.0, "validation": 0.0, "test": 1.0}
    site = write_site(tmp_path / "eval", size=8, role="evaluation", split=only_test)
    evaluated(site, private_plan(), exact=False)
    assert [row["part"] for row in charges(site)] == ["test"]


def test_wrong_tasks_are_refused_by_their_code_and_charge_nothing(tmp_path: Path, site: Site) -> None:
    asked, other = private_plan(), private_plan(seed=1)
    size = len(parameters_of(asked))
    evaluates = write_site(tmp_path / "eval", size=8, role="evaluation")
    no_test = write_site(tmp_path / "none", size=8, split={"train": 0.8, "validation": 0.2, "test": 0.0})
    careful = write_site(tmp_path / "careful", size=8, policies=[])
    strict = write_site(tmp_path / "strict", size=8, unsafe_allow_no_privacy=False)
    seeded, exact = private_plan(randomness="seeded"), open_plan()
    cases = [
        (site, asked, task_of(asked, parameters=np.zeros(size + 1, np.float32)), "wrong_parameters"),
        (site, asked, task_of(asked, "evaluate", parameters=np.zeros(0, np.float32)), "wrong_parameters"),
        (site, asked, task_of(asked, "deliver", parameters=np.zeros(1, np.float32)), "wrong_parameters"),
        (site, asked, task_of(other), "other_plan"),
        (site, asked, task_of(asked, run="run-2"), "other_plan"),
        (site, asked, task_of(asked, "evaluate", part="train"), "no_such_part"),
        (site, asked, task_of(asked, "evaluate", part="../up"), "no_such_part"),
        (no_test, asked, task_of(asked, "evaluate"), "no_such_part"),
        (evaluates, asked, task_of(asked), "evaluation_only"),
        (careful, asked, task_of(asked), "not_approved"),
        (careful, asked, task_of(asked, "evaluate"), "not_approved"),
        (careful, asked, task_of(asked, "deliver"), "not_approved"),
        (strict, exact, task_of(exact), "no_privacy"),
        (strict, exact, task_of(exact, "evaluate"), "no_privacy"),
        (site, seeded, task_of(seeded), "seeded_noise"),
        (site, seeded, task_of(seeded, "evaluate"), "seeded_noise"),
    ]
    for where, which, task, code in cases:
        assert refusal(where, which, task) == code
        assert charges(where) == []


@pytest.mark.parametrize("purpose", ["prepare", "train", "evaluate", "deliver"])
def test_a_task_that_comes_as_another_kind_of_message_is_refused(site: Site, purpose: str) -> None:
    asked = private_plan()
    for kind in {*TYPES} - {purpose}:
        message = Message(exchange.task_record(task_of(asked, purpose)), 7, TYPES[kind])
        reply = app(message, context(site, asked))
        if kind == "prepare":
            assert exchange.read_prepared(reply.content).reason == "malformed_task"
        else:
            assert reply.content.config_records["refused"] == {"code": "malformed_task"}
    assert charges(site) == []


def test_tasks_out_of_order_are_refused_before_any_charge(site: Site) -> None:
    asked = private_plan()
    exchange.require_accepted(answer(site, asked, task_of(asked, server_round=2)))
    assert refusal(site, asked, task_of(asked, server_round=1)) == "wrong_round"
    assert refusal(site, asked, task_of(asked, server_round=3)) == "wrong_round"
    assert refusal(site, asked, task_of(asked, "evaluate", server_round=1)) == "wrong_round"
    assert refusal(site, asked, task_of(asked, "deliver", server_round=1)) == "wrong_round"
    assert [row["server_round"] for row in charges(site)] == [2]


def test_a_run_that_comes_with_another_plan_is_declined_and_refused(site: Site) -> None:
    """Also where the server says in the run's settings that this is its plan."""
    asked, other = private_plan(), private_plan(seed=1)
    trained(site, asked)
    told = prepared(site, other)
    assert (told.status, told.reason) == ("declined", "other_plan")
    assert refusal(site, other, task_of(other, server_round=2)) == "other_plan"
    assert {row["plan_hash"] for row in charges(site)} == {asked.hash}


def test_approved_plan_is_worked_on(tmp_path: Path) -> None:
    careful = write_site(tmp_path / "careful", size=8, policies=[])
    asked = private_plan()
    assert refusal(careful, asked, task_of(asked)) == "not_approved"
    approval.decide(careful, asked, "approved")
    assert trained(careful, asked).arrays["values"].any()


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_over_budget_is_refused_before_any_work(tmp_path: Path, purpose: str) -> None:
    poor = write_site(tmp_path / "poor", size=8, max_epsilon=0.5)
    asked = private_plan()
    assert refusal(poor, asked, task_of(asked, purpose)) == "budget_exceeded"
    assert charges(poor) == []
    assert not (poor.state / "replies").exists()
    assert not (poor.state / "scores").exists()


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"task": ConfigRecord({"run": "run-1"})}),
        RecordDict(
            {"task": ConfigRecord({"run": 1, "plan-hash": 2, "server-round": 3, "purpose": 4, "part": 5})}
        ),
    ],
)
def test_message_that_is_no_task_is_refused(site: Site, content: RecordDict) -> None:
    asked = private_plan()
    assert refusal(site, asked, task_of(asked), content=content) == "malformed_task"


def test_plan_that_this_version_cannot_read_is_incompatible(site: Site) -> None:
    asked = private_plan()
    message = Message(exchange.task_record(task_of(asked)), 7, TRAIN)
    broken = context(site, asked)
    broken.run_config["plan"] = asked.to_json().replace('"rounds":2', '"rounds":2,"from_the_future":1')
    content = app(message, broken).content
    assert content.config_records["refused"] == {"code": "incompatible_plan"}


@pytest.mark.parametrize(
    "text", ['{"schema_version": 4}', "not JSON", '{"from_the_future": 1}', "[" * 100_000, ""]
)
def test_site_that_cannot_read_a_plan_answers_incompatible_with_its_version(site: Site, text: str) -> None:
    asked = private_plan()
    unread = context(site, asked)
    unread.run_config["plan"] = text
    message = Message(exchange.task_record(task_of(asked, "prepare")), 7, TYPES["prepare"])
    told = exchange.read_prepared(app(message, unread).content)
    assert (told.site, told.status, told.reason) == ("north", "incompatible", "incompatible_plan")
    assert told.feverfew and charges(site) == []


def test_site_that_cannot_read_a_task_answers_incompatible(site: Site) -> None:
    asked = private_plan()
    content = RecordDict({"task": ConfigRecord({"run": "run-1", "from the future": 1})})
    told = exchange.read_prepared(answer(site, asked, task_of(asked, "prepare"), content=content))
    assert (told.status, told.reason) == ("incompatible", "malformed_task")


def test_status_that_no_site_has_is_rejected(site: Site) -> None:
    record = exchange.prepared_record(work.prepared(site, status="keen", reason=""))
    with pytest.raises(InvalidReply):
        exchange.read_prepared(record)


def text_of(reply: Message) -> bytes:
    """All bytes that would leave the site."""
    return flower.pack_message(reply) + repr(reply.content).encode() + repr(reply.metadata).encode()


def failing_sites(directory: Path) -> list[Site]:
    """Sites where something is wrong, in a directory whose name is a patient's."""
    progress = write_site(directory / "Patient-4711-a", size=8)
    (progress.state / "progress.json").mkdir(parents=True)
    no_table = write_site(directory / "Patient-4711-b", size=8)
    (no_table.directory / "cases.csv").unlink()
    no_key = write_site(directory / "Patient-4711-c", size=8)
    (no_key.private / "split.key").write_text("Patient-4711")
    no_ledger = write_site(directory / "Patient-4711-d", size=8)
    no_ledger.state.mkdir()
    (no_ledger.state / "ledger.sqlite").write_text("Patient-4711")
    bad_setting = write_site(directory / "Patient-4711-e", size=8)
    (bad_setting.directory / "site.yaml").write_text("name: Patient-4711")
    no_site = dataclasses.replace(bad_setting, directory=directory / "Patient-4711-f")
    return [progress, no_table, no_key, no_ledger, bad_setting, no_site]


@pytest.mark.parametrize("purpose", ["train", "evaluate", "prepare", "deliver"])
def test_no_text_of_an_error_ever_leaves_the_site(
    tmp_path: Path, purpose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PROGRESS_SECONDS", 0.0)
    asked, codes = private_plan(), []
    for site in failing_sites(tmp_path):
        message = Message(exchange.task_record(task_of(asked, purpose)), 7, TYPES[purpose])
        reply = app(message, context(site, asked))
        assert b"Patient" not in text_of(reply)
        codes.append(str(reply.content.config_records.get("refused", {}).get("code", "")))
    assert set(codes) <= {"site_error", "ledger_broken", "incompatible_plan", ""}
    assert codes[4:] == ["incompatible_plan", "site_error"]
    assert "site_error" in codes[:4] or purpose == "deliver"


def test_progress_is_whole_at_every_step_and_tells_of_the_round_at_hand(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written over at one length, so that nothing of a longer text can be left behind."""
    monkeypatch.setattr(work, "PROGRESS_SECONDS", 0.0)
    path, sizes, write = site.state / "progress.json", set(), os.write
    for server_round, name in ((1, "a-run-with-a-long-name" * 2), (2, "run-1")):
        told = []

        def looked(fd: int, text: bytes, told: list[Any] = told) -> int:
            count = os.pwrite(fd, text, 0)
            told.append(json.loads(path.read_text()))
            return count

        asked = open_plan()
        task = dataclasses.replace(task_of(asked, server_round=server_round), run=name)
        message = Message(exchange.task_record(task), 7, TYPES["train"])
        with monkeypatch.context() as patch:
            patch.setattr(
                work.os, "write", lambda fd, text: looked(fd, text) if b'"step"' in text else write(fd, text)
            )
            exchange.require_accepted(app(message, context(site, asked, run=name)).content)
        assert [one["step"] for one in told] == [1, 2]
        assert {(one["run"], one["round"], one["steps"]) for one in told} == {(name, server_round, 2)}
        sizes.add(path.stat().st_size)
    assert sizes == {work.PROGRESS_BYTES}


def test_a_task_that_is_done_before_anybody_could_look_tells_no_progress(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer one tells its last step as well."""
    site.state.mkdir()
    monkeypatch.setattr(work, "PROGRESS_SECONDS", 60.0)
    asked, now = open_plan(), [0.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with work._progress(site, asked, task_of(asked)) as on_step:
        now[0] = 59.0
        on_step(3, 3)
        assert not (site.state / "progress.json").exists()
    with work._progress(site, asked, task_of(asked)) as on_step:
        now[0] += 59.0
        on_step(1, 3)
        assert not (site.state / "progress.json").exists()
        for step in (2, 3):  # the third is no minute later, and the last
            now[0] += 30.0
            on_step(step, 3)
            assert json.loads((site.state / "progress.json").read_text())["step"] == step


def test_failure_of_training_uses_the_charge_up_and_the_next_task_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PROGRESS_SECONDS", 0.0)
    site = write_site(tmp_path / "north", size=8)
    asked = private_plan()
    (site.state / "progress.json").mkdir(parents=True)
    assert refusal(site, asked, task_of(asked)) == "site_error"
    assert len(charges(site)) == 1
    (site.state / "progress.json").rmdir()
    assert refusal(site, asked, task_of(asked)) == "site_error"
    assert len(charges(site)) == 1
    record = answer(site, asked, task_of(asked, server_round=2))
    exchange.require_accepted(record)
    assert len(charges(site)) == 2


def test_full_text_of_an_error_is_in_the_sites_own_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = write_site(tmp_path / "Patient-4711", size=8)
    asked = private_plan()
    (site.directory / "cases.csv").unlink()
    assert refusal(site, asked, task_of(asked)) == "site_error"
    assert "Patient-4711" in caplog.text


def test_final_model_is_kept_at_the_site(site: Site) -> None:
    from safetensors.numpy import load_file

    asked = private_plan()
    task = task_of(asked, "deliver")
    record = answer(site, asked, task)
    assert record.config_records["delivered"] == {"delivered": True}
    directory = site.state / "models" / "run-1"
    assert Plan.from_json((directory / "plan.json").read_text()) == asked
    named = load_file(directory / "model.safetensors")
    network = model.build(asked)
    assert list(named) == sorted(name for name, _ in network.named_parameters())
    flat = np.concatenate([named[name].reshape(-1) for name, _ in network.named_parameters()])
    assert flat.tobytes() == task.parameters.tobytes()


@pytest.mark.parametrize("run", ["../escaped", "/tmp/escaped", "a/../../escaped"])
@pytest.mark.parametrize("purpose", ["deliver", "evaluate"])
def test_name_of_a_run_cannot_lead_out_of_the_state_directory(site: Site, run: str, purpose: str) -> None:
    asked = open_plan()
    message = Message(exchange.task_record(task_of(asked, purpose, run=run)), 7, TYPES[purpose])
    elsewhere = context(site, asked)
    elsewhere.run_config["run"] = run
    before = {path for path in site.directory.parent.rglob("*") if site.state not in path.parents}
    reply = app(message, elsewhere)
    assert reply.content.config_records["refused"] == {"code": "malformed_task"}
    after = {path for path in site.directory.parent.rglob("*") if site.state not in path.parents}
    assert {path.name for path in after - before} <= {"cache", "cohort.json", "state", "quarantine.csv"}
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("purpose", ["prepare", "train", "evaluate", "deliver"])
def test_state_can_be_read_by_its_owner_only_whatever_came_first(site: Site, purpose: str) -> None:
    asked = open_plan()
    exchange.require_accepted(answer(site, asked, task_of(asked, purpose)))
    assert site.state.stat().st_mode & 0o077 == 0


def test_site_keeps_its_exact_scores_for_itself(site: Site) -> None:
    from safetensors.numpy import load_file

    evaluated(site, private_plan(), exact=False)
    kept = load_file(site.state / "scores" / "run-1" / "test.safetensors")
    assert kept["weights"].sum() == pytest.approx(round(kept["weights"].sum()))
    assert set(kept) == {"scores", "targets", "weights"}
