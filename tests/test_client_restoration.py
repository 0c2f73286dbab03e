from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client import approval, rehearsal, release, restoration
from client.cost import planned_spends
from client.replies import Reply
from client.restoration import Restoration
from client.site import Site
from common.errors import LedgerError, UserError
from common.exchange import Task
from common.plan import Plan
from common.privacy import Spend, merged, worst_epsilon
from tests.plans import TINY, plan
from tests.sites import write_site

FIRST = plan(study="chest", rounds=2, training__expected_batch=1000)  # every patient in every step: quick
SECOND = plan(study="hip", rounds=3, training__expected_batch=1000)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1, max_epsilon=100.0)


def empty_reply() -> Reply:
    return Reply(arrays={"update": np.zeros(3)}, fields={})


def release_round(site: Site, asked: Plan, *, server_round: int, run: str) -> None:
    task = Task(
        run=run,
        plan_hash=asked.hash,
        server_round=server_round,
        purpose="train",
        part="",
        parameters=np.zeros(3, np.float32),
    )
    (kind,) = planned_spends(site, asked)["train"]
    spend = Spend(
        noise_multiplier=kind.noise_multiplier,
        sample_rate=kind.sample_rate,
        steps=asked.training.local_steps,
    )
    release.once(site, asked, task, part="train", spend=spend, work=empty_reply)


def release_run(site: Site, asked: Plan, *, run: str) -> None:
    """All rounds of training, and one evaluation of each part as the plan has it."""
    for server_round in range(1, asked.rounds + 1):
        release_round(site, asked, server_round=server_round, run=run)
    for part, spends in planned_spends(site, asked).items():
        if part != "train":
            for spend in spends:
                task = Task(
                    run=run,
                    plan_hash=asked.hash,
                    server_round=asked.rounds,
                    purpose="evaluate",
                    part=part,
                    parameters=np.zeros(3, np.float32),
                )
                release.once(site, asked, task, part=part, spend=spend, work=empty_reply)


def spent(site: Site, *, study: str | None = None) -> float:
    with release.open_ledger(site) as ledger:
        return ledger.spent(study=study).value


def cost_of(site: Site, *plans: Plan) -> float:
    """What whole runs of these plans cost together."""
    together: dict[str, tuple[Spend, ...]] = {}
    for one in plans:
        for part, spends in planned_spends(site, one).items():
            together[part] = merged([*together.get(part, ()), *spends])
    return worst_epsilon(together, delta=site.settings.delta).value


def restored_runs(site: Site) -> list[str]:
    with release.open_ledger(site) as ledger:
        return [run for _, run, _, _ in ledger.runs() if run.startswith("restored-")]


def files(site: Site) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (release.ledger_path(site), release.head_path(site))}


def put_back(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        path.write_bytes(content)


def is_stopped(site: Site) -> bool:
    try:
        with release.open_ledger(site):
            return False
    except LedgerError:
        return True


def restored(site: Site) -> Restoration:
    assert is_stopped(site)
    done = restoration.restore(site)
    assert not list(site.state.glob(".ledger*")), "nothing of the new file's making is left"
    assert not is_stopped(site)
    return done


def test_cut_tail_costs_the_full_target_of_the_plan_that_was_running(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release_round(site, SECOND, server_round=1, run="b")
    release_round(site, SECOND, server_round=2, run="b")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("DELETE FROM entries WHERE number > (SELECT MAX(number) FROM entries) - 2")
    done = restored(site)
    assert [one.hash for one in done.charged] == [SECOND.hash], "the first has a whole run in the intact rows"
    (run,) = restored_runs(site)
    with release.open_ledger(site) as ledger:
        assert ledger.spent(run=run).value == pytest.approx(cost_of(site, SECOND), abs=1e-12)
    assert spent(site) >= cost_of(site, FIRST, SECOND)
    assert Path(done.old_file).exists()


def test_lost_ledger_costs_the_full_target_of_every_plan_ever_kept(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release_round(site, SECOND, server_round=1, run="b")
    release.ledger_path(site).unlink()
    done = restored(site)
    assert done.num_kept == 0 and done.old_file == ""
    assert spent(site) == cost_of(site, FIRST, SECOND)


def test_plan_that_was_approved_and_never_begun_may_have_been(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    approval.decide(site, SECOND, "approved")
    release.ledger_path(site).unlink()
    assert {one.hash for one in restored(site).charged} == {FIRST.hash, SECOND.hash}


def test_damaged_file_is_read_as_far_as_it_goes(site: Site) -> None:
    release_run(site, FIRST, run="a")
    path = release.ledger_path(site)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + os.urandom(len(content) // 2))
    restored(site)
    assert spent(site) >= cost_of(site, FIRST)


def test_row_that_was_edited_and_all_after_it_prove_nothing(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release_run(site, SECOND, run="b")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("UPDATE entries SET noise_multiplier = 99 WHERE number = 2")
    done = restored(site)
    assert done.num_kept == 1
    assert {one.hash for one in done.charged} == {FIRST.hash, SECOND.hash}
    assert spent(site) >= cost_of(site, FIRST, SECOND)


def test_rolled_back_site_is_restored_and_the_coordinator_is_content(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    old = files(site)
    release_round(site, FIRST, server_round=2, run="a")
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    put_back(old)
    with release.open_ledger(site) as ledger, pytest.raises(LedgerError):
        ledger.require_known(remembered)
    restored(site)
    with release.open_ledger(site) as ledger:
        ledger.require_known(remembered)
    release_round(site, SECOND, server_round=1, run="b")
    with release.open_ledger(site) as ledger:
        ledger.require_known(remembered)
        ledger.verify_signatures()


def test_ledger_that_forked_is_restored_and_the_coordinator_is_content(site: Site) -> None:
    """An old copy was put back, and the site worked on before anybody saw it."""
    release_round(site, FIRST, server_round=1, run="a")
    old = files(site)
    release_round(site, FIRST, server_round=2, run="a")
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    put_back(old)
    release_run(site, SECOND, run="b")
    with release.open_ledger(site) as ledger, pytest.raises(LedgerError):
        ledger.require_known(remembered)
    restored(site)
    with release.open_ledger(site) as ledger:
        ledger.require_known(remembered)
    assert spent(site) >= cost_of(site, FIRST, SECOND)


def test_rollback_after_a_restoration_is_found_again(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    release.ledger_path(site).unlink()
    restored(site)
    old = files(site)
    release_round(site, SECOND, server_round=1, run="b")
    release.ledger_path(site).write_bytes(old[release.ledger_path(site)])
    assert is_stopped(site)


def test_site_set_up_anew_with_another_key_declines_and_can_be_restored(site: Site, tmp_path: Path) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    shutil.rmtree(site.state)
    release.head_path(site).unlink()
    shutil.rmtree(site.state.with_name("plans"))
    (site.private / "site.key").unlink()
    with release.open_ledger(site) as ledger, pytest.raises(LedgerError, match="set up again"):
        ledger.require_known(remembered)
    assert not is_stopped(site), "a coordinator's word alone stops nothing"
    restoration.restore(site, plans=[FIRST])
    with release.open_ledger(site) as ledger:
        ledger.require_known(remembered)
        assert ledger.head.number < 10, "whatever number was claimed"
    assert spent(site) == cost_of(site, FIRST)
    with pytest.raises(UserError, match="intact"):
        restoration.restore(site)


def test_site_that_lost_its_state_and_still_has_its_plans_stops_by_itself(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    shutil.rmtree(site.state)
    release.head_path(site).unlink()
    assert restored(site).num_kept == 0
    assert spent(site) == cost_of(site, FIRST)


def test_plan_of_another_schema_that_is_kept_must_be_named(site: Site) -> None:
    """Nobody here can say what it cost."""
    release_round(site, FIRST, server_round=1, run="a")
    kept = site.state.with_name("plans") / f"{FIRST.hash}.json"
    record = json.loads(kept.read_text())
    kept.with_name("older.json").write_text(
        json.dumps(record | {"plan": {"schema_version": 1, "study": "x"}})
    )
    release.ledger_path(site).unlink()
    with pytest.raises(UserError, match=r"found older\.json of another version; name with --plan"):
        restoration.restore(site)
    restoration.restore(site, plans=[FIRST, SECOND])
    assert spent(site) == cost_of(site, FIRST, SECOND)


def test_every_run_of_a_plan_that_can_be_read_is_charged(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release_run(site, FIRST, run="b")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("UPDATE entries SET noise_multiplier = 99 WHERE number = 1")
    assert [one.hash for one in restored(site).charged] == [FIRST.hash] * 2
    assert spent(site) == cost_of(site, FIRST, FIRST)


def test_second_run_of_a_plan_that_was_cut_is_charged_though_the_first_is_whole(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release_run(site, FIRST, run="b")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("DELETE FROM entries WHERE number > (SELECT MAX(number) FROM entries) - 2")
    assert [one.hash for one in restored(site).charged] == [FIRST.hash]
    assert spent(site) >= cost_of(site, FIRST, FIRST)


def test_more_missing_rows_than_the_known_plans_account_for_must_be_named(site: Site) -> None:
    """The whole site was put back, what it kept of later plans included."""
    release_run(site, FIRST, run="a")
    old = files(site)
    release_run(site, SECOND, run="b")
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    put_back(old)
    (site.directory / "plans" / f"{SECOND.hash}.json").unlink()
    with release.open_ledger(site) as ledger, pytest.raises(LedgerError):
        ledger.require_known(remembered)
    with pytest.raises(UserError, match=r"Expected 8 missing rows .* found plans for 0 of them"):
        restoration.restore(site)
    assert is_stopped(site)
    restoration.restore(site, plans=[SECOND])
    assert spent(site) == cost_of(site, FIRST, SECOND)


def test_two_restorations_are_two_runs(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    for _ in range(2):
        release.ledger_path(site).unlink()
        restoration.restore(site, plans=[FIRST])
    assert len(restored_runs(site)) == 1, "the first was lost with the ledger"
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("DELETE FROM entries WHERE number = (SELECT MAX(number) FROM entries)")
    restored(site)
    assert len(restored_runs(site)) == 2


def test_rehearsal_of_a_plan_leaves_nothing_that_a_restoration_would_charge(tmp_path: Path) -> None:
    north = write_site(tmp_path / "north", size=8, max_epsilon=100.0)
    rehearsal.rehearse(north, plan(**TINY, training__expected_batch=1000))
    assert approval.known_plans(north) == {}
    assert not release.head_path(north).exists() and not north.state.exists()


def test_lost_ledger_is_said_where_only_the_last_row_is_asked_for(site: Site) -> None:
    assert release.ledger_head(site) is None
    release_round(site, FIRST, server_round=1, run="a")
    release.ledger_path(site).unlink()
    with pytest.raises(LedgerError):
        release.ledger_head(site)


def test_restoration_charges_the_named_plans_alone_if_a_person_knows_better(site: Site) -> None:
    release_run(site, FIRST, run="a")
    release.ledger_path(site).unlink()
    restoration.restore(site, plans=[SECOND])
    assert spent(site) == cost_of(site, SECOND)


def test_restoration_is_recorded_over_the_budget_too(tmp_path: Path) -> None:
    poor = write_site(tmp_path / "poor", num_patients=1, max_epsilon=3.0)
    release_round(poor, FIRST, server_round=1, run="a")
    approval.keep(poor, SECOND)
    release.ledger_path(poor).unlink()
    restored(poor)
    assert spent(poor) > 3.0


def test_intact_ledger_is_not_restored(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    before = files(site)
    with pytest.raises(UserError, match="found an intact one"):
        restoration.restore(site)
    assert files(site) == before


def test_row_of_an_unknown_plan_must_be_named(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    shutil.rmtree(site.directory / "plans")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("UPDATE entries SET steps = 0 WHERE number = 1")
    with pytest.raises(UserError, match=f"{FIRST.hash}.*--plan"):
        restoration.restore(site)
    assert is_stopped(site)
    restoration.restore(site, plans=[FIRST])
    assert spent(site) == cost_of(site, FIRST)


@pytest.mark.parametrize("files_of_the_old", [0, 1])
def test_restoration_that_is_killed_can_be_made_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, files_of_the_old: int
) -> None:
    """Killed before the new ledger is in its place, and between the two files."""
    release_run(site, FIRST, run="a")
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("DELETE FROM entries WHERE number > 2")

    class Killed(BaseException):
        pass

    done: list[str] = []
    replace = os.replace

    def dying(source: str | Path, target: str | Path) -> None:
        if Path(target) in (release.ledger_path(site), release.head_path(site)):
            if len(done) == files_of_the_old:
                raise Killed
            done.append(str(target))
        replace(source, target)

    monkeypatch.setattr("client.restoration.os.replace", dying)
    with pytest.raises(Killed):
        restoration.restore(site)
    monkeypatch.undo()
    if is_stopped(site):
        restoration.restore(site)
    assert not is_stopped(site)
    assert spent(site) >= cost_of(site, FIRST)
