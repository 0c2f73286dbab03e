"""What is forked from a fork server shares what that has imported, and nobody holds pages of files for it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import gc, json, multiprocessing, os, signal, sys
from multiprocessing import forkserver as server
from client.process import forkserver

def file_kilobytes(pid):
    rollup = dict(line.split(":") for line in open(f"/proc/{pid}/smaps_rollup").read().splitlines()[1:])
    return int(rollup["Pss_File"].split()[0])

def forked(pipe):
    told = {"known": "torch" in sys.modules}
    told |= {"thresholds": gc.get_threshold(), "frozen": gc.get_freeze_count()}
    pipe.send_bytes(json.dumps({"server": os.getppid(), "self": os.getpid(), **told}).encode())
    pipe.recv_bytes()

if __name__ == "__main__":
    context = forkserver(preload=sys.argv[1:])
    told = []
    for _ in range(2):
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=forked, args=(theirs,))
        process.start()
        told.append(json.loads(ours.recv_bytes()) | {"seen": process.pid})
        told[-1]["files"] = file_kilobytes(told[-1]["server"])
        told[-1]["started"] = server._forkserver._forkserver_pid
        ours.send_bytes(b"leave")
        process.join()
        told[-1]["code"] = process.exitcode
        os.kill(told[-1]["started"], signal.SIGINT)  # as Ctrl-C does to all of them
        os.kill(told[-1]["started"], signal.SIGINT)  # as Ctrl-C does to all of them
    print(json.dumps(told))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process has in memory")


def run(place: Path, *preload: str) -> list[dict[str, Any]]:
    """What two processes say that were forked one after the other."""
    script = place / "forks.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), *preload]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert done.stderr == ""
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@linux
def test_the_server_goes_on_as_a_child_that_knows_all_and_holds_few_pages_of_files(tmp_path: Path) -> None:
    (ordinary, *_), told = run(tmp_path, "torch"), run(tmp_path, "torch", "client.preloaded")
    assert ordinary["server"] == ordinary["started"]
    for one in told:
        assert one["known"] and one["code"] == 0 and one["seen"] == one["self"]
        assert one["server"] != one["started"]
        assert one["files"] < ordinary["files"] / 4
    assert told[0]["server"] == told[1]["server"], "one server for both"
    assert told[0]["started"] == told[1]["started"]
    assert told[0]["started"] == told[1]["started"]


@linux
def test_server_and_who_waits_for_it_are_gone_after_the_command(tmp_path: Path) -> None:
    (one, _) = run(tmp_path, "client.preloaded")
    deadline = time.monotonic() + 20
    while any(is_alive(one[name]) for name in ("server", "started")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


@linux
def test_nobody_looks_for_old_garbage_while_others_are_imported_and_all_do_afterwards(tmp_path: Path) -> None:
    for one in run(tmp_path, "client.preloading"):
        assert one["thresholds"][:2] == list(gc.get_threshold()[:2]) and one["thresholds"][2] > 10**6
    for one in run(tmp_path, "client.preloading", "json", "client.preloaded"):
        assert one["thresholds"] == list(gc.get_threshold()) and one["frozen"] > 1000


def test_to_import_them_elsewhere_does_nothing() -> None:
    code = (
        "import gc, os; before = os.getpid(); import client.preloading, client.preloaded; "
        "print(os.getpid() == before, gc.get_freeze_count(), gc.get_threshold()[2])"
    )
    place = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place)
    assert done.stdout == f"True 0 {gc.get_threshold()[2]}\n"
