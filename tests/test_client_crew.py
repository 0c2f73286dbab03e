from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from client import crew


def square(number: int) -> int:
    return number * number


def failing(number: int) -> int:
    if number == 3:
        raise KeyError(number)
    return number


def test_results_come_in_order_and_parts_are_taken_a_little_ahead_only() -> None:
    taken = []

    def parts() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = crew.done(square, parts(), processes=2)
    assert next(results) == 0
    assert len(taken) <= crew.AHEAD * 2 + 1
    assert list(results) == [number**2 for number in range(1, 50)]


def test_error_of_one_part_is_passed_on() -> None:
    results = crew.done(failing, range(20), processes=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


def serve(connection: Connection) -> None:
    connection.send(list(crew.done(square, range(5), processes=2)))
    connection.recv()


def test_process_of_the_daemon_may_have_a_crew() -> None:
    """The process that holds the app is daemonic, which by itself may have no children."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(60) and ours.recv() == [0, 1, 4, 9, 16]
    process.kill()
    process.join()


def work_on(connection: Connection) -> None:
    for pid in crew.done(slow_pid, range(1000), processes=2):
        connection.send(pid)


def slow_pid(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.slow
def test_crew_of_a_killed_process_ends() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=work_on, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(60)
    pids = {ours.recv() for _ in range(8)}
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
