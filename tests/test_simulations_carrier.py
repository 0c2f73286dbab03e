"""The processes of a simulation: what ends the command ends all of them, with one clear line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations import carrier

ROUNDS = ["data.patients_per_site=4", "privacy=none", "plan.rounds=5000", "hydra.run.dir=out"]
ENDS_SECONDS = 20.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which processes there are")


BEGIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "simulations", *sys.argv[2:]])
"""


def begun(place: Path, *overrides: str, interrupt: str = "default") -> subprocess.Popen[str]:
    """The command, with a group of processes of its own, as a terminal gives it.

    Args:
        interrupt: what it finds about Ctrl-C; "ignored" in the background of a script.
    """
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN, interrupt, *overrides],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def processes(group: int, *, what: str = "cmdline") -> list[str]:
    """The commands of the processes of a group, or what they have mapped; of one that has ended, nothing."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(place.name)) == group:
                found.append((place / what).read_text().replace("\0", " "))
        except (OSError, ProcessLookupError):
            continue
    return [one for one in found if one]


def wait_for(condition: Callable[[], bool], *, what: str) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def all_are_gone(group: int) -> bool:
    end = time.monotonic() + ENDS_SECONDS
    while (left := processes(group)) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def is_importing(group: int) -> bool:
    return any("libtorch" in one for one in processes(group, what="maps"))


def rounds_done(place: Path) -> int:
    events = place / "out" / "events.jsonl"
    return events.read_text(encoding="utf-8").count("round_finished") if events.exists() else 0


@linux
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["importing", "training"])
def test_ctrl_c_gives_one_clear_line_and_ends_all_processes(stage: str, tmp_path: Path) -> None:
    command = begun(tmp_path, *ROUNDS)
    if stage == "importing":
        wait_for(lambda: is_importing(command.pid), what="the fork server")
    else:
        wait_for(lambda: rounds_done(tmp_path) > 0, what="a round")
    os.killpg(command.pid, signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    bars = ("/5000", "steps of this round")
    told = [line for line in errors.splitlines() if line.strip() and not any(one in line for one in bars)]
    assert (command.returncode, told) == (130, ["feverfew-simulate: interrupted"])
    assert all_are_gone(command.pid)


@linux
@pytest.mark.slow
def test_ctrl_c_does_not_reach_what_a_script_began_in_its_background(tmp_path: Path) -> None:
    command = begun(tmp_path, *ROUNDS, interrupt="ignored")
    try:
        wait_for(lambda: is_importing(command.pid), what="the fork server")
        for _ in range(30):
            os.killpg(command.pid, signal.SIGINT)
            time.sleep(0.1)
        wait_for(lambda: rounds_done(tmp_path) > 0, what="a round")
        os.killpg(command.pid, signal.SIGINT)
        done = rounds_done(tmp_path)
        wait_for(lambda: rounds_done(tmp_path) > done + 5, what="further rounds")
    finally:
        command.kill()
        command.communicate(timeout=60)
    assert all_are_gone(command.pid)


def test_a_process_that_does_not_hear_the_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "_LEAVES_SECONDS", 0.1)
    deaf = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    deaf.start()
    carried = carrier.Carrier(command="feverfew-simulate")
    carried._process, carried._place = deaf, tempfile.TemporaryDirectory()
    carried._connection, _ = multiprocessing.Pipe()
    carried.__exit__(None, None, None)
    deaf.join(60)
    assert deaf.exitcode == -signal.SIGKILL


@linux
def test_after_a_mistake_nothing_is_imported_any_more(tmp_path: Path) -> None:
    command = begun(tmp_path, "plan.rounds=many")
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 2 and len(errors.splitlines()) == 1
    assert not is_importing(command.pid), "at once"
    assert all_are_gone(command.pid)


@linux
def test_what_a_killed_command_was_importing_does_not_wait_for_it(tmp_path: Path) -> None:
    command = begun(tmp_path, *ROUNDS)
    wait_for(lambda: is_importing(command.pid), what="the fork server")
    command.kill()
    command.communicate(timeout=60)
    assert all_are_gone(command.pid)
