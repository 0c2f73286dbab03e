from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.freshness import FUTURE_SECONDS, PAST_SECONDS, Freshness, Marks, Seen, microseconds

SECOND = 1_000_000
NOW = 1_800_000_000 * SECOND
KEY, OTHER = "SHA256:" + "a" * 43, "SHA256:" + "b" * 43
WINDOW = (PAST_SECONDS + FUTURE_SECONDS) * SECOND


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "marks")


def test_a_time_is_taken_once_by_each_key_and_in_any_order(marks: Marks) -> None:
    freshness = Freshness(marks)
    for time in (NOW, NOW - 3, NOW - 1, NOW + 1):
        assert freshness.take(KEY, time, now=NOW) and freshness.take(OTHER, time, now=NOW)
    for time in (NOW, NOW - 3, NOW - 1, NOW + 1):
        assert not freshness.take(KEY, time, now=NOW)


def test_after_a_restart_only_later_times_are_taken(marks: Marks, tmp_path: Path) -> None:
    before = Freshness(marks)
    for time in (NOW, NOW + 2 * SECOND, NOW - SECOND):
        assert before.take(KEY, time, now=NOW)
    after = Freshness(Marks(tmp_path / "marks"))
    assert not any(after.take(KEY, time, now=NOW) for time in (NOW, NOW + 1, NOW + 2 * SECOND))
    assert after.take(KEY, NOW + 2 * SECOND + 1, now=NOW) and after.take(OTHER, NOW, now=NOW)


def test_a_clock_of_the_gateway_that_jumps_opens_no_window(marks: Marks) -> None:
    freshness = Freshness(marks)
    assert freshness.take(KEY, NOW, now=NOW)
    assert freshness.take(KEY, NOW + 2 * WINDOW, now=NOW + 2 * WINDOW)  # forgets the first
    assert not freshness.take(KEY, NOW, now=NOW)  # set back


def test_memory_is_bounded_by_the_window() -> None:
    seen = Seen(floor=0)
    for number in range(100_000):
        time = NOW + number * SECOND // 10
        assert seen.take(time, oldest=time - WINDOW)
    assert len(seen.times) == len(seen.in_order) <= WINDOW * 10 // SECOND + 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80)), max_size=60))
def test_no_time_is_ever_taken_twice_whatever_clocks_do(asked: list[tuple[int, int]]) -> None:
    seen, taken = Seen(floor=-1), set()
    for time, now in asked:
        if seen.take(time, oldest=now - 20):
            assert time not in taken
            taken.add(time)


def test_marks_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "marks"
    marks = Marks(path)
    marks.move(KEY, NOW)
    marks.move(OTHER, NOW + 1)
    marks.move(KEY, NOW + 2)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text().count("\n") == 2
    path.write_bytes(path.read_bytes() + b"SHA256:ccc")
    again = Marks(path)
    assert (again.found(KEY), again.found(OTHER), again.found("SHA256:ccc")) == (NOW + 2, NOW + 1, 0)
    again.move("SHA256:" + "c" * 43, NOW)
    assert Marks(path).found("SHA256:" + "c" * 43) == NOW and Marks(path).found(KEY) == NOW + 2


@pytest.mark.parametrize("stamp", [b"", b"x", b"2026-01-01T00:00:00", b"\xff", b"12"])
def test_what_is_no_time_with_a_zone_is_refused(stamp: bytes) -> None:
    with pytest.raises(ValueError):
        microseconds(stamp)
