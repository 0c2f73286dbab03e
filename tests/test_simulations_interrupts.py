"""Ctrl-C while a simulation imports: heard once, and for certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.interrupts import Interrupts


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C as a terminal gives it; whoever runs the tests may have it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("heard")
def test_it_is_heard_at_the_place_for_it_and_from_there_on_at_once() -> None:
    with Interrupts() as interrupts:
        press()
        with pytest.raises(KeyboardInterrupt):
            interrupts.hear()
        with pytest.raises(KeyboardInterrupt):
            press()
        interrupts.hear()  # a sweep comes here with each run


@pytest.mark.usefixtures("heard")
def test_it_is_heard_at_the_end_where_no_such_place_was_reached() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press()
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press()
        raise ValueError("a typing error")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_it_is_ignored_it_stays_ignored() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            press()
            interrupts.hear()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


IMPORTS = """
import os, signal, sys
from common.command import exit_code
from simulations.interrupts import Interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)

def run():
    with Interrupts():
        exec("os.kill(os.getpid(), signal.SIGINT)")  # as dataclasses and named tuples are made
    return 0

sys.exit(exit_code(run, command="feverfew-simulate"))
"""


def test_in_text_that_is_executed_it_gives_the_exit_code_as_anywhere_else() -> None:
    """Raised there, it makes the interpreter kill itself at its end, with -2."""
    place = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=place, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "feverfew-simulate: interrupted\n")
