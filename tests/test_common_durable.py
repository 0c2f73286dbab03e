"""Files that are replaced whole, whatever goes wrong."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
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


def test_a_file_is_written_over_the_one_before_the_last(tmp_path: Path) -> None:
    path = tmp_path / "head"
    for text in (b"first", b"second", b"3rd"):
        durable.rewrite(path, text)
    files = {one.name: (one.read_bytes(), one.stat().st_ino) for one in tmp_path.iterdir()}
    assert {name: text for name, (text, _) in files.items()} == {"head": b"3rd", ".head.spare": b"second"}
    durable.rewrite(path, b"the fourth")
    assert path.read_bytes() == b"the fourth"
    assert {one.stat().st_ino for one in tmp_path.iterdir()} == {number for _, number in files.values()}
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("killed", range(3))
def test_a_file_that_is_rewritten_is_whole_whatever_is_killed_when(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head"
    for text in (b"first", b"old"):
        durable.rewrite(path, text)
    calls = 0

    def until_killed(do: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Path) -> None:
            nonlocal calls
            calls += 1
            if calls > killed:
                raise KeyboardInterrupt
            do(*arguments)

        return step

    with monkeypatch.context() as steps:
        for name in ("link", "replace"):
            steps.setattr(os, name, until_killed(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            durable.rewrite(path, b"new")
    assert path.read_bytes() == (b"old" if killed < 2 else b"new")
    for text in (b"newer", b"newest"):
        durable.rewrite(path, text)
        assert path.read_bytes() == text
    assert sorted(one.name for one in tmp_path.iterdir()) == [".head.spare", "head"]


def test_a_copy_by_another_name_is_never_written_over(tmp_path: Path) -> None:
    """As programs for backups make it of each file that has not changed since the last one."""
    path, copy = tmp_path / "head", tmp_path / "monday"
    durable.rewrite(path, b"on monday")
    os.link(path, copy)
    for text in (b"on tuesday", b"on wednesday", b"on thursday"):
        durable.rewrite(path, text)
        assert (copy.read_bytes(), path.read_bytes()) == (b"on monday", text)


def test_a_file_is_rewritten_where_no_file_has_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    for text in (b"first", b"second"):
        durable.rewrite(tmp_path / "head", text)
        assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("head", text)]


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
    for _ in range(2):
        durable.rewrite(tmp_path / "c", b"content")
    assert len(waited) == 6


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
