from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest

from client.process import forkserver
from client.worker import Worker
from common import flower
from common.errors import DeploymentError
from tests import tiny

APP = "tests.tiny:client_app"
CONTEXT = forkserver()


@pytest.fixture(autouse=True)
def identity() -> None:
    flower.set_identity(1, node_id=1)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


@pytest.fixture
def worker(log: Path) -> Iterator[Worker]:
    worker = Worker(APP, context=CONTEXT, threads=3, log=log)
    yield worker
    worker.kill()


def test_a_reply_carries_the_result_and_the_id_of_its_message(worker: Worker) -> None:
    message = tiny.task("train")
    name = flower.assign_id(message)
    reply = worker.call(message, tiny.context())
    assert np.array_equal(reply.content.array_records["arrays"]["x"].numpy(), np.ones(3, np.float32))
    assert reply.metadata.reply_to_message_id == name


def test_the_process_stays_warm_between_messages(worker: Worker) -> None:
    pids = {
        worker.call(tiny.task("train"), tiny.context()).content.metric_records["metrics"]["pid"]
        for _ in range(3)
    }
    assert pids == {worker.pid} and worker.pid != os.getpid()


def test_the_process_computes_with_the_threads_that_it_was_given(worker: Worker) -> None:
    reply = worker.call(tiny.task("train"), tiny.context())
    assert reply.content.metric_records["metrics"]["omp"] == 3


def test_torch_computes_with_the_threads_that_it_was_given() -> None:
    worker = Worker(APP, context=CONTEXT, threads=1)
    reply = worker.call(tiny.task("train.torch_threads"), tiny.context(), timeout_seconds=30)
    worker.kill()
    assert reply.content.metric_records["metrics"]["threads"] == 1


@pytest.mark.parametrize("kind", ["raises", "leaves", "nothing"])
def test_a_failing_app_is_reported_without_its_text_and_the_process_lives_on(
    worker: Worker, log: Path, kind: str
) -> None:
    worker.warm_up()
    pid = worker.pid
    reply = worker.call(tiny.task(f"train.{kind}"), tiny.context())
    assert (reply.error.code, reply.error.reason) == (2, "app_failed")
    assert tiny.SECRET not in repr(reply)
    assert tiny.SECRET not in log.read_text()
    assert ("tiny.py" in log.read_text()) == (kind != "nothing"), "where it happened is told"
    assert worker.pid == pid and worker.call(tiny.task("train"), tiny.context()).has_content()


def test_a_process_that_exits_is_reported_and_replaced(worker: Worker) -> None:
    first = worker.call(tiny.task("train.dies"), tiny.context())
    assert (first.error.code, first.error.reason) == (8, "worker_died")
    assert worker.call(tiny.task("train"), tiny.context()).has_content()


def test_sigkill_in_the_middle_of_a_message_is_noticed_at_once(worker: Worker, tmp_path: Path) -> None:
    note = tmp_path / "note"
    killer = threading.Thread(target=_kill_when_noted, args=(note,))
    killer.start()
    reply = worker.call(tiny.task("train.sleeps"), tiny.context(note=str(note)))
    noticed = time.time()
    killer.join()
    assert reply.error.reason == "worker_died"
    assert noticed - note.stat().st_mtime < 2
    assert worker.call(tiny.task("train"), tiny.context()).has_content()


def _kill_when_noted(note: Path) -> None:
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_process_killed_between_messages_costs_no_message(worker: Worker) -> None:
    worker.warm_up()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    wait(worker.waitables)
    assert worker.call(tiny.task("train"), tiny.context()).has_content()


def test_a_message_that_takes_too_long_ends_with_its_process(worker: Worker) -> None:
    worker.warm_up()
    pid = worker.pid
    reply = worker.call(tiny.task("train.sleeps"), tiny.context(), timeout_seconds=0.2)
    assert reply.error.reason == "worker_timed_out"
    assert worker.pid is None and not Path(f"/proc/{pid}").exists()


def test_several_workers_answer_in_the_order_in_which_they_finish() -> None:
    slow, fast = (Worker(APP, context=CONTEXT, threads=1) for _ in range(2))
    slow.start(tiny.task("train.sleeps"), tiny.context())
    fast.start(tiny.task("train"), tiny.context())
    ready = wait([*slow.waitables, *fast.waitables], timeout=20)
    assert set(ready) <= set(fast.waitables) and fast.finish().has_content()
    assert slow.is_busy
    slow.kill()
    assert slow.finish().error.reason == "worker_died" and not slow.is_busy
    fast.kill()


def test_a_busy_worker_takes_no_second_message(worker: Worker) -> None:
    worker.start(tiny.task("train"), tiny.context())
    with pytest.raises(ValueError, match="busy"):
        worker.start(tiny.task("train"), tiny.context())
    worker.finish()
    with pytest.raises(ValueError, match="idle"):
        worker.finish()


def test_an_app_that_cannot_be_loaded_is_an_error_at_warm_up_and_a_constant_reason_later(log: Path) -> None:
    worker = Worker("tests.tiny:no_such_app", context=CONTEXT, threads=1, log=log)
    with pytest.raises(DeploymentError, match="tests.tiny:no_such_app"):
        worker.warm_up()
    reply = worker.call(tiny.task("train"), tiny.context())
    assert (reply.error.code, reply.error.reason) == (1, "app_not_loaded")
    worker.kill()


def test_closing_ends_the_process_and_a_later_call_starts_another(worker: Worker) -> None:
    worker.warm_up()
    pid = worker.pid
    begun = time.monotonic()
    worker.close()
    assert not Path(f"/proc/{pid}").exists() and time.monotonic() - begun < 2
    assert worker.call(tiny.task("train"), tiny.context()).has_content()


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    note = tmp_path / "note"
    parent = multiprocessing.get_context("spawn").Process(target=_work_for_ever, args=(str(note),))
    parent.start()
    while not (note.exists() and note.read_text()):
        time.sleep(0.02)
    child = int(note.read_text())
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _work_for_ever(note: str) -> None:
    flower.set_identity(1, node_id=1)
    worker = Worker(APP, context=CONTEXT, threads=1)
    worker.call(tiny.task("train.sleeps"), tiny.context(note=note))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_context_that_forks_is_refused() -> None:
    with pytest.raises(ValueError, match="fork"):
        Worker(APP, context=multiprocessing.get_context("fork"), threads=1)


def test_an_array_of_many_megabytes_passes_the_pipe_unchanged(worker: Worker) -> None:
    reply = worker.call(tiny.task("train", size=5_000_000), tiny.context())
    assert (reply.content.array_records["arrays"]["x"].numpy() == 1).all()
