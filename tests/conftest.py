"""What holds for every test."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

LOGS = ("feverfew", "feverfew.site", "feverfew.agent", "feverfew.worker", "feverfew.supervisor")


def pytest_collection_finish() -> None:
    """Spares later garbage collections what the imports left; Flower's Bulyan asks for one per update."""
    gc.collect()
    gc.freeze()


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
