"""A hospital that has not approved, in a real federation: the run waits for it, and no code comes to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import flower
from common.plan import Plan
from server import bundle, checkpoint
from server.run_record import RunRecord
from tests import plans
from tests.ports import free_ports
from tests.test_deployment import BINARIES, ROOT, SITES, Federation, wait_for

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

RECORDER = """
import os, sys, time

def note(request, answer):
    name = os.path.join(os.environ["RECORDED"], f"{time.time_ns()}-{os.getpid()}")
    with open(name, "wb") as file:
        file.write(str(request.url).encode() + b"\\n" + answer)

def record():
    import httpx
    send, send_later = httpx.Client.send, httpx.AsyncClient.send

    def recorded(self, request, **named):
        answer = send(self, request, **named)
        note(request, b"")
        return answer

    async def recorded_later(self, request, **named):
        answer = await send_later(self, request, **named)
        note(request, await answer.aread())
        return answer

    httpx.Client.send, httpx.AsyncClient.send = recorded, recorded_later

record()
"""
"""For ``sitecustomize.py``: every request of every process, and what the gateway was answered."""

CODE = """
import pathlib
pathlib.Path("{written}").write_text("code of the coordinator was run")
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    raise SystemExit({marker!r})
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("approval")
    hook, recorded = directory / "hook", directory / "recorded"
    hook.mkdir()
    recorded.mkdir()
    (hook / "sitecustomize.py").write_text(RECORDER)
    environment = os.environ | {
        "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}",
        "RECORDED": str(recorded),
        "OMP_NUM_THREADS": "1",
    }
    made = Federation(directory, environment)
    gateway, internal = free_ports(2)
    told = made.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert told.returncode == 0, told.stderr
    for name in SITES:
        made.add_site(name)
        change(made.directory / name, policies=[])
    try:
        made.start_coordinator()
        for name in SITES:
            made.start_agent(name)
        wait_for(lambda: list(made.status.sites.values()) == ["online"] * 2, what="sites online")
        yield made
    finally:
        for name in reversed(list(made.processes)):
            made.stop(name)


def change(directory: Path, **settings: Any) -> None:
    path = directory / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def with_code(directory: Path, *, written: Path, marker: str) -> Path:
    """Writes a bundle whose client app is code of its own."""
    bundle.write_bundle(directory, server_app="tests.tiny:server_app", client_app="evil:app")
    settings = directory / "pyproject.toml"
    settings.write_text(settings.read_text().replace('["LICENSE"]', '["LICENSE", "evil.py"]'))
    (directory / "evil.py").write_text(CODE.format(written=written, marker=marker))
    return directory


def test_of_a_bundle_with_code_not_a_byte_is_fetched(federation: Federation, tmp_path: Path) -> None:
    written, marker = tmp_path / "written", os.urandom(64).hex()
    place = with_code(tmp_path / "evil", written=written, marker=marker)
    subprocess.run(
        [sys.executable, "-c", "import evil"], cwd=place, env=os.environ | {"PYTHONPATH": ""}, check=True
    )
    assert written.exists(), "the code does what it must not do here"
    written.unlink()
    content = flower.build_bundle(place)
    assert b"evil.py" in content, "the code is in the bundle"
    record = RunRecord(directory=federation.home.runs / "evil")
    record.directory.mkdir()
    config = {"plan": json.dumps({"sites": 2, "rounds": ["train"]}), "run": "evil"}
    with federation.home.control() as control:
        assert control.start(place, config=config)
    wait_for(lambda: record.end, what="the run's end")
    (told,) = json.loads((record.directory / "report.json").read_text())["rounds"]
    assert told["sites_valid"] == 2, "the sites worked for that run, with the app that they installed"
    assert not written.exists()
    requests = [path.read_bytes() for path in (federation.directory / "recorded").iterdir()]
    home = federation.home.settings
    of_sites = [one for one in requests if f":{home.port}/".encode() in one.splitlines()[0]]
    of_gateway = [
        one for one in requests if f":{home.internal_port}/v1/fleet".encode() in one.splitlines()[0]
    ]
    assert any(b"pull-object" in one for one in of_sites)
    assert any(b"NUMPY" in one for one in of_gateway), "the answers are in the record"
    assert not [one for one in [*of_sites, *of_gateway] if b"get-fab" in one.splitlines()[0]]
    assert "get-fab" not in (federation.home.logs / "gateway.log").read_text()
    middle = content.index(b"evil.py") + len(b"evil.py")
    pieces = [content[start : start + 16] for start in range(middle, middle + 160, 16)]
    for one in of_gateway:
        assert not any(piece in one for piece in pieces)
    for name in SITES:
        for path in (federation.directory / name).rglob("*"):
            assert not path.is_file() or marker.encode() not in path.read_bytes()


@pytest.fixture(scope="module")
def real(federation: Federation) -> Federation:
    """The same federation with Feverfew's own apps."""
    for name in SITES:
        federation.stop(name)
        federation.spawn(name, BINARIES / "feverfew-client", "run", name)
    wait_for(
        lambda: all(federation.log(name).count("connected as node") >= 2 for name in SITES), what="sites"
    )
    return federation


def waits(federation: Federation, name: str, asked: Plan) -> bool:
    return (federation.directory / name / "private" / "waiting" / f"{asked.hash}.json").exists()


def approve(federation: Federation, name: str, asked: Plan) -> None:
    told = federation.verb("feverfew-client", "approve", name, asked.hash[:12], "--yes")
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
def test_a_run_waits_for_persons_and_for_no_longer_after_its_process_was_killed(real: Federation) -> None:
    asked = plans.plan(privacy="none", rounds=1, preprocessing="grey28", approval_deadline_seconds=86400)
    path = real.directory / "plan.json"
    path.write_text(asked.to_json())
    told = real.verb("feverfew-server", "submit", "home", path, "--run", "waits", "--no-follow")
    assert told.returncode == 0, told.stderr
    record = RunRecord(directory=real.home.runs / "waits")
    wait_for(lambda: all(waits(real, name, asked) for name in SITES), what="plans that wait")

    def since() -> dict[str, str]:
        state = checkpoint.latest(record.directory / "checkpoints", run="waits", plan_hash=asked.hash)
        return {} if state is None else state.waiting_since

    first = wait_for(lambda: since() if set(since()) == set(SITES) else None, what="a checkpoint")
    approve(real, "north", asked)
    wait_for(lambda: set(since()) == {"south"}, what="the approval of north to be seen")
    killed = record.life
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    begun = time.monotonic()
    wait_for(lambda: record.life and record.life.pid != killed.pid, what="a new process")
    wait_for(lambda: set(since()) == {"south"}, what="the run to wait again")
    assert since()["south"] == first["south"], "the deadline counts from the first asking"
    assert record.end is None
    approve(real, "south", asked)
    approved = time.monotonic()
    end = wait_for(lambda: record.end, what="the run's end")
    print(
        f"back after {approved - begun:.1f} s, ended {time.monotonic() - approved:.1f} s after the approval"
    )
    assert end.status == "completed", end.message
    report = json.loads((record.directory / "report.json").read_text())
    assert {name: one["rounds_valid"] for name, one in report["participation"].items()} == dict.fromkeys(
        SITES, 1
    )
