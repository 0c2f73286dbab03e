"""The log of a site in JSON: what its processes and their libraries write, and what of it is kept apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client import log, skeleton
from client.site import Site, open_site
from tests.test_common_logline import parsed
from tests.tiny import SECRET

ROOT = Path(__file__).parents[1]
DAEMON = """
import sys
from pathlib import Path
from client import log
from client.__main__ import _log_to
from client.site import open_site
from client.process import forkserver
from client.worker import Worker
from common import flower, logline
from tests import tiny

if __name__ == "__main__":
    site = open_site(Path(sys.argv[1]))
    flower.set_identity(1, node_id=1)
    formatter = log.formatter("json", "worker", site=site.name)
    file = site.state / "agent.log"
    with logline.own_output(log.kept_apart(site)) as output:
        _log_to(site, form="json", output=output)
        how = {"context": forkserver(), "threads": 1, "log": file, "formatter": formatter}
        worker = Worker("tests.tiny:client_app", **how)
        context = tiny.context(run="run-1")
        for kind in ("train.prints", "train.raises", "train.dies", "train"):
            worker.call(tiny.task(kind, server_round=4), context)
        worker.close()
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=100)
    return open_site(tmp_path / "north")


def test_what_a_library_writes_at_a_site_is_kept_apart_and_not_repeated(site: Site) -> None:
    wrap = log.kept_apart(site)
    (line,) = parsed(wrap(f"UserWarning: Invalid value for VR PN: {SECRET!r}"))
    assert SECRET not in json.dumps(line) and line["site"] == "north" and "errors.log" in line["message"]
    kept = site.private / "errors.log"
    assert SECRET in kept.read_text() and kept.stat().st_mode & 0o077 == 0
    assert wrap(json.dumps(line)) == json.dumps(line)


@pytest.mark.slow
def test_a_daemon_and_its_worker_write_json_only_and_no_word_of_a_patient(site: Site, tmp_path: Path) -> None:
    program = tmp_path / "daemon.py"
    program.write_text(DAEMON)
    done = subprocess.run(
        [sys.executable, program, site.directory],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told, kept = parsed(done.stdout), parsed((site.state / "agent.log").read_text())
    assert sum("errors.log" in line["message"] for line in told) >= 3
    assert any("ended with exit code 3" in line["message"] for line in told)
    (failed,) = (line for line in kept if "exception" in line)
    assert failed.items() >= {"process": "worker", "site": "north", "run": "run-1", "round": 4}.items()
    assert "builtins.RuntimeError" in failed["exception"]
    assert SECRET not in done.stdout + (site.state / "agent.log").read_text()
    assert (site.private / "errors.log").read_text().count(SECRET) == 3
