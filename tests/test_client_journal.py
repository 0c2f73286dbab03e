from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client import journal
from client.journal import sound_rows
from client.ledger import Outcome
from common import chain, durable
from common.errors import LedgerError
from tests.ledgers import KEY, alter, charge_of, cost, fill, fill_more, opened

COLUMNS = (
    "task", "run", "plan_hash", "study", "server_round", "purpose", "part", "mechanism", "noise_multiplier",
    "sample_rate", "steps", "nominal_patients", "time", "previous_hash", "hash", "code",
)  # fmt: skip

CHARGE = """
import sys
from pathlib import Path
from tests.ledgers import fill_more
fill_more(Path(sys.argv[1]), 6, 7)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.mark.parametrize("column", COLUMNS)
def test_edited_row_is_found(path: Path, column: str) -> None:
    fill(path, 3)
    alter(path, f"UPDATE entries SET {column} = 99 WHERE number = 2")
    with pytest.raises(LedgerError, match="row [23] changed, or a row before it missing"):
        opened(path)


def test_row_that_somebody_else_wrote_is_found_by_its_signature(path: Path) -> None:
    """Whoever lacks the key can compute hashes and not sign them."""
    fill(path, 3)
    stranger = ec.generate_private_key(ec.SECP384R1())
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.row_factory = sqlite3.Row
        previous = chain.GENESIS
        for number in (1, 2, 3):
            row = dict(database.execute("SELECT * FROM entries WHERE number = ?", (number,)).fetchone())
            row |= {"noise_multiplier": 50.0, "previous_hash": previous}
            del row["hash"], row["signature"]
            head = chain.signed(number, chain.link(previous, row), key=stranger)
            previous = head.hash
            database.execute(
                "UPDATE entries SET noise_multiplier = 50.0, previous_hash = ?, hash = ?, signature = ? "
                "WHERE number = ?",
                (row["previous_hash"], head.hash, head.signature, number),
            )
    with pytest.raises(LedgerError, match="row 3 not signed by this site's key"):
        opened(path)


def test_signature_that_was_edited_in_the_middle_is_found_when_all_are_checked(path: Path) -> None:
    fill(path, 3)
    alter(path, "UPDATE entries SET signature = 'AAAA' WHERE number = 2")
    with opened(path) as ledger, pytest.raises(LedgerError, match="row 2 not signed"):
        ledger.verify_signatures()


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM entries WHERE number = 3"],
        ["DELETE FROM entries WHERE number > 1"],
        ["DELETE FROM entries"],
    ],
    ids=["last", "last two", "all"],
)
def test_tail_that_was_cut_is_found(path: Path, statements: list[str]) -> None:
    fill(path, 3)
    alter(path, *statements)
    with pytest.raises(LedgerError, match="no row 3 as it was once written"):
        opened(path)


def test_rolled_back_copy_is_found(path: Path) -> None:
    fill(path, 3)
    old = path.read_bytes()
    fill_more(path, 3, 6)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="no row 6"):
        opened(path)


def test_rows_are_read_again_only_where_somebody_else_has_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(rows: Any) -> Any:
        found = sound_rows(rows)
        read.append(len(found[0]))
        return found

    monkeypatch.setattr(journal, "sound_rows", counted)
    fill(path, 3)
    for number in (4, 5, 6):
        fill_more(path, number - 1, number)
    with opened(path) as ledger:
        assert ledger.spent().value == cost(6)
    assert read == [0], "the ledger was new, and then as it was left"
    subprocess.run([sys.executable, "-c", CHARGE, str(path)], check=True)
    fill_more(path, 7, 8)
    fill_more(path, 8, 9)
    assert read == [0, 7], "after another process it was read once"


def test_edit_whose_time_was_put_back_is_found(path: Path) -> None:
    fill(path, 3)
    before = path.stat()
    content = path.read_bytes()
    place = content.index(b"task-2")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"task-9")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(LedgerError, match="row 2 changed"):
        opened(path)


@pytest.mark.parametrize("lost", ["ledger.sqlite", "ledger.head"])
def test_missing_file_of_the_two_is_found(path: Path, lost: str) -> None:
    fill(path, 3)
    path.with_name(lost).unlink()
    with pytest.raises(LedgerError, match=lost):
        opened(path)


def test_head_of_another_key_is_not_believed(path: Path) -> None:
    fill(path, 3)
    stranger = chain.signed(1, "ab" * 32, key=ec.generate_private_key(ec.SECP384R1()))
    path.with_name("ledger.head").write_text(json.dumps(dataclasses.asdict(stranger)))
    with pytest.raises(LedgerError, match="signed by this site's key"):
        opened(path)


def test_crash_between_the_two_files_is_no_loss(path: Path) -> None:
    fill(path, 2)
    head = path.with_name("ledger.head").read_bytes()
    fill_more(path, 2, 3)
    path.with_name("ledger.head").write_bytes(head)
    with opened(path) as ledger:
        assert ledger.spent().value == cost(3)
        ledger.finish("task-1", Outcome(kind="stored", code=""))
    assert json.loads(path.with_name("ledger.head").read_text())["number"] == 4


def test_second_file_catches_up_after_a_crash_although_no_row_is_added(path: Path) -> None:
    """Else the last row could be taken away until the next one is written."""
    fill(path, 2)
    head = path.with_name("ledger.head").read_bytes()
    fill_more(path, 2, 3)
    path.with_name("ledger.head").write_bytes(head)
    with opened(path) as ledger:
        assert not ledger.charge(charge_of("task-3", server_round=3), max_repeats=0)
    assert json.loads(path.with_name("ledger.head").read_text())["number"] == 3


def roll_back_everything(path: Path, *, rounds: int, lost: int) -> chain.Head:
    """Both files as they were ``lost`` rows ago; returns the head that a coordinator remembers."""
    fill(path, rounds - lost)
    files = {name: path.with_name(name).read_bytes() for name in ("ledger.sqlite", "ledger.head")}
    fill_more(path, rounds - lost, rounds)
    with opened(path) as ledger:
        head = ledger.head
    for name, content in files.items():
        path.with_name(name).write_bytes(content)
    return head


def test_coordinator_who_remembers_a_later_row_stops_the_site_for_good(path: Path) -> None:
    head = roll_back_everything(path, rounds=5, lost=2)
    with opened(path) as ledger, pytest.raises(LedgerError, match="no row 5"):
        ledger.require_known(head)
    with pytest.raises(LedgerError, match="no row 5"):
        opened(path)  # also for other coordinators, until it is restored


def test_coordinator_who_remembers_another_row_of_that_number_stops_the_site(path: Path) -> None:
    head = roll_back_everything(path, rounds=4, lost=2)
    fill_more(path, 2, 6, name="other")
    with opened(path) as ledger, pytest.raises(LedgerError, match="no row 4"):
        ledger.require_known(head)


def test_coordinator_who_remembers_an_earlier_row_is_content(path: Path) -> None:
    fill(path, 3)
    with opened(path) as ledger:
        head = ledger.head
        ledger.require_known(chain.signed(0, chain.GENESIS, key=KEY))
    fill_more(path, 3, 6)
    with opened(path) as ledger:
        ledger.require_known(head)


def test_head_that_a_coordinator_made_up_refuses_the_run_and_does_not_stop_the_site(path: Path) -> None:
    fill(path, 3)
    made_up = chain.signed(99, "cd" * 32, key=ec.generate_private_key(ec.SECP384R1()))
    with opened(path) as ledger, pytest.raises(LedgerError, match="nor this site's signature|neither it"):
        ledger.require_known(made_up)
    fill_more(path, 3, 4)


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM entries WHERE number = 1"],
        ["DELETE FROM entries WHERE number = 2"],
        ["DELETE FROM entries WHERE number = 2", "UPDATE entries SET number = 2 WHERE number = 3"],
        [
            "UPDATE entries SET number = 9 WHERE number = 1",
            "UPDATE entries SET number = 1 WHERE number = 2",
            "UPDATE entries SET number = 2 WHERE number = 9",
        ],
        ["UPDATE entries SET number = number + 1 WHERE number = 3"],
    ],
    ids=["first deleted", "middle deleted", "deleted and renumbered", "swapped", "gap"],
)
def test_deleted_and_swapped_rows_are_found(path: Path, statements: list[str]) -> None:
    fill(path, 3)
    alter(path, *statements)
    with pytest.raises(LedgerError, match="ledger restore"):
        opened(path)


def test_last_row_is_missed_where_its_outcome_is_left(path: Path) -> None:
    fill(path, 3)
    with opened(path) as ledger:
        ledger.finish("task-3", Outcome(kind="stored", code=""))
    alter(path, "DELETE FROM entries WHERE number = 3")
    with pytest.raises(LedgerError, match="ledger restore"):
        opened(path)


def test_untouched_ledger_is_opened_and_goes_on(path: Path) -> None:
    fill(path, 3)
    with opened(path) as ledger:
        assert ledger.charge(charge_of("task-4", server_round=4), max_repeats=0)
        ledger.verify_signatures()
    with opened(path) as ledger:
        assert ledger.spent().value == cost(4)


@pytest.mark.parametrize("damage", ["garbage", "half", "header", "text"])
def test_damaged_file_is_reported_and_left_as_it_is(path: Path, damage: str) -> None:
    fill(path, 40)
    whole = path.read_bytes()
    assert len(whole) > 3 * 4096
    content = {
        "garbage": os.urandom(len(whole)),
        "half": whole[: len(whole) // 2],
        "header": b"\0" * 100 + whole[100:],
        "text": b"not a ledger",
    }[damage]
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="ledger restore"):
        opened(path)
    assert path.read_bytes() == content
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"ledger.sqlite", "ledger.head", ".ledger.head.spare", "ledger.lock"}


def test_a_lock_that_nobody_lets_go_is_an_error_and_no_wait_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path, 3)
    monkeypatch.setattr(journal, "_SECONDS_TO_LOCK", 0.05)
    with durable.locked(path.with_suffix(".lock")), pytest.raises(TimeoutError):
        opened(path)
    with opened(path) as ledger, durable.locked(path.with_suffix(".lock")), pytest.raises(TimeoutError):
        ledger.finish("task-0", Outcome(kind="stored", code=""))
