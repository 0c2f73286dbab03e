"""The record of which cases a run used: whole, kept, and never more than the site's own."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from pyarrow import parquet

from client import frozen, rehearsal, run_folder, split, tally, usage, withdrawal
from client.app import app
from client.case import Case
from client.frozen import FrozenCase
from client.site import Site
from common import exchange, flower, model
from common.errors import StateError, UserError
from common.exchange import Task
from common.plan import Plan
from tests import crash
from tests.crash import SECURE, Hospital
from tests.plans import TINY, plan
from tests.sites import write_site

TYPES = {"train": exchange.TRAIN, "evaluate": exchange.EVALUATE, "prepare": exchange.PREPARE}
RUN = "run-1"
Row = dict[str, Any]


def quick(**changes: Any) -> Plan:
    """Every patient in every step, so that accounting is exact and quick."""
    few = {"rounds": 2, "training__local_steps": 1, "training__expected_batch": 20}
    return plan(**(TINY | few | changes))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", size=8, max_epsilon=100.0)


def ask(site: Site, asked: Plan, purpose: Any = "train", *, run: str = RUN, server_round: int = 1) -> str:
    """Sends a task to the real app; returns the code of a refusal, or ""."""
    flower.set_identity(1, node_id=1)
    task = Task(
        run=run,
        plan_hash=asked.hash,
        server_round=server_round,
        purpose=purpose,
        part="test" if purpose == "evaluate" else "",
        parameters=model.flatten(model.build(asked)),
    )
    message = Message(exchange.task_record(task), 7, TYPES[purpose])
    flower.assign_id(message)
    context = Context(
        run_id=1,
        node_id=7,
        node_config={"site": str(site.directory)},
        state=RecordDict(),
        run_config={"plan": asked.to_json(), "run": run},
    )
    content = app(message, context).content
    return str(content.config_records.get("refused", {}).get("code", ""))


def path_of(site: Site, run: str = RUN) -> Path:
    return site.runs / run / "used_cases.parquet"


def rows(site: Site, run: str = RUN) -> list[Row]:
    """What any program that reads Parquet sees."""
    found: list[Row] = parquet.read_table(path_of(site, run)).to_pylist()
    return found


def cases_of(site: Site, part: str) -> list[FrozenCase]:
    """The cases of a part, by the rule of the split."""
    secret = split.read_key(site)
    listed = frozen.read(site, secret=secret)
    assert listed is not None
    return [
        one
        for one in listed.cases
        if split.part_of(split.pseudonym(one.case.patient, secret=secret), split=site.settings.split) == part
    ]


def named(found: list[Row], part: str) -> set[tuple[str, str, str]]:
    return {(row["images"][0], row["patient"], row["content"]) for row in found if row["part"] == part}


def expected(cases: list[FrozenCase]) -> set[tuple[str, str, str]]:
    return {(one.case.image, one.case.patient, one.content) for one in cases}


def test_a_run_has_a_row_for_every_case_that_it_might_draw(site: Site) -> None:
    asked = quick(training__expected_batch=1)  # most steps draw nobody
    before = datetime.now(UTC) - timedelta(seconds=1)
    assert ask(site, asked) == ""
    found = rows(site)
    listed = frozen.read(site, secret=split.read_key(site))
    assert listed is not None
    assert named(found, "train") == expected(cases_of(site, "train")) and len(found) > 10
    assert {row["part"] for row in found} == {"train"}, "nothing was evaluated yet"
    for row in found:
        assert tuple(row) == usage.COLUMNS
        assert (row["plan_hash"], row["cohort_version"]) == (asked.hash, listed.version)
        assert before <= row["first_used"] <= datetime.now(UTC)


def test_evaluation_adds_the_cases_of_its_part(site: Site) -> None:
    asked = quick()
    ask(site, asked)
    ask(site, asked, "evaluate", server_round=asked.rounds)
    found = rows(site)
    assert named(found, "test") == expected(cases_of(site, "test"))
    assert named(found, "train") == expected(cases_of(site, "train"))
    assert {row["part"] for row in found} == {"train", "test"}


def test_a_prepared_run_knows_its_cohort_and_has_no_use_yet(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(site, quick(), "prepare") == ""
    assert [path.name for path in (site.runs / RUN).iterdir()] == [tally.FILE]
    assert not list((site.state / "replies").iterdir()), "the folder is there before a task waits for it"
    assert usage.find(site, patient=cases_of(site, "train")[0].case.patient) == ()
    prepared = tally.find(site, run=RUN)
    assert tally.last(site, run=RUN) is None, "a report has nothing of a site that did no task"
    tally.report(site, RUN, as_json=False)
    assert "no task of the run has used a case yet" in " ".join(capsys.readouterr().out.split())
    tally.report(site, RUN, as_json=True)
    assert [one["has_used"] for one in json.loads(capsys.readouterr().out)] == [False]
    ask(site, quick())
    assert tally.find(site, run=RUN) == prepared, "of the same cohort there is one entry"
    assert tally.last(site, run=RUN) == prepared[-1]
    tally.report(site, RUN, as_json=False)
    assert "used a case yet" not in " ".join(capsys.readouterr().out.split())
    tally.report(site, RUN, as_json=True)
    assert [one["has_used"] for one in json.loads(capsys.readouterr().out)] == [True]


def test_a_site_that_declines_has_nothing_of_the_run(tmp_path: Path) -> None:
    site = write_site(tmp_path / "strict", size=8, unsafe_allow_no_privacy=False)
    declined = quick(privacy="none")
    ask(site, declined, "prepare")
    assert ask(site, declined) == "no_privacy" and not site.runs.exists()
    with pytest.raises(UserError, match="one of the 0 runs"):
        tally.find(site, run=RUN)


def test_later_rounds_and_repeated_tasks_add_nothing(site: Site) -> None:
    asked = quick()
    ask(site, asked)
    content = path_of(site).read_bytes()
    ask(site, asked)
    assert ask(site, asked, server_round=2) == ""
    assert path_of(site).read_bytes() == content
    again(site, asked)
    assert path_of(site).read_bytes() == content, "a process that has not seen the run yet adds nothing"


def again(site: Site, asked: Plan) -> None:
    """Records once more, as a process does that was started anew."""
    listed = frozen.read(site, secret=split.read_key(site))
    assert listed is not None
    with run_folder.opened(site, run=RUN) as folder:
        usage.record(
            folder,
            plan_hash=asked.hash,
            part="train",
            cohort_version=listed.version,
            cases=usage.listed(cases_of(site, "train")),
        )


def test_a_cohort_frozen_anew_in_the_middle_is_added_to_that_of_before(site: Site) -> None:
    asked = quick()
    ask(site, asked)
    first = rows(site)
    gone = cases_of(site, "train")[0].case
    lines = (site.directory / "cases.csv").read_text().splitlines(keepends=True)
    (site.directory / "cases.csv").write_text("".join(one for one in lines if gone.image + "," not in one))
    frozen.freeze(site)
    assert ask(site, asked, server_round=2) == ""
    found = rows(site)
    assert found[: len(first)] == first, "nothing is taken out"
    versions = {row["cohort_version"] for row in found}
    assert len(versions) == 2 and len(found) == 2 * len(first) - 1


def test_runs_and_plans_are_told_apart(site: Site) -> None:
    asked, other = quick(), quick(seed=3)
    ask(site, asked)
    ask(site, asked, run="run-3")
    ask(site, other, run="run-2")
    assert {row["plan_hash"] for row in rows(site)} == {asked.hash}
    assert {row["plan_hash"] for row in rows(site, "run-2")} == {other.hash}
    patient = cases_of(site, "train")[0].case.patient
    uses = usage.find(site, patient=patient)
    assert {(use.run, use.plan_hash) for use in uses} == {
        (RUN, asked.hash),
        ("run-3", asked.hash),
        ("run-2", other.hash),
    }
    assert all((use.part, use.cases) == ("train", 2) for use in uses)
    assert [use.first_used for use in uses] == sorted(use.first_used for use in uses)


def test_who_is_in_no_run_has_no_use(site: Site) -> None:
    assert usage.find(site, patient="Patient 1") == ()
    ask(site, quick())
    assert usage.find(site, patient=cases_of(site, "test")[0].case.patient) == ()
    assert usage.find(site, patient="nobody") == ()


def test_only_the_site_can_read_it(site: Site) -> None:
    ask(site, quick())
    assert path_of(site).stat().st_mode & 0o777 == 0o600
    for directory in (path_of(site).parent, site.runs):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert site.private in path_of(site).parents


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_refused_task_uses_no_case(tmp_path: Path, purpose: str) -> None:
    poor = write_site(tmp_path / "poor", size=8, max_epsilon=0.1)
    last = quick().rounds
    asked = {"train": 1, "evaluate": last}
    assert ask(poor, quick(), purpose, server_round=asked[purpose]) == "budget_exceeded"
    assert ask(poor, quick(), "prepare") == ""
    assert not poor.runs.exists()


def test_rehearsal_is_no_run(site: Site) -> None:
    assert rehearsal.rehearse(site, quick()).status == "approved"
    assert not site.runs.exists()


def test_damaged_record_stops_the_run_and_is_left_as_it_is(site: Site) -> None:
    path_of(site).parent.mkdir(parents=True)
    path_of(site).write_bytes(b"PAR1 but not much of it")
    assert ask(site, quick()) == "site_error"
    assert path_of(site).read_bytes() == b"PAR1 but not much of it"
    with pytest.raises(StateError, match="restore it"):
        usage.find(site, patient="Patient 1")


RECORD = """
import sys
from pathlib import Path
from client import run_folder, usage
from client.case import Case
from client.frozen import FrozenCase
from client.site import open_site
site = open_site(Path(sys.argv[1]))
for number in range(8):
    case = FrozenCase(case=Case(images=(f"{sys.argv[2]}-{number}.png",), patient=sys.argv[2]), content="c")
    with run_folder.opened(site, run="run-1") as folder:
        usage.record(folder, plan_hash="p", part="train", cohort_version="v", cases=usage.listed([case]))
"""


def test_a_part_without_cases_adds_nothing(site: Site) -> None:
    """A small site may have nobody in a part, and answers like any other."""
    asked = quick()
    assert ask(site, asked) == ""
    content = path_of(site).read_bytes()
    with run_folder.opened(site, run=RUN) as folder:
        usage.record(folder, plan_hash="p", part="test", cohort_version="v", cases=usage.listed([]))
    assert path_of(site).read_bytes() == content


def test_every_image_of_a_case_is_named(site: Site) -> None:
    case = Case(images=("t1.nii", "t2.nii"), patient="Patient 1")
    with run_folder.opened(site, run=RUN) as folder:
        cases = usage.listed([FrozenCase(case=case, content="c")])
        usage.record(folder, plan_hash="p", part="train", cohort_version="v", cases=cases)
    assert [row["images"] for row in rows(site)] == [["t1.nii", "t2.nii"]]


def test_folders_that_a_killed_process_made_are_on_the_disk_before_a_release(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.runs / RUN).mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(run_folder.durable, "sync_directory", synced.append)
    with run_folder.opened(site, run=RUN) as folder:
        assert synced == []
    assert set(synced) == {folder, site.runs, site.private}


def test_processes_that_record_at_a_time_lose_nothing(site: Site) -> None:
    command = (sys.executable, "-c", RECORD, str(site.directory))
    writers = [subprocess.Popen([*command, name]) for name in ("a", "b", "c")]
    assert [one.wait(60) for one in writers] == [0, 0, 0]
    assert {row["images"][0] for row in rows(site)} == {f"{name}-{n}.png" for name in "abc" for n in range(8)}


@pytest.mark.slow
def test_nothing_is_ever_sent_before_its_cases_are_on_disk(tmp_path: Path) -> None:
    """Kills the site at every fourth step of a task, and when it has just sent."""
    hospital = Hospital.make(tmp_path, SECURE)
    task = hospital.task(1, model.flatten(model.build(SECURE)))
    hospital.ask(task)
    wanted = expected(cases_of(hospital.site, "train"))

    def forget() -> None:
        hospital.forget()
        path_of(hospital.site, crash.RUN).unlink()

    forget()
    num_steps = hospital.ask(task)
    assert num_steps is not None
    sent = 0
    for kill_at in (*range(0, num_steps, 4), num_steps - 1):
        forget()
        assert hospital.ask(task, kill_at=kill_at) is None
        sent += bool(hospital.outputs(task))
        if any((hospital.site.state / "replies").glob("*.safetensors")):
            assert named(rows(hospital.site, crash.RUN), "train") == wanted
        assert hospital.ask(task) is not None
        assert named(rows(hospital.site, crash.RUN), "train") == wanted
    assert sent, "killed after sending too"


def test_the_table_has_no_more_than_the_case_table_says(site: Site) -> None:
    ask(site, quick())
    with (site.directory / "cases.csv").open() as stream:
        listed = {(row["image"], row["patient_id"]) for row in csv.DictReader(stream)}
    assert {(row["images"][0], row["patient"]) for row in rows(site)} <= listed


def test_report_of_a_run_says_offered_used_and_quarantined_by_code(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = quick()
    frozen.freeze(site)
    image = cases_of(site, "test")[0].case
    (site.directory / image.image).write_bytes(b"")
    ask(site, asked)
    ask(site, asked, "evaluate")
    withdrawal.withdraw(site, patient=cases_of(site, "train")[0].case.patient)
    ask(site, asked, server_round=2)
    first, second = tally.find(site, run=RUN)
    assert first.offered == first.used + sum(first.quarantined.values()) == second.offered
    assert first.quarantined == {"changed_since_frozen": 1} and "withdrawn" in second.quarantined
    assert first.parts["train"] == second.parts["train"] + 1
    assert tally.report(site, RUN, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["quarantined"] == {"changed_since_frozen": 1}
    assert tally.report(site, RUN, as_json=False) == 0
    assert "restore it or freeze again" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="one of the 1 runs"):
        tally.find(site, run="other")
    (site.runs / RUN / tally.FILE).write_text("[{")
    with pytest.raises(StateError):
        tally.find(site, run=RUN)
