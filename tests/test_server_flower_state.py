"""A damaged data base of the SuperLink is set aside, a whole one is left alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from server.flower_state import set_aside_if_damaged


def test_a_damaged_data_base_is_set_aside_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    path.write_bytes(b"no data base at all" * 1000)
    aside = set_aside_if_damaged(path)
    assert aside is not None and aside.read_bytes().startswith(b"no data base")
    assert not path.exists(), "the SuperLink begins with a new one"


def test_a_whole_data_base_and_none_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    assert set_aside_if_damaged(path) is None
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
    assert set_aside_if_damaged(path) is None and path.exists()
