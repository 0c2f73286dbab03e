from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import course
from client.site import Site
from common.errors import Refusal, StateError
from common.exchange import Task
from common.plan import Plan
from tests.plans import TINY, plan
from tests.sites import write_site

ROUNDS: dict[str, Any] = {**TINY, "rounds": 6, "evaluation__validation_every": 3}
ASKED, OTHER = plan(**ROUNDS), plan(**ROUNDS, seed=1)
EXACT_PLAN = plan(**ROUNDS, privacy="none")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", size=8, num_patients=4, max_repeats=2)


def task(server_round: int, purpose: Any = "train", part: str = "", **changes: Any) -> Task:
    fields: dict[str, Any] = {"run": "run-1", "plan_hash": ASKED.hash, "parameters": np.zeros(2, np.float32)}
    asked: dict[str, Any] = {"server_round": server_round, "purpose": purpose, "part": part}
    return Task(**(fields | asked | changes))


def other(number: float) -> np.ndarray:
    return np.full(2, number, np.float32)


def refusal(site: Site, asked: Task, which: Plan = ASKED) -> str:
    with pytest.raises(Refusal) as caught:
        course.enter(site, which, asked)
    return caught.value.code


def test_a_whole_run_may_be_asked_and_asked_again(site: Site) -> None:
    """As a server does that lost everything: the same tasks, in the same order."""
    whole = [task(number) for number in range(1, 7)]
    whole[3:3] = [task(3, "evaluate", "validation")]
    whole += [task(6, "evaluate", "validation"), task(6, "evaluate", "test"), task(6, "deliver")]
    for asked in [*whole, *whole]:
        course.enter(site, ASKED, asked)


def test_a_site_that_was_away_comes_in_at_any_later_round(site: Site) -> None:
    course.enter(site, ASKED, task(2))
    course.enter(site, ASKED, task(5))


@pytest.mark.parametrize(
    "asked",
    [
        task(0),
        task(7),
        task(10**9),
        task(1, "evaluate", "validation"),
        task(7, "evaluate", "validation"),
        task(3, "evaluate", "test"),
        task(3, "evaluate", "train"),
        task(5, "deliver"),
        task(0, "prepare"),
        task(1, "train", "test"),
    ],
)
def test_a_task_that_the_plan_does_not_have_is_refused(site: Site, asked: Task) -> None:
    assert refusal(site, asked) == "wrong_round"


def test_a_plan_that_tests_nothing_is_not_tested(site: Site) -> None:
    untested = plan(**ROUNDS, evaluation__test_at_end=False)
    assert refusal(site, task(6, "evaluate", "test"), untested) == "wrong_round"


@pytest.mark.parametrize("earlier", [task(3), task(3, "evaluate", "validation"), task(1)])
def test_a_run_does_not_go_back_to_what_it_never_asked(site: Site, earlier: Task) -> None:
    course.enter(site, ASKED, task(4))
    assert refusal(site, earlier) == "wrong_round"
    course.enter(site, ASKED, task(4, parameters=other(1)))
    course.enter(site, ASKED, task(5))


def test_nothing_new_is_trained_after_the_model_was_delivered(site: Site) -> None:
    course.enter(site, ASKED, task(6, "deliver"))
    assert refusal(site, task(6)) == "wrong_round"


def test_an_earlier_round_is_asked_again_with_other_parameters_a_few_times_only(site: Site) -> None:
    """As a server does that fell back to the checkpoint before, when other sites answer than did then."""
    course.enter(site, ASKED, task(2))
    course.enter(site, ASKED, task(3))
    for number in (1, 2):
        course.enter(site, ASKED, task(2, parameters=other(number)))
    assert refusal(site, task(2, parameters=other(3))) == "too_many_repeats"
    course.enter(site, ASKED, task(2))
    course.enter(site, ASKED, task(2, parameters=other(1)))
    course.enter(site, ASKED, task(3, parameters=other(1)))


def test_a_run_belongs_to_one_plan_for_ever(site: Site) -> None:
    course.enter(site, ASKED, task(1))
    assert refusal(site, task(2, plan_hash=OTHER.hash), OTHER) == "other_plan"
    with pytest.raises(Refusal) as caught:
        course.require_plan(site, OTHER, run="run-1")
    assert caught.value.code == "other_plan"
    course.require_plan(site, ASKED, run="run-1")
    course.enter(site, OTHER, task(1, run="run-2", plan_hash=OTHER.hash))


@pytest.mark.parametrize(("asked", "own"), [(ASKED, "course.sqlite"), (EXACT_PLAN, "exact_course.sqlite")])
def test_the_file_that_notes_tasks_is_there_from_the_first_preparation_or_that_fails(
    site: Site, asked: Plan, own: str
) -> None:
    course.require_plan(site, asked, run="run-1")
    assert [path.name for path in site.state.iterdir()] == [own]
    shutil.rmtree(site.state)
    (site.state / own).mkdir(parents=True)
    with pytest.raises(sqlite3.OperationalError):
        course.require_plan(site, asked, run="run-1")


def test_runs_are_judged_each_by_itself(site: Site) -> None:
    course.enter(site, ASKED, task(5))
    course.enter(site, ASKED, task(1, run="run-2"))
    assert refusal(site, task(4)) == "wrong_round"


def test_a_refused_task_leaves_no_trace(site: Site) -> None:
    assert refusal(site, task(9)) == "wrong_round"
    course.enter(site, ASKED, task(4))
    assert refusal(site, task(3)) == "wrong_round"
    assert refusal(site, task(3)) == "wrong_round"
    course.require_plan(site, OTHER, run="run-9")


def test_damage_is_told_and_nothing_is_overwritten(site: Site) -> None:
    site.state.mkdir()
    path = site.state / "course.sqlite"
    path.write_bytes(b"no data base" * 500)
    with pytest.raises(StateError, match="move the file away"):
        course.enter(site, ASKED, task(1))
    assert path.read_bytes() == b"no data base" * 500
