"""What holds for every test."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from multiprocessing import forkserver as server

import pytest

from client.process import forkserver

PRELOADED = ("client.app", "tests.tiny")
LOGS = ("feverfew", "feverfew.site", "feverfew.agent", "feverfew.worker", "feverfew.supervisor")


def pytest_collection_finish() -> None:
    """Spares later garbage collections what the imports left; Flower's Bulyan asks for one per update."""
    gc.collect()
    gc.freeze()
    if "client.worker" in sys.modules:  # else no test starts a worker
        start_the_fork_server()


def start_the_fork_server() -> None:
    """Lets every worker of every test come from one process that has imported what they need: whoever starts
    one first decides, and it may be somebody who needs nothing."""
    forkserver(preload=PRELOADED)
    server.ensure_running()


@pytest.fixture(scope="module")
def fork_server_again() -> Iterator[None]:
    """For tests that end the fork server of this process: those that come later find one."""
    yield
    start_the_fork_server()


def _silenced() -> list[str]:
    loggers = [logging.getLogger(name) for name in LOGS]
    return [one.name for one in loggers if one.disabled or not one.propagate or one.level > logging.INFO]


@pytest.fixture(autouse=True)
def our_log_is_left_on() -> Iterator[None]:
    """A test that silences our log would hide from later ones what they look for in it."""
    yield
    found = _silenced()
    for name in found:
        logger = logging.getLogger(name)
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)
    assert found == [] and logging.root.manager.disable == 0
