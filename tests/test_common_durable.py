"""Files that are replaced whole, whatever goes wrong."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import durable


def test_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    durable.write(path, b"old")
    (tmp_path / f".plan.json.{os.getpid()}").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write(path, b"new")
    assert path.read_bytes() == b"old"


def test_who_says_so_waits_for_no_disk_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    with durable.waiting(False):
        durable.write(tmp_path / "a", b"content")
        with ThreadPoolExecutor(1) as other:
            assert other.submit(durable.synchronous).result() == "FULL", "another thread waits"
        assert (tmp_path / "a").read_bytes() == b"content" and not waited
        assert durable.synchronous() == "OFF"
    durable.write(tmp_path / "b", b"content")
    assert len(waited) == 2 and durable.synchronous() == "FULL"


def test_a_lock_is_waited_for_no_longer_than_was_said(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        durable.locked(path),
        pytest.raises(TimeoutError, match="let go within"),
        durable.locked(path, seconds=0.05),
    ):
        pass
    with durable.locked(path, seconds=0.05), path.open("ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_locked_file_keeps_others_out_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with durable.locked(path), path.open("ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
