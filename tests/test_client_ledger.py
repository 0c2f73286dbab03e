from __future__ import annotations

import dataclasses
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from client.ledger import Charge, Ledger, Outcome
from common import privacy
from common.errors import Refusal
from tests.ledgers import DELTA, NOISY, alter, charge_of, cost, ledger_at, opened, rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with opened(path) as one:
        yield one


def refusal(ledger: Ledger, charge: Charge, *, max_repeats: int = 0) -> str:
    with pytest.raises(Refusal) as caught:
        ledger.charge(charge, max_repeats=max_repeats)
    return caught.value.code


def test_charge_is_there_for_another_process_when_it_returns(path: Path, ledger: Ledger) -> None:
    assert ledger.charge(charge_of(), max_repeats=0)
    query = "SELECT task FROM entries"
    code = f"import sqlite3; print(sqlite3.connect({str(path)!r}).execute({query!r}).fetchall())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[('a',)]"


def test_charge_outlives_a_process_that_is_killed_right_after_it(path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.ledgers import charge_of, ledger_at\n"
        "ledger = ledger_at(Path(sys.argv[1]))\n"
        "ledger.charge(charge_of('killed'), max_repeats=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert child.returncode == -signal.SIGKILL
    with opened(path) as ledger:
        assert ledger.spent().value == cost(1)
        assert ledger.outcome("killed") is None
        assert not ledger.charge(charge_of("killed"), max_repeats=0)


def test_disk_is_waited_for_at_every_charge(ledger: Ledger) -> None:
    """2 is FULL: SQLite calls fsync before a transaction ends."""
    assert next(ledger._journal.select("PRAGMA synchronous")) == (2,)
    assert next(ledger._journal.select("PRAGMA journal_mode")) == ("delete",)


def test_new_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.spent().value == 0


def test_same_task_is_charged_once(path: Path, ledger: Ledger) -> None:
    assert ledger.charge(charge_of(), max_repeats=0)
    assert not ledger.charge(charge_of(), max_repeats=0)
    with opened(path) as again:
        assert not again.charge(charge_of(), max_repeats=0)
    assert len(rows(path)) == 1
    assert ledger.spent().value == cost(1)


def test_row_holds_everything_that_was_charged(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge_of(time="2030-01-02T03:04:05+00:00"), max_repeats=0)
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute("SELECT * FROM entries").fetchone())
    assert row.pop("previous_hash") == "0" * 64
    assert len(row.pop("hash")) == 64
    assert row.pop("signature")
    assert row == {
        "kind": "charge", "code": None,
        "number": 1, "task": "a", "run": "run-1", "plan_hash": "ab" * 32, "study": "chest", "server_round": 1,
        "purpose": "train", "part": "train", "mechanism": "subsampled_gaussian", "noise_multiplier": 2.0,
        "sample_rate": 1.0, "steps": 1, "nominal_patients": 100, "time": "2030-01-02T03:04:05+00:00",
    }  # fmt: skip


def test_epsilon_is_that_of_all_charges_together(ledger: Ledger) -> None:
    for number in range(5):
        ledger.charge(charge_of(f"{number}", server_round=number), max_repeats=0)
    assert ledger.spent().value == cost(5)
    assert cost(5) > 2 * cost(1), "not the epsilon of one round"


def test_budget_is_spent_to_the_last_charge_and_no_further(path: Path) -> None:
    with opened(path, max_epsilon=cost(3)) as ledger:
        for number in range(3):
            assert ledger.charge(charge_of(f"{number}", server_round=number), max_repeats=0)
        assert refusal(ledger, charge_of("more", server_round=9)) == "budget_exceeded"
        assert ledger.spent().value == cost(3)
    assert [row[2] for row in rows(path)] == ["0", "1", "2"]


def test_charge_just_over_the_budget_is_refused_and_a_smaller_one_is_not(path: Path) -> None:
    with opened(path, max_epsilon=cost(2) - 1e-9) as ledger:
        assert ledger.charge(charge_of("0"), max_repeats=0)
        assert refusal(ledger, charge_of("1", server_round=2)) == "budget_exceeded"
        quieter = dataclasses.replace(NOISY, noise_multiplier=50.0)
        assert ledger.charge(charge_of("2", server_round=3, spend=quieter), max_repeats=0)


def test_budget_counts_every_run_plan_and_study(path: Path) -> None:
    with opened(path, max_epsilon=cost(2)) as ledger:
        ledger.charge(charge_of("0", run="a", plan_hash="1", study="x"), max_repeats=0)
        ledger.charge(charge_of("1", run="b", plan_hash="2", study="y"), max_repeats=0)
        other = charge_of("2", run="c", plan_hash="3", study="z")
        assert refusal(ledger, other) == "budget_exceeded"


def test_budget_of_zero_allows_nothing(path: Path) -> None:
    with opened(path, max_epsilon=0.0) as ledger:
        assert refusal(ledger, charge_of()) == "budget_exceeded"


def test_refused_task_may_be_charged_once_the_budget_is_raised(path: Path) -> None:
    with opened(path, max_epsilon=0.0) as ledger:
        refusal(ledger, charge_of())
    with opened(path) as ledger:
        assert ledger.charge(charge_of(), max_repeats=0)


def test_lowered_budget_holds_although_more_was_once_affordable(path: Path) -> None:
    with opened(path, max_epsilon=cost(5)) as ledger:
        ledger.require_affordable({"train": (dataclasses.replace(NOISY, steps=5),)}, study="chest")
        ledger.charge(charge_of("0"), max_repeats=0)
    with opened(path, max_epsilon=cost(1)) as ledger:
        assert refusal(ledger, charge_of("1", server_round=2)) == "budget_exceeded"


def test_another_delta_is_accounted_anew(path: Path) -> None:
    """The same noise costs more at a smaller delta."""
    with opened(path, max_epsilon=cost(1)) as ledger:
        ledger.require_affordable({"train": (NOISY,)}, study="chest")
    with opened(path, max_epsilon=cost(1), delta=DELTA / 10) as ledger:
        assert refusal(ledger, charge_of()) == "budget_exceeded"


def test_parts_are_composed_apart_and_the_largest_counts(path: Path) -> None:
    with opened(path, max_epsilon=cost(2)) as ledger:
        for number, part in enumerate(("train", "train", "validation", "test", "test")):
            assert ledger.charge(charge_of(f"{number}", part=part, server_round=number), max_repeats=0)
        assert ledger.spent().value == cost(2)
        assert refusal(ledger, charge_of("5", part="test", server_round=9)) == "budget_exceeded"
        assert ledger.charge(charge_of("6", part="validation", server_round=9), max_repeats=0)


def test_spent_can_be_told_for_one_run(ledger: Ledger) -> None:
    for number, run in enumerate(("a", "a", "b")):
        ledger.charge(charge_of(f"{number}", run=run, server_round=number), max_repeats=0)
    assert ledger.spent(run="a").value == cost(2)
    assert ledger.spent(run="b").value == cost(1)
    assert ledger.spent(run="c").value == 0
    assert ledger.spent().value == cost(3)


def test_run_is_affordable_only_on_top_of_what_was_spent(path: Path) -> None:
    with opened(path, max_epsilon=cost(5)) as ledger:
        ledger.charge(charge_of("0"), max_repeats=0)
        ledger.require_affordable(
            {"train": (dataclasses.replace(NOISY, steps=4),), "test": (NOISY,)}, study="chest"
        )
        with pytest.raises(Refusal) as caught:
            ledger.require_affordable(
                {"test": (NOISY,), "train": (dataclasses.replace(NOISY, steps=5),)}, study="chest"
            )
        assert caught.value.code == "budget_exceeded"
        assert len(rows(path)) == 1


def num_accountings() -> int:
    told = privacy._epsilon.cache_info()
    return told.hits + told.misses


def test_charges_within_a_run_found_affordable_need_no_accounting(path: Path) -> None:
    with opened(path, max_epsilon=cost(10)) as ledger:
        ledger.require_affordable({"train": (dataclasses.replace(NOISY, steps=10),)}, study="chest")
    with opened(path, max_epsilon=cost(10)) as ledger:
        before = num_accountings()
        for number in range(10):
            assert ledger.charge(charge_of(f"{number}", server_round=number), max_repeats=0)
        assert num_accountings() == before
        assert refusal(ledger, charge_of("more", server_round=11)) == "budget_exceeded"
        assert num_accountings() > before


def test_bound_of_one_part_or_one_kind_of_release_says_nothing_of_another(path: Path) -> None:
    with opened(path, max_epsilon=cost(2)) as ledger:
        ledger.require_affordable({"train": (dataclasses.replace(NOISY, steps=2),)}, study="chest")
        louder = dataclasses.replace(NOISY, noise_multiplier=0.5)
        assert refusal(ledger, charge_of("0", spend=louder)) == "budget_exceeded"
        assert refusal(ledger, charge_of("0", spend=louder, part="test")) == "budget_exceeded"
        dearer = dataclasses.replace(NOISY, steps=3)
        assert refusal(ledger, charge_of("0", spend=dearer)) == "budget_exceeded"


def test_round_may_be_repeated_with_other_parameters_only_so_often(path: Path, ledger: Ledger) -> None:
    for number in range(3):
        assert ledger.charge(charge_of(f"{number}"), max_repeats=2)
    assert refusal(ledger, charge_of("3"), max_repeats=2) == "too_many_repeats"
    assert len(rows(path)) == 3
    assert not ledger.charge(charge_of("1"), max_repeats=2), "the same task is no repeat"
    for changes in ({"server_round": 2}, {"run": "run-2"}, {"plan_hash": "cd"}, {"part": "test"}):
        assert ledger.charge(charge_of(str(changes), **changes), max_repeats=2)


def test_first_outcome_of_a_task_stands(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge_of(), max_repeats=0)
    assert ledger.outcome("a") is None
    ledger.finish("a", Outcome(kind="failed", code="site_error"))
    ledger.finish("a", Outcome(kind="stored", code=""))
    with opened(path) as again:
        assert again.outcome("a") == Outcome(kind="failed", code="site_error")


def test_study_has_a_budget_of_its_own(path: Path) -> None:
    budgets = {"chest": cost(2)}
    with closing(ledger_at(path, study_budgets=budgets)) as ledger:
        for number in range(2):
            assert ledger.charge(charge_of(f"{number}", server_round=number), max_repeats=0)
        assert refusal(ledger, charge_of("2", server_round=2)) == "budget_exceeded"
        assert ledger.charge(charge_of("2", server_round=2, study="hip"), max_repeats=0)
        assert ledger.spent(study="chest").value == cost(2)
        assert ledger.spent(study="hip").value == cost(1)
        assert ledger.spent().value == cost(3)


def test_budget_of_the_ledger_holds_for_a_study_with_a_larger_one(path: Path) -> None:
    with closing(ledger_at(path, max_epsilon=cost(1), study_budgets={"chest": cost(5)})) as ledger:
        assert ledger.charge(charge_of("0"), max_repeats=0)
        assert refusal(ledger, charge_of("1", server_round=2)) == "budget_exceeded"


def test_bound_that_somebody_wrote_is_not_believed(path: Path) -> None:
    with opened(path, max_epsilon=cost(1)) as ledger:
        ledger.charge(charge_of("0"), max_repeats=0)
    alter(path, "UPDATE bounds SET history = replace(history, '\"steps\":1', '\"steps\":9')")
    with closing(sqlite3.connect(path)) as database:
        assert '"steps":9' in database.execute("SELECT history FROM bounds").fetchone()[0]
    with opened(path, max_epsilon=cost(1)) as ledger:
        assert refusal(ledger, charge_of("1", server_round=2)) == "budget_exceeded"


SPENDER = """
import sys
from pathlib import Path
from common.errors import Refusal
from tests.ledgers import charge_of, cost, ledger_at
name, path, budget, done = sys.argv[1], Path(sys.argv[2]), cost(20), 0
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    ledger = ledger_at(path, max_epsilon=budget)
    try:
        done += ledger.charge(charge_of(f"{name}-{number}", server_round=number), max_repeats=99)
    except Refusal:
        pass
    ledger.close()
print(done)
"""


def test_two_processes_cannot_both_spend_the_last_of_the_budget(path: Path) -> None:
    """Each wants twenty releases at the same time, and twenty is what both may have together."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SPENDER, name, str(path)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("x", "y")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    done = [child.communicate(timeout=60)[0] for child in children]
    assert sum(int(told) for told in done) == 20
    with opened(path) as ledger:
        assert ledger.spent().value == cost(20)
    assert len(rows(path)) == 20
