from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from client import release, statement
from client.__main__ import main
from client.cost import planned_spends
from client.site import Site
from common.errors import LedgerError
from common.plan import Plan
from common.privacy import epsilon, merged
from tests.plans import plan
from tests.sites import write_site
from tests.test_client_restoration import FIRST, SECOND, release_round, release_run

THIRD = plan(study="chest", rounds=1, training__expected_batch=5, privacy__target_epsilon=1.0)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    budgets = [{"study": "hip", "max_epsilon": 5.0}]
    return write_site(tmp_path / "north", num_patients=10, max_epsilon=10.0, study_budgets=budgets)


@dataclass(frozen=True, kw_only=True)
class Told:
    returncode: int
    stdout: str
    stderr: str


def told(*arguments: str) -> Told:
    """Runs the command in this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        patch.setattr(sys, "argv", ["feverfew-client", "ledger", *arguments])
        main()
    return Told(returncode=int(left.value.code or 0), stdout=out.getvalue(), stderr=err.getvalue())


def one_accountant(site: Site, *plans: Plan, part: str = "train") -> float:
    """All steps of all plans, in one history."""
    every = merged([spend for one in plans for spend in planned_spends(site, one)[part]])
    return epsilon(every, delta=site.settings.delta).value


@pytest.mark.slow
def test_three_runs_of_different_plans_cost_what_one_accountant_says_of_all_their_steps(site: Site) -> None:
    for run, asked in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        release_run(site, asked, run=run)
    answer = told(str(site.directory), "--json")
    assert answer.returncode == 0, answer.stderr
    tree = json.loads(answer.stdout)
    parts = {part: one_accountant(site, FIRST, SECOND, THIRD, part=part) for part in ("train", "test")}
    assert tree["parts"]["train"] == pytest.approx(parts["train"], abs=1e-6)
    assert tree["parts"]["test"] == pytest.approx(parts["test"], abs=1e-6)
    assert tree["epsilon"] == pytest.approx(max(tree["parts"].values()), abs=1e-6)
    assert tree["left"] == pytest.approx(10.0 - tree["epsilon"])
    studies = {study["study"]: study for study in tree["studies"]}
    assert {run["run"] for run in studies["chest"]["runs"]} == {"a", "c"}
    assert studies["hip"]["left"] == pytest.approx(5.0 - studies["hip"]["epsilon"])
    assert studies["chest"]["left"] is None
    assert sum(study["epsilon"] for study in tree["studies"]) > tree["epsilon"]


@pytest.mark.slow
def test_what_if_says_what_a_plan_costs_and_whether_it_fits(site: Site, tmp_path: Path) -> None:
    release_run(site, FIRST, run="a")
    path = tmp_path / "plan.json"
    path.write_text(THIRD.to_json())
    answer = told(str(site.directory), "--json", "--what-if", str(path))
    assert answer.returncode == 0, answer.stderr
    tree = json.loads(answer.stdout)
    assert tree["what_if"]["epsilon"] == pytest.approx(1.0, rel=0.01)
    assert tree["what_if"]["total_epsilon"] == pytest.approx(
        max(one_accountant(site, FIRST, THIRD, part=part) for part in ("train", "validation", "test")),
        abs=1e-9,
    )
    assert tree["what_if"]["fits"]
    assert tree["charges"] == json.loads(told(str(site.directory), "--json").stdout)["charges"]


def test_what_if_says_that_a_plan_does_not_fit_a_study(site: Site, tmp_path: Path) -> None:
    dear = plan(study="hip", rounds=1, training__expected_batch=1000, privacy__target_epsilon=6.0)
    path = tmp_path / "plan.json"
    path.write_text(dear.to_json())
    answer = told(str(site.directory), "--what-if", str(path))
    assert answer.returncode == 1
    assert "does not fit" in " ".join(answer.stdout.split())
    with release.open_ledger(site) as ledger:
        assert ledger.spent().value == 0


def test_table_shows_studies_and_runs(site: Site) -> None:
    release_run(site, FIRST, run="the-run")
    console = Console(record=True, width=120)
    statement.show(statement.statement(site), console=console)
    text = console.export_text()
    assert "the-run" in text and "chest" in text and "all studies" in text


def test_broken_ledger_has_no_statement_and_says_what_to_do(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    release.ledger_path(site).unlink()
    with pytest.raises(LedgerError):
        statement.statement(site)
    answer = told(str(site.directory))
    assert answer.returncode == 1
    assert "feverfew-client ledger restore" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_ledger_restore_makes_the_site_work_again(site: Site) -> None:
    release_round(site, FIRST, server_round=1, run="a")
    release.ledger_path(site).unlink()
    answer = told("restore", str(site.directory))
    assert answer.returncode == 0, answer.stderr
    assert FIRST.hash in answer.stdout
    again = told("restore", str(site.directory))
    assert again.returncode == 2
    assert "intact" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [["restore", "--what-if", "plan.json"], ["show", "--plan", "plan.json"]],
    ids=["restore", "show"],
)
def test_option_of_the_other_action_is_an_error(site: Site, arguments: list[str]) -> None:
    action, *rest = arguments
    answer = told(action, str(site.directory), *rest)
    assert answer.returncode == 2
    assert answer.stderr.startswith("feverfew-client: Expected")
