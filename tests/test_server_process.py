"""A process is known for certain, and ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server import process, services, supervisor
from server.home import Home, create_home
from server.process import Identity


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


def test_a_process_is_known_by_its_id_and_its_start(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = Identity.of(child.pid)
    assert identity is not None
    identity.write(path)
    assert Identity.read(path) == identity
    other = Identity(pid=child.pid, started=identity.started - 1)
    other.write(path)
    assert Identity.read(path) is None, "the id was used again by another process"
    identity.write(path)
    child.kill()
    child.wait()
    assert Identity.read(path) is None
    path.write_text("noise")
    assert Identity.read(path) is None


def test_a_process_of_somebody_else_is_never_ended(home: Home) -> None:
    own = Identity.of(os.getpid())
    assert own is not None
    Identity(pid=own.pid, started=own.started - 1).write(services.pid_file(home, "gateway"))
    supervisor.end_leftover(home, "gateway")
    assert not services.pid_file(home, "gateway").exists()


def test_a_leftover_that_does_not_heed_sigterm_is_killed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.3)
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn = f"import signal, time; {ignoring}; print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    identity = Identity.of(child.pid)
    assert identity is not None
    identity.write(services.pid_file(home, "gateway"))
    supervisor.end_leftover(home, "gateway")
    assert child.wait(5) == -9
    child.stdout.close()
