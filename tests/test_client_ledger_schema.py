"""Ledgers of other versions: ``former/ledger-1.sql`` was written by software that did not sign rows yet."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import release, restoration, unsigned_ledger
from client.__main__ import COMMAND
from client.journal import Journal
from common import chain
from common.command import exit_code
from common.errors import LedgerError, SchemaError, UserError
from common.privacy import Spend, epsilon, merged
from tests.ledgers import DELTA, charge_of, fill, opened, rows
from tests.sites import write_site

FORMER = (Path(__file__).parent / "former" / "ledger-1.sql").read_text(encoding="utf-8")
FORMER_EPSILON = 6.564345684626634
"""What the software that wrote that file said of it, at delta 1e-5."""
TABLES = "\n".join(line for line in FORMER.split("\n") if not line.startswith(("INSERT", "BEGIN", "COMMIT")))


def write_former(path: Path, *, text: str = FORMER) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def marked(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("PRAGMA user_version").fetchone()
    return int(found)


def mark(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {version}")


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


def test_a_new_ledger_is_marked_with_its_schema(path: Path) -> None:
    fill(path, rounds=1)
    assert marked(path) == 2


def test_a_ledger_of_the_first_schema_is_brought_forward_with_every_charge(path: Path) -> None:
    write_former(path)
    with opened(path) as ledger:
        assert ledger.spent().value == pytest.approx(FORMER_EPSILON, abs=1e-9)
        assert ledger.histories(study="chest")["train"] == (
            Spend(noise_multiplier=1.1, sample_rate=0.25, steps=15),
        )
        assert ledger.runs() == [
            ("chest", "20261122-100000-ab12", "ab" * 32, 4),
            ("hip", "20261122-110000-cd34", "cd" * 32, 2),
        ]
        outcomes = [ledger.outcome(f"{number:064x}") for number in range(1, 7)]
        assert [told and told.kind for told in outcomes] == ["stored"] * 4 + ["failed", None]
        ledger.verify_signatures()
        assert ledger.charge(charge_of("later"), max_repeats=0)
        assert not ledger.charge(charge_of(f"{1:064x}"), max_repeats=0), "that task was charged before"
    assert marked(path) == 2


def test_the_ledger_as_it_was_stays_beside_it(path: Path) -> None:
    write_former(path)
    with opened(path):
        pass
    (copy,) = path.parent.glob("ledger-schema1-*.sqlite")
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("SELECT COUNT(*) FROM charges").fetchone() == (6,)
        assert not unsigned_ledger.problem(database)
    with opened(path):
        pass
    assert len(list(path.parent.glob("ledger-schema1-*"))) == 1, "one copy, not one for each opening"


CHANGES = {
    "a charge": "UPDATE charges SET steps = 1 WHERE number = 2",
    "a charge is gone": "DELETE FROM charges WHERE number = 2",
    "the charge of an outcome is gone": "DELETE FROM charges WHERE task = (SELECT MAX(task) FROM outcomes)",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_former_ledger_that_was_changed_is_not_signed(path: Path, change: str) -> None:
    write_former(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
    with pytest.raises(LedgerError, match="ledger restore"), opened(path):
        pass
    with closing(sqlite3.connect(path)) as database:
        assert unsigned_ledger.is_in(database) and marked(path) == 0


def test_a_former_ledger_in_the_place_of_the_one_that_was_made_of_it_is_found(path: Path) -> None:
    write_former(path)
    kept = path.read_bytes()
    with opened(path) as ledger:
        ledger.charge(charge_of("later"), max_repeats=0)
    path.write_bytes(kept)
    with pytest.raises(LedgerError, match="an old copy"), opened(path):
        pass
    assert path.read_bytes() == kept


class Killed(BaseException):
    """What a process that is killed never gets beyond."""


@pytest.mark.parametrize("place", ["_remember", "_sign_rows", "_opened"])
def test_being_killed_on_the_way_loses_nothing(path: Path, place: str) -> None:
    """Killed after the second file was written, after the rows, and after everything."""
    write_former(path)
    whole = getattr(Journal, place)

    def killed(*arguments: Any) -> None:
        found = whole(*arguments)
        if isinstance(found, sqlite3.Connection):
            found.close()
        raise Killed

    with patch.object(Journal, place, killed), pytest.raises(Killed), opened(path):
        pass
    with closing(sqlite3.connect(path)) as database:
        assert unsigned_ledger.is_in(database) == (place != "_opened"), "whole or not at all"
    with opened(path) as ledger:
        assert ledger.spent().value == pytest.approx(FORMER_EPSILON, abs=1e-9)
        ledger.verify_signatures()


def test_a_ledger_from_before_schemas_were_noted_is_marked_and_otherwise_left(path: Path) -> None:
    fill(path, rounds=3)
    mark(path, 0)
    before = rows(path)
    with opened(path) as ledger:
        ledger.verify_signatures()
    assert (marked(path), rows(path)) == (2, before)
    assert not list(path.parent.glob("*-schema*")), "nothing was changed that a copy would have to keep"


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    fill(path, rounds=3)
    mark(path, 3)
    before = everything(path.parent)
    with pytest.raises(SchemaError, match="schema 2 at most, found 3: a newer Feverfew"), opened(path):
        pass
    assert everything(path.parent) == before


def test_a_file_of_something_else_is_no_ledger(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE patients (name TEXT)")
    with pytest.raises(SchemaError, match="other tables; move it away"), opened(path):
        pass


def test_commands_refuse_a_newer_ledger_in_one_line_and_restore_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = write_site(tmp_path / "north", num_patients=1)
    with release.open_ledger(site) as ledger:
        ledger.charge(charge_of(), max_repeats=0)
    mark(release.ledger_path(site), 7)
    before = everything(site.state)

    def restore() -> int:
        restoration.restore(site, plans=[])
        return 0

    assert exit_code(restore, command=COMMAND) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "a newer Feverfew wrote it; update this one" in told
    assert everything(site.state).items() >= before.items()


def test_a_broken_former_ledger_is_restored_from_the_plans_that_it_names(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=1)
    site.state.mkdir()
    write_former(release.ledger_path(site))
    with closing(sqlite3.connect(release.ledger_path(site))) as database, database:
        database.execute("UPDATE charges SET steps = 1 WHERE number = 2")
    with pytest.raises(UserError, match="found a charge of abab"):
        restoration.restore(site)


NOISE = st.sampled_from([0.8, 1.1, 2.0, 4.5])
CHARGES = st.lists(
    st.tuples(
        st.sampled_from(["train", "validation", "test"]),
        NOISE,
        st.just(1.0),  # the Gaussian mechanism, whose epsilon costs nothing
        st.integers(1, 9),
        st.sampled_from(["stored", "failed", None]),
        st.sampled_from(["chest", "hip"]),
    ),
    max_size=12,
)


@given(charges=CHARGES)
@settings(max_examples=40, deadline=None)
def test_bringing_any_ledger_forward_loses_no_charge_and_keeps_epsilon(charges: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "ledger.sqlite"
        write_former(path, text=TABLES)
        _fill_former(path, charges)
        with opened(path, max_epsilon=1e6) as ledger:
            ledger.verify_signatures()
            for study in (None, "chest", "hip"):
                spends: dict[str, list[Spend]] = {}
                for part, noise, rate, steps, _, of in charges:
                    if study in (None, of):
                        spend = Spend(noise_multiplier=noise, sample_rate=rate, steps=steps)
                        spends.setdefault(part, []).append(spend)
                wanted = {part: merged(history) for part, history in spends.items()}
                assert {part: set(history) for part, history in ledger.histories(study=study).items()} == {
                    part: set(history) for part, history in wanted.items()
                }
            worst = max((epsilon(history, delta=DELTA).value for history in wanted_all(charges)), default=0.0)
            assert ledger.spent().value == worst
            ends = [ledger.outcome(f"task-{number}") for number in range(1, len(charges) + 1)]
            assert [end and end.kind for end in ends] == [end for *_, end, _ in charges]


def wanted_all(charges: list[Any]) -> list[tuple[Spend, ...]]:
    """What was charged by part, added up without any ledger."""
    spends: dict[str, list[Spend]] = {}
    for part, noise, rate, steps, *_ in charges:
        spends.setdefault(part, []).append(Spend(noise_multiplier=noise, sample_rate=rate, steps=steps))
    return [merged(history) for history in spends.values()]


def _fill_former(path: Path, charges: list[Any]) -> None:
    """Writes rows as the former software did: each with the hash of the one before, and outcomes apart."""
    previous = chain.GENESIS
    with closing(sqlite3.connect(path)) as database, database:
        for number, (part, noise, rate, steps, end, study) in enumerate(charges, start=1):
            row = {
                "task": f"task-{number}",
                "run": f"run-{number % 3}",
                "plan_hash": "ab" * 32,
                "study": study,
                "server_round": number,
                "purpose": "train",
                "part": part,
                "mechanism": "subsampled_gaussian",
                "noise_multiplier": noise,
                "sample_rate": rate,
                "steps": steps,
                "nominal_patients": 100,
                "time": "2026-11-22T10:00:00+00:00",
            }
            hashed = chain.link(previous, row)
            values = [number, *row.values(), previous, hashed]
            database.execute(f"INSERT INTO charges VALUES ({', '.join('?' * len(values))})", values)
            if end is not None:
                outcome = (row["task"], end, "", row["time"])
                database.execute("INSERT INTO outcomes VALUES (?, ?, ?, ?)", outcome)
            previous = hashed
