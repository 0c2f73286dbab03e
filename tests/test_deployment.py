"""A real federation on loopback: SuperLink, SuperExec, gateway and two agents, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import credential
from client.site import open_site
from common.plan import Plan
from server import submission
from server.home import Home, open_home
from server.process import Identity
from server.services import HEADS_DIRECTORY, RUN_DIRECTORY, TRAIL_KEY, pid_file
from server.status import Status, status
from server.submission import Followed, Outcome
from simulations import engine
from tests import plans, sites
from tests.authority import Authority
from tests.ports import free_ports

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
BINARIES = Path(sys.executable).parent
SITES = ("north", "south")
REAL_SITES = (*SITES, "west")
AGENT = """
import logging, signal, sys
from pathlib import Path
from client.__main__ import _leave, _log_to
from client.agent import open_agent
from client import credential
from client.site import open_site
from common.plan import Plan
site = open_site(Path(sys.argv[1]))
_log_to(site)
signal.signal(signal.SIGTERM, _leave)
open_agent(site, app="tests.tiny:client_app").run()
"""
HOSTILE = f"""
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body
from client.agent import Agent

class Broken(RecordDict):
    def deflate(self):
        return add_header_to_object_body(object_body=b"{{", obj=self)

Broken.__name__ = Broken.__qualname__ = "RecordDict"
send = Agent._send

def send_broken(self, reply):
    reply.__dict__["_content"] = Broken(dict(reply.content))
    return send(self, reply)

Agent._send = send_broken
{AGENT}
"""
"""An agent whose replies have the hash and the head that they should, and are no JSON."""
WATCH = """
import os, sys

def note(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments[:2]
    else:
        return
    host = address[0] if isinstance(address, tuple) else None  # the address of a Unix socket is a string
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{os.getpid()} {sys.argv[:1]} {event} {address}\\n")

sys.addaudithook(note)
"""


def wait_for(condition: Callable[[], Any], *, seconds: float = 60, what: str = "") -> Any:
    """Returns the first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


@dataclass
class Federation:
    """The processes of a test federation and what is needed to talk to them."""

    directory: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return open_home(self.directory / "home")

    @property
    def status(self) -> Status:
        return status(self.home)

    def verb(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(BINARIES / str(arguments[0])), *map(str, arguments[1:])]
        return subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=120
        )

    def spawn(self, name: str, *command: object) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def start_coordinator(self) -> None:
        log = self.directory / "coordinator.log"
        log.unlink(missing_ok=True)
        self.spawn("coordinator", BINARIES / "feverfew-server", "start", "home")
        ready = "coordinator is ready"
        wait_for(lambda: ready in log.read_text() or self.processes["coordinator"].poll() is not None)
        assert ready in log.read_text(), log.read_text()

    def start_agent(self, name: str) -> None:
        self.spawn(name, sys.executable, "-c", AGENT, name)

    def add_site(self, name: str) -> None:
        sites.write_site(self.directory / name, name=name, unsafe_allow_seeded_noise=True)
        made = self.verb("feverfew-client", "init", name)
        assert made.returncode == 0, made.stderr
        self.enroll(name)

    def enroll(self, name: str, *options: str) -> None:
        """The coordinator signs the request of a site, which takes the invitation."""
        request = ("home", name, f"{name}/{name}.csr", "--invitation", "invitation")
        told = self.verb("feverfew-server", "enroll", *request, *options)
        assert told.returncode == 0, told.stderr
        told = self.verb("feverfew-client", "init", name, "--invitation", "invitation")
        assert told.returncode == 0, told.stderr

    def submit(self, **plan: Any) -> Followed:
        text = json.dumps({"sites": len(SITES)} | plan)
        return submission.submit(
            self.home,
            text,
            submission.new_run_id(),
            server_app="tests.tiny:server_app",
            client_app="tests.tiny:client_app",
        )

    def follow(self, submitted: Followed) -> tuple[Outcome, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        outcome = submission.follow(self.home, submitted, show=events.append)
        return outcome, [event for event in events if event["event"] == "round_finished"]

    def kill(self, name: str) -> int:
        """Kills one of the coordinator's processes; returns its pid."""
        identity = Identity.read(pid_file(self.home, name))
        assert identity is not None
        os.kill(identity.pid, signal.SIGKILL)
        return identity.pid

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(30)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("federation")
    watch = directory / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {
        "PYTHONPATH": f"{watch}{os.pathsep}{ROOT}",
        "WATCHED": str(directory / "watched"),
        "OMP_NUM_THREADS": "1",
    }
    federation = Federation(directory, environment)
    gateway, internal = free_ports(2)
    made = federation.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert made.returncode == 0, made.stderr
    settings = directory / "home" / "coordinator.yaml"
    settings.write_text(settings.read_text().replace("bind: 127.0.0.1", "bind: 0.0.0.0"))
    federation.add_site(SITES[0])  # before the coordinator runs
    try:
        federation.start_coordinator()
        federation.add_site(SITES[1])  # while it runs
        for name in SITES:
            federation.start_agent(name)
        wait_for(lambda: list(federation.status.sites.values()) == ["online"] * 2, what="sites online")
        yield federation
    finally:
        for name in reversed(list(federation.processes)):
            federation.stop(name)


def test_a_run_ends_with_a_report_and_sites_answer_every_round(federation: Federation) -> None:
    outcome, events = federation.follow(federation.submit(rounds=["train"] * 5))
    assert outcome.is_success and outcome.status == "completed"
    assert [event["sites_valid"] for event in events] == [2] * 5
    pids = {tuple(sorted(event["pids"])) for event in events}
    assert len(pids) == 1, "the workers stay warm"
    print("seconds of each round:", [round(event["seconds"], 2) for event in events])


def test_a_failed_run_is_not_called_a_success(federation: Federation) -> None:
    outcome, _ = federation.follow(federation.submit(rounds=["train"], fails=True))
    assert not outcome.is_success and outcome.status == "failed"
    assert "this plan fails" in outcome.details


def test_a_worker_killed_in_the_middle_of_a_task_is_replaced(
    federation: Federation,
) -> None:
    submitted = federation.submit(rounds=["train.sleeps_once", "train"])
    notes = [federation.directory / name / "sleeper" for name in SITES]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes), what="workers at work")
    for note in notes:
        os.kill(int(note.read_text()), signal.SIGKILL)
    outcome, events = federation.follow(submitted)
    assert outcome.is_success
    assert [event["sites_valid"] for event in events] == [2, 2] and events[0]["seconds"] < 20


@pytest.mark.parametrize("name", ["gateway", "superlink"])
def test_a_run_survives_the_death_of(federation: Federation, name: str) -> None:
    """Every round is finished once, also where a request under way ended the coordinator's process too, which
    is then started again and goes on."""
    submitted = federation.submit(rounds=["train"] * 30)
    events = federation.home.runs / submitted.run / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count("\n") >= 2)
    former = federation.kill(name)
    killed = time.time()
    outcome, told = federation.follow(submitted)
    assert outcome.is_success and [event["sites_valid"] for event in told] == [2] * 30
    assert [event["round"] for event in told] == list(range(1, 31))
    assert federation.status.processes[name] not in (None, former)
    again = min(event["time"] for event in told if event["time"] > killed + 0.5)
    print(f"{name}: work went on after {again - killed:.1f} s")


def test_a_killed_agent_is_back_at_once_when_it_is_started_again(federation: Federation) -> None:
    process = federation.processes.pop("north")
    process.kill()
    process.wait()
    begun = time.monotonic()
    federation.start_agent("north")
    connections = federation.log("north").count("connected as node")
    wait_for(lambda: federation.log("north").count("connected as node") > connections, seconds=20)
    print(f"a killed agent was back after {time.monotonic() - begun:.1f} s")
    outcome, events = federation.follow(federation.submit(rounds=["train"]))
    assert outcome.is_success and events[0]["sites_valid"] == 2


def test_a_task_of_a_killed_agent_is_done_by_the_one_that_is_started_after_it(federation: Federation) -> None:
    for name, first in zip(SITES, (True, False), strict=True):
        note = federation.directory / name / "sleeper"
        note.unlink(missing_ok=True) if first else note.write_text("slept before")
    submitted = federation.submit(rounds=["train.sleeps_once"])
    note = federation.directory / SITES[0] / "sleeper"
    wait_for(lambda: note.exists() and note.read_text(), what="worker at work")
    process = federation.processes.pop(SITES[0])
    process.kill()
    process.wait()
    federation.start_agent(SITES[0])
    outcome, events = federation.follow(submitted)
    assert outcome.is_success and events[0]["sites_valid"] == 2
    print(f"a round with a killed agent took {events[0]['seconds']:.1f} s")
    assert not Path(f"/proc/{note.read_text()}").exists(), "the worker has ended with its agent"


def test_a_site_whose_replies_cannot_be_put_together_does_not_end_the_run(federation: Federation) -> None:
    assert federation.stop("north") == 0
    federation.spawn("north", sys.executable, "-c", HOSTILE, "north")
    wait_for(lambda: federation.log("north").count("connected as node") > 0 and all_online(federation))
    outcome, events = federation.follow(federation.submit(rounds=["train"] * 2))
    assert outcome.is_success and outcome.status == "completed"
    assert [event["sites_valid"] for event in events] == [1, 1]
    assert [event["reasons"] for event in events] == [["unreadable"]] * 2
    federation.stop("north")
    federation.start_agent("north")
    wait_for(lambda: all_online(federation))


def all_online(federation: Federation) -> bool:
    return list(federation.status.sites.values()) == ["online"] * 2


def test_a_key_that_is_not_enrolled_gets_nowhere(federation: Federation) -> None:
    stranger = federation.directory / "stranger"
    sites.write_site(stranger, name="stranger", unsafe_allow_seeded_noise=True)
    assert federation.verb("feverfew-client", "init", "stranger").returncode == 0
    for name in ("coordinator.yaml", "coordinator.crt"):
        shutil.copy(federation.directory / "north" / name, stranger)
    request = stranger / "stranger.csr"
    forged = Authority().invitation(request, name="stranger").site_certificate
    (stranger / "private" / "connection" / "1.crt").write_text(forged)
    federation.start_agent("stranger")
    wait_for(lambda: "closed without an answer" in federation.log("stranger"), what="a refusal")
    outcome, events = federation.follow(federation.submit(rounds=["train"]))
    assert outcome.is_success and events[0]["sites_valid"] == 2
    assert "connected" not in federation.log("stranger")
    assert "stranger" not in federation.status.sites
    federation.stop("stranger")


def test_nobody_controls_the_federation_through_the_gateway(federation: Federation) -> None:
    """Not even a site that is enrolled."""
    home = federation.home
    site = credential.require(federation.directory / "north").tls(home.invitation.certificate)
    through = {}
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/get-fab", "/health"):
        for name, port in (("gateway", home.settings.port), ("inside", home.settings.internal_port)):
            url = f"https://127.0.0.1:{port}{path}"
            through[path, name] = httpx.post(url, verify=site, trust_env=False).status_code
    assert {status for (_, name), status in through.items() if name == "gateway"} == {403}
    assert through["/v1/control/list-runs", "inside"] != 403, "the test can tell the two apart"


def test_from_another_address_only_the_gateway_is_seen_and_hospitals_are_not(federation: Federation) -> None:
    home = federation.home
    coordinator = listening([pid for pid in federation.status.processes.values() if pid is not None])
    hospitals = listening([federation.processes[name].pid for name in SITES])
    assert {home.settings.port, home.settings.internal_port} <= coordinator and hospitals == set()
    seen = {port for port in range(1, 65536) if is_open("127.0.0.2", port)}
    assert seen & coordinator == {home.settings.port}


def listening(pids: list[int]) -> set[int]:
    """Returns the TCP ports on which these processes and their children listen."""
    sockets: set[str] = set()
    for one in [*pids, *(child for pid in pids for child in children(pid))]:
        for descriptor in Path(f"/proc/{one}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:  # listening
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def children(pid: int) -> list[int]:
    """Returns the processes below a process."""
    direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [below for child in map(int, direct) for below in (child, *children(child))]


def is_open(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.connect_ex((address, port)) == 0


def test_a_key_is_renewed_in_the_middle_of_a_run_and_no_round_is_missed(federation: Federation) -> None:
    submitted = federation.submit(rounds=["train"] * 60)
    events = federation.home.runs / submitted.run / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count("\n") >= 2)
    connections = federation.log("north").count("connected as node")
    assert federation.verb("feverfew-client", "renew", "north").returncode == 0
    federation.enroll("north", "--renew")
    wait_for(lambda: federation.log("north").count("connected as node") > connections, what="the new node")
    assert events.read_text().count("\n") < 60, "in the middle"
    outcome, told = federation.follow(submitted)
    assert outcome.is_success and [event["sites_valid"] for event in told] == [2] * 60
    assert list(federation.status.sites) == list(SITES)
    retired = federation.home.sites / "north.1.retired"
    wait_for(retired.exists, seconds=90, what="the former key retired")
    assert federation.status.sites["north"] == "online"
    assert [path.name for path in (federation.directory / "north/private/connection").glob("*.key")] == [
        "2.key"
    ]


def test_a_site_is_revoked_in_the_middle_of_a_run_which_goes_on_without_it(federation: Federation) -> None:
    federation.add_site("east")
    federation.start_agent("east")
    wait_for(lambda: federation.status.sites["east"] == "online", what="east online")
    submitted = federation.submit(rounds=["train"] * 30)
    events = federation.home.runs / submitted.run / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count("\n") >= 2)
    told = federation.verb("feverfew-server", "revoke", "home", "east")
    assert told.returncode == 0 and "refuses SHA256:" in told.stdout, told.stderr
    wait_for(lambda: "was revoked" in federation.log("east"), seconds=10, what="east is told")
    outcome, rounds = federation.follow(submitted)
    valid = [event["sites_valid"] for event in rounds]
    assert outcome.is_success and valid[0] == 3 and valid[-1] == 2 and valid == sorted(valid, reverse=True)
    assert max(event["seconds"] for event in rounds) < 15, "nobody waits for it"
    assert list(federation.status.sites) == list(SITES)
    federation.stop("east")


def test_two_coordinators_cannot_share_a_directory(federation: Federation) -> None:
    second = federation.verb("feverfew-server", "start", "home")
    assert second.returncode == 2 and "running coordinator" in second.stderr


def test_status_tells_processes_sites_and_runs(federation: Federation) -> None:
    told = federation.verb("feverfew-server", "status", "home", "--json")
    found = json.loads(told.stdout)
    assert all(found["processes"].values()) and set(found["sites"]) == set(SITES)
    assert {run["status"] for run in found["runs"]} >= {"completed"}


def test_no_process_asks_for_anything_but_loopback(federation: Federation) -> None:
    watched = federation.directory / "watched"
    outcome, _ = federation.follow(federation.submit(rounds=["train"]))
    assert outcome.is_success
    assert not watched.exists(), watched.read_text()
    attempt = "import sys; sys.audit('socket.connect', None, ('192.0.2.1', 443))"
    subprocess.run([sys.executable, "-c", attempt], env=federation.environment, check=True)
    assert "192.0.2.1" in watched.read_text(), "the watch sees what it should"
    watched.unlink()


def test_stopping_the_coordinator_leaves_no_process_and_a_new_start_goes_on(federation: Federation) -> None:
    pids = list(federation.status.processes.values())
    assert federation.stop("coordinator") == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    federation.start_coordinator()
    outcome, events = federation.follow(federation.submit(rounds=["train"]))
    assert outcome.is_success and events[0]["sites_valid"] == 2


def test_a_new_supervisor_ends_what_a_killed_one_has_left(federation: Federation) -> None:
    left = federation.status.processes
    process = federation.processes.pop("coordinator")
    process.kill()
    process.wait()
    federation.start_coordinator()
    fresh = federation.status.processes
    assert all(fresh[name] not in (None, left[name]) for name in fresh)
    assert not any(Path(f"/proc/{pid}").exists() for pid in left.values())


@pytest.fixture(scope="module")
def real(federation: Federation) -> Federation:
    """The same federation and a third site, with Feverfew's own apps, by the hospitals' own command."""
    for name in SITES:
        federation.stop(name)
    federation.add_site(REAL_SITES[-1])
    for name in REAL_SITES:
        federation.spawn(name, BINARIES / "feverfew-client", "run", name)
    wait_for(lambda: list(federation.status.sites.values()) == ["online"] * 3, what="sites online")
    return federation


def _plan(federation: Federation, **changes: Any) -> Path:
    plan = plans.plan(randomness="seeded", rounds=2, preprocessing="grey28", **changes)
    path = federation.directory / "plan.json"
    path.write_text(plan.to_json())
    return path


@pytest.mark.parametrize("privacy", ["none", "dp_sgd"])
def test_all_engines_end_in_the_same_bits(
    real: Federation, privacy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = _plan(real, privacy=privacy, sites=3), f"same-{privacy.replace('_', '-')}"
    told = real.verb("feverfew-server", "submit", "home", path, "--run", run, "--json")
    assert told.returncode == 0, told.stderr
    model = (Path(json.loads(told.stdout)["directory"]) / "model.safetensors").read_bytes()
    plan = Plan.from_json(path.read_text())
    for name, workers in (("local", 1), ("local", 2), ("flower", 2)):
        assert _simulated(real, plan, run=run, engine_name=name, workers=workers, patch=monkeypatch) == model
    for name in REAL_SITES:
        delivered = real.directory / name / "state" / "models" / run / "model.safetensors"
        assert delivered.read_bytes() == model, "the final model is at the site"


def _simulated(
    real: Federation, plan: Plan, *, run: str, engine_name: str, workers: int, patch: pytest.MonkeyPatch
) -> bytes:
    """Runs a plan over copies of the sites, without their state; returns the final model's file."""
    copies = real.directory / f"{run}-{engine_name}-{workers}"
    for name in REAL_SITES:
        left_out = shutil.ignore_patterns("state", "plans", "cache", "*.log", "ledger.head", "trail.head")
        shutil.copytree(real.directory / name, copies / name, ignore=left_out)
    directory = copies / "run"
    directory.mkdir()
    patch.setenv(RUN_DIRECTORY, str(directory))
    patch.setenv(HEADS_DIRECTORY, str(copies / "heads"))
    patch.setenv(TRAIL_KEY, str(copies / "trail.key"))
    opened = [open_site(copies / name) for name in REAL_SITES]
    engine.run(plan, opened, run=run, name=engine_name, workers=workers, directory=directory)
    return (directory / "model.safetensors").read_bytes()


def test_a_run_without_a_quorum_has_exit_code_1_and_says_why(real: Federation) -> None:
    path = _plan(real, privacy__target_epsilon=50.0)  # over every site's budget
    told = real.verb("feverfew-server", "submit", "home", path)
    assert told.returncode == 1 and "did not finish" in told.stderr, told.stderr


def test_check_tells_that_the_coordinator_is_reached(real: Federation) -> None:
    told = real.verb("feverfew-client", "check", "north", "--json")
    lines = {line["name"]: line for line in json.loads(told.stdout)["lines"]}
    assert lines["connection"]["level"] == "ok" and lines["budget"]["level"] == "ok", told.stderr
