"""Any process may be killed at any point, and any connection cut: the run ends in the same bits.

A real federation of four sites over TLS. Every scenario is a run with several faults, one after each round.
The points are in ``tests/fault_points.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.plan import Plan
from server import submission
from server.process import Identity
from server.run_record import RunRecord
from server.services import pid_file
from tests import fault_points, plans
from tests.proxy import Proxy
from tests.test_deployment import BINARIES, ROOT, Federation, free_ports, wait_for

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

SITES = ("east", "north", "south", "west")
COORDINATORS = ("superlink", "superexec", "gateway")
ROUNDS = 14
"""A fault takes two or three of them: one may end before the point is armed, and in another it happens."""
START_AGAIN_SECONDS = 0.5
"""What a service manager waits before it starts an agent or a supervisor again."""


@dataclass(frozen=True)
class Fault:
    """What happens after a round: at a point of an owner's code, or of the network, something is lost.

    ``kills`` names a process of the coordinator, or "agent", that is killed when the owner reaches the point;
    without it the process that reaches the point is.
    """

    owner: str
    point: str
    kills: str | None = None

    def __str__(self) -> str:
        return f"{self.owner}.{self.point}" + (f" kills {self.kills}" if self.kills else "")


def server(point: str, kills: str | None = None) -> Fault:
    return Fault("server", point, kills)


SCENARIOS: dict[str, tuple[Fault, ...]] = {
    "worker": (
        Fault("north", "task_in_worker"),
        Fault("south", "charged"),
        Fault("west", "step_done"),
        Fault("north", "trained"),
        Fault("east", "reply_stored"),
    ),
    "worker and agent": (
        Fault("south", "outcome_noted"),
        Fault("north", "task_announced"),
        Fault("east", "task_pulled"),
        Fault("west", "reply_ready"),
        Fault("north", "reply_half_sent"),
    ),
    "agent": (
        Fault("south", "reply_sent"),
        Fault("east", "charged", "agent"),
        Fault("west", "step_done", "agent"),
        Fault("north", "reply_stored", "agent"),
    ),
    "server app": (
        server("task_made"),
        server("task_pushed"),
        server("update_added"),
        server("aggregated"),
        server("checkpoint_half_written"),
    ),
    "server app at the end": (
        server("checkpoint_written"),
        server("tested"),
        server("delivered"),
        server("report_made"),
        server("report_written"),
    ),
    "superexec and superlink": (
        server("task_made", "superexec"),
        server("update_added", "superexec"),
        server("checkpoint_written", "superexec"),
        server("task_made", "superlink"),
        server("task_pushed", "superlink"),
    ),
    "superlink and gateway": (
        Fault("north", "step_done", "superlink"),
        Fault("south", "reply_half_sent", "superlink"),
        Fault("east", "task_announced", "gateway"),
        Fault("west", "step_done", "gateway"),
        Fault("north", "reply_half_sent", "gateway"),
    ),
    "supervisor": (
        server("task_pushed", "supervisor"),
        server("checkpoint_half_written", "supervisor"),
    ),
    "network": (
        Fault("net", "close"),
        Fault("net", "stall"),
        Fault("net", "slow"),
        Fault("net", "truncate_task"),
        Fault("net", "truncate_reply"),
    ),
}
LAST = {"tested", "delivered", "report_made", "report_written"}
"""Points that come once, after all rounds."""


@dataclass
class FaultyFederation(Federation):
    """A federation whose processes have fault points, and are started again as by a service manager."""

    commands: dict[str, tuple[object, ...]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    restarted: Counter[str] = field(default_factory=Counter)
    extra: dict[str, dict[str, str]] = field(default_factory=dict)
    """More of the environment, for the next life of a process."""

    @property
    def points(self) -> Path:
        return self.directory / "points"

    def spawn(self, name: str, *command: object) -> None:
        self.commands[name] = command
        owner = "server" if name == "coordinator" else name
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                env=self.environment | {fault_points.OWNER: owner} | self.extra.get(name, {}),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def look_after(self) -> None:
        """Starts again what has ended; runs in a thread of its own."""
        while not self.over.wait(0.1):
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    self.restarted[name] += 1
                    if self.over.wait(START_AGAIN_SECONDS):
                        return
                    self.spawn(name, *self.commands[name])

    def kill_named(self, name: str, owner: str) -> None:
        """Kills a process of the coordinator, or the agent of an owner."""
        if name == "agent":
            self.processes[owner].kill()
        elif name == "supervisor":
            self.processes["coordinator"].kill()
        else:
            identity = Identity.read(pid_file(self.home, name))
            assert identity is not None, f"{name} runs"
            os.kill(identity.pid, signal.SIGKILL)


@dataclass
class Stage:
    """The federation, the proxy before the site ``south``, and the model of an undisturbed run."""

    federation: FaultyFederation
    proxy: Proxy
    plan: Plan
    model: bytes = b""
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, faults: tuple[Fault, ...]) -> RunRecord:
        """Runs the plan with faults, to its end."""
        return self.run_beside(name, lambda record: self._faults(record, faults))

    def run_beside(
        self, name: str, trouble: Callable[[RunRecord], None], *, plan: Plan | None = None
    ) -> RunRecord:
        """Runs a plan to its end while trouble is made; checks that it completes."""
        record = self.record(name)
        followed = self.submit(record, plan or self.plan)
        chaos = threading.Thread(target=trouble, args=(record,), daemon=True)
        chaos.start()
        outcome = submission.follow(self.federation.home, followed, show=lambda event: None)
        chaos.join(30)
        assert not chaos.is_alive(), "all of the trouble was made"
        assert outcome.is_success, outcome.to_text()
        return record

    def record(self, name: str) -> RunRecord:
        return RunRecord(directory=self.federation.home.runs / name.replace(" ", "-"))

    def submit(self, record: RunRecord, plan: Plan) -> submission.Followed:
        wait_for(lambda: submission.is_running(self.federation.home), what="supervisor")
        return submission.submit(self.federation.home, plan.to_json(), record.run)

    def _faults(self, record: RunRecord, faults: tuple[Fault, ...]) -> None:
        if faults and faults[0].point not in LAST:
            wait_for(lambda: _round(record) >= 1, what="the first round", seconds=120)
        for fault in faults:
            self._do(fault, record)

    def _do(self, fault: Fault, record: RunRecord) -> None:
        if fault.owner == "net":
            self._disturb(fault.point, record)
            return
        action = "mark" if fault.kills else "kill"
        points = self.federation.points
        fault_points.arm(points, fault.owner, fault.point, action=action)
        wait_for(
            lambda: fault_points.was_reached(points, fault.owner, fault.point),
            what=str(fault),
            seconds=60,
        )
        if fault.kills:
            self.federation.kill_named(fault.kills, fault.owner)
        self._time(fault, record)
        (points / f"{fault.owner}.{fault.point}.reached").unlink()

    def _time(self, fault: Fault, record: RunRecord) -> None:
        """Notes how long it took until the run got on; nothing to note after the last round."""
        begun, server_round = time.monotonic(), _round(record)
        if fault.point in LAST or server_round == ROUNDS:
            return
        wait_for(lambda: _round(record) > server_round, what=f"work after {fault}", seconds=60)
        self.seconds[str(fault)] = time.monotonic() - begun

    def told_seconds(self) -> str:
        """Returns how long it took until work went on, a line for each fault, and their median."""
        lines = [f"  {seconds:5.1f}  {fault}" for fault, seconds in self.seconds.items()]
        median = f"{statistics.median(self.seconds.values()):.1f}" if lines else "none was timed"
        return "\n".join(["", "seconds until work went on:", *lines, f"  median {median}"])

    def _disturb(self, kind: str, record: RunRecord) -> None:
        match kind:
            case "close":
                self.proxy.cut()
            case "stall":
                self.proxy.stall()
            case "slow":
                self.proxy.slow(2000)
            case "truncate_task":
                self.proxy.truncate(700)
            case "truncate_reply":
                self.proxy.truncate(3000)
        time.sleep(3.0)
        self.proxy.heal()
        self._time(Fault("net", kind), record)


def _round(record: RunRecord) -> int:
    """The last round that the run has finished, from what it saved."""
    from server.checkpoint import newest_round

    return newest_round(record.directory / "checkpoints")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("faults")
    hooks = directory / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text("from tests import fault_points\n\nfault_points.install()\n")
    (directory / "points").mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}",
        fault_points.DIRECTORY: str(directory / "points"),
        "OMP_NUM_THREADS": "1",
    }
    federation = FaultyFederation(directory, environment)
    gateway, internal = free_ports(2)
    made = federation.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert made.returncode == 0, made.stderr
    federation.start_coordinator()
    proxy = Proxy(gateway)
    for name in SITES:
        federation.add_site(name)
        _raise_budget(directory / name)
    _redirect(directory / "south", proxy.port)
    watch = threading.Thread(target=federation.look_after, daemon=True)
    try:
        for name in SITES:
            federation.spawn(name, BINARIES / "feverfew-client", "run", name)
        wait_for(lambda: set(federation.status.sites.values()) == {"online"}, what="sites online")
        watch.start()
        plan = plans.plan(
            **plans.TINY,
            randomness="seeded",
            rounds=ROUNDS,
            sites=4,
            quorum=4,
            training__local_steps=2,
            training__expected_batch=4,
            evaluation__validation_every=0,
            reply_deadline_seconds=90,
        )
        stage = Stage(federation, proxy, plan)
        stage.model = (stage.run("undisturbed", ()).directory / "model.safetensors").read_bytes()
        yield stage
        print(stage.told_seconds())
    finally:
        federation.over.set()
        if watch.is_alive():
            watch.join()
        proxy.heal()
        for name in reversed(list(federation.processes)):
            federation.stop(name)
        proxy.close()


def _raise_budget(site: Path) -> None:
    path = site / "site.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"max_epsilon": 1000.0}))


def _redirect(site: Path, port: int) -> None:
    path = site / "coordinator.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"address": f"127.0.0.1:{port}"}))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_ends_in_the_same_bits_whatever_is_lost(stage: Stage, name: str) -> None:
    faults = SCENARIOS[name]
    record = stage.run(name, faults)
    assert (record.directory / "model.safetensors").read_bytes() == stage.model
    report = json.loads((record.directory / "report.json").read_text())
    assert report["status"] == "completed" and len(report["rounds"]) == ROUNDS
    assert {entry["sites_valid"] for entry in report["rounds"]} == {4}
    for site in SITES:
        charges = _charges(stage.federation.directory / site, record.run)
        assert set(charges) == {("train", number) for number in range(1, ROUNDS + 1)} | {("test", ROUNDS)}
        assert set(charges.values()) == {1}, "every task was charged once"
    assert _outputs_differ(stage.federation.directory) == [], "every task has one output"
    _require_told(stage, record, faults, report)


@pytest.fixture
def small_disk(stage: Stage) -> Iterator[Callable[[Path], Path]]:
    """Mounts a disk of one megabyte over a new directory; returns a file that fills it when it is written."""
    mounted: list[Path] = []

    def mount(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(directory)
        return directory / "filler"

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_of_the_coordinator_is_waited_for(
    stage: Stage, small_disk: Callable[[Path], Path]
) -> None:
    record = stage.record("full disk")
    filler = small_disk(record.directory)

    def trouble(record: RunRecord) -> None:
        wait_for(lambda: _round(record) >= 2, what="round 2", seconds=120)
        _fill(filler)
        wait_for(lambda: (life := record.life) is not None and life.is_over, what="the end of a life")
        assert record.end is None, "that is no end of the run"
        time.sleep(3.0)
        filler.unlink()

    stage.run_beside("full disk", trouble)
    assert (record.directory / "model.safetensors").read_bytes() == stage.model


def test_a_full_disk_of_a_site_costs_its_round_and_is_told(
    stage: Stage, small_disk: Callable[[Path], Path]
) -> None:
    filler = small_disk(stage.federation.directory / "east" / "state" / "replies")

    def trouble(record: RunRecord) -> None:
        wait_for(lambda: _round(record) >= 2, what="round 2", seconds=120)
        _fill(filler)
        reached = _round(record)
        wait_for(lambda: _round(record) >= reached + 3, what="rounds without the site", seconds=120)
        filler.unlink()

    plan = _changed(stage.plan, quorum=3)
    record = stage.run_beside("full disk of a site", trouble, plan=plan)
    east = json.loads((record.directory / "report.json").read_text())["participation"]["east"]
    assert east["rounds_rejected"] >= 1 and "site_error" in east["story"]
    assert east["rounds_valid"] + east["rounds_rejected"] == ROUNDS and east["rounds_valid"] > 3


def test_a_damaged_checkpoint_falls_back_to_the_one_before_in_the_middle_of_a_run(stage: Stage) -> None:
    def trouble(record: RunRecord) -> None:
        wait_for(lambda: _round(record) >= 3, what="round 3", seconds=120)
        fault_points.arm(stage.federation.points, "server", "task_pushed", action="stall")
        wait_for(lambda: fault_points.was_reached(stage.federation.points, "server", "task_pushed"))
        newest = max((record.directory / "checkpoints").glob("[0-9]*"))
        damaged = newest / "parameters.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        life = record.life
        assert life is not None
        os.kill(life.pid, signal.SIGKILL)

    record = stage.run_beside("damaged checkpoint", trouble)
    assert (record.directory / "model.safetensors").read_bytes() == stage.model


def test_a_damaged_data_base_of_the_superlink_is_set_aside_and_nothing_is_lost(stage: Stage) -> None:
    state = stage.federation.home.state

    def trouble(record: RunRecord) -> None:
        wait_for(lambda: _round(record) >= 3, what="round 3", seconds=120)
        with (state / "superlink.db").open("r+b") as file:
            file.write(b"no data base at all" * 100)
        stage.federation.kill_named("superlink", "server")
        (state / "superlink.db-wal").unlink(missing_ok=True)

    record = stage.run_beside("damaged data base", trouble)
    assert (record.directory / "model.safetensors").read_bytes() == stage.model
    assert list(state.glob("superlink.db.damaged-*"))
    assert "damaged" in stage.federation.log("coordinator")


FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime")
def test_a_clock_that_jumps_is_named_and_the_site_goes_on_when_it_is_right_again(stage: Stage) -> None:
    clock = stage.federation.directory / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    stage.federation.extra["west"] = fake
    stage.federation.processes["west"].kill()

    def trouble(record: RunRecord) -> None:
        wait_for(lambda: _round(record) >= 2, what="round 2", seconds=120)
        clock.write_text("+400")
        wait_for(lambda: "clock" in stage.federation.log("west"), what="a message", seconds=60)
        clock.write_text("+0")

    record = stage.run_beside("clock", trouble)
    assert (record.directory / "model.safetensors").read_bytes() == stage.model
    stage.federation.extra.pop("west")
    stage.federation.processes["west"].kill()


def _changed(plan: Plan, **changes: Any) -> Plan:
    return Plan.from_tree(plan.model_dump(mode="json") | changes)


def _require_told(stage: Stage, record: RunRecord, faults: tuple[Fault, ...], report: dict[str, Any]) -> None:
    """Checks that the report names every loss that the coordinator can see."""
    lost = Counter(fault.kills for fault in faults if fault.kills in COORDINATORS)
    lost["serverapp"] = sum(fault.owner == "server" and not fault.kills for fault in faults)
    for process, number in lost.items():
        assert report["restarts"].get(process, 0) >= number, (process, report["restarts"])
        assert number == 0 or any(f"coordinator's {process} was lost" in note for note in report["notes"])


def _charges(site: Path, run: str) -> Counter[tuple[str, int]]:
    with sqlite3.connect(f"file:{site}/state/ledger.sqlite?mode=ro", uri=True) as ledger:
        rows = ledger.execute("SELECT part, server_round FROM entries WHERE kind='charge' AND run=?", (run,))
        return Counter((part, server_round) for part, server_round in rows)


def _outputs_differ(directory: Path) -> list[tuple[str, str]]:
    """Returns the tasks (owner, kind and round) of which several outputs were sent, over all runs."""
    outputs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in (directory / "points").glob("*.sent"):
        for line in path.read_text().splitlines():
            task, digest = line.split()
            outputs[path.stem, task].add(digest)
    assert outputs, "outputs were noted"
    return [task for task, digests in outputs.items() if len(digests) > 1]


@pytest.mark.parametrize("quorum", [1, 2])
def test_of_four_sites_one_is_gone_one_stalls_one_sends_nan_and_the_plan_decides(
    stage: Stage, quorum: int
) -> None:
    federation = stage.federation
    plan = _changed(stage.plan, quorum=quorum, rounds=2, reply_deadline_seconds=12, node_deadline_seconds=5)
    wait_for(lambda: set(federation.status.sites.values()) == {"online"}, what="sites online", seconds=60)
    (federation.points / "west.poison").touch()
    fault_points.arm(federation.points, "south", "step_done", action="stall")
    gone = federation.processes.pop("north")
    gone.kill()
    gone.wait()
    record = stage.record(f"troubled {quorum}")
    outcome = submission.follow(federation.home, stage.submit(record, plan), show=lambda event: None)
    told = json.loads((record.directory / "report.json").read_text())
    stories = {name: site["story"] for name, site in told["participation"].items()}
    assert "non_finite" in stories["west"] and "missing" in stories["south"]
    assert outcome.status == ("completed" if quorum == 1 else "quorum_not_reached"), outcome
    assert "trained" in stories["east"] and outcome.has_report
    (federation.points / "west.poison").unlink()
    federation.processes["south"].kill()
    federation.spawn("north", *federation.commands["north"])
