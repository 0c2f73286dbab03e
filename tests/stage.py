"""A federation of four sites over TLS that can be disturbed: its processes have fault points.

Processes that end are started again, as by a service manager; one site is behind a proxy that can fail.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.plan import Plan
from server import submission
from server.checkpoint import newest_round
from server.process import Identity
from server.run_record import RunRecord
from server.services import pid_file
from tests import fault_points, plans
from tests.ports import free_ports
from tests.proxy import Proxy
from tests.test_deployment import BINARIES, ROOT, Federation, wait_for

SITES = ("east", "north", "south", "west")
START_AGAIN_SECONDS = 0.5
"""What a service manager waits before it starts an agent or a supervisor again."""
PLAN: dict[str, Any] = plans.TINY | {
    "randomness": "seeded",
    "sites": len(SITES),
    "quorum": len(SITES),
    "training__local_steps": 2,
    "training__expected_batch": 4,
    "evaluation__validation_every": 0,
    "reply_deadline_seconds": 90,
}
LAST = {"tested", "delivered", "report_made", "report_written"}
"""Points that come once, after all rounds."""


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
        self,
        name: str,
        trouble: Callable[[RunRecord], None],
        *,
        plan: Plan | None = None,
        patience_seconds: float = 30.0,
    ) -> RunRecord:
        """Runs a plan to its end while trouble is made; checks that it completes."""
        record = self.record(name)
        followed = self.submit(record, plan or self.plan)
        chaos = threading.Thread(target=trouble, args=(record,), daemon=True)
        chaos.start()
        outcome = submission.follow(self.federation.home, followed, show=lambda event: None)
        chaos.join(patience_seconds)
        assert not chaos.is_alive(), "all of the trouble was made"
        assert outcome.is_success, outcome.to_text()
        return record

    def record(self, name: str) -> RunRecord:
        return RunRecord(directory=self.federation.home.runs / name.replace(" ", "-"))

    def wait_until_online(self) -> None:
        """Waits until every site is connected."""
        states = self.federation
        wait_for(lambda: set(states.status.sites.values()) == {"online"}, what="sites online", seconds=60)

    def submit(self, record: RunRecord, plan: Plan) -> submission.Followed:
        wait_for(lambda: submission.is_running(self.federation.home), what="supervisor")
        return submission.submit(self.federation.home, plan.to_json(), record.run)

    def _faults(self, record: RunRecord, faults: tuple[Fault, ...]) -> None:
        if faults and faults[0].point not in LAST:
            wait_for(lambda: rounds_done(record) >= 1, what="the first round", seconds=120)
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
        begun, server_round = time.monotonic(), rounds_done(record)
        if fault.point in LAST or server_round == self.plan.rounds:
            return
        wait_for(lambda: rounds_done(record) > server_round, what=f"work after {fault}", seconds=60)
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


def rounds_done(record: RunRecord) -> int:
    """The last round that the run has finished, from what it saved."""
    return newest_round(record.directory / "checkpoints")


@contextmanager
def staged(directory: Path, **plan: Any) -> Iterator[Stage]:
    """Yields a running federation, and the model of an undisturbed run of its plan."""
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
        stage = Stage(federation, proxy, plans.plan(**PLAN | plan))
        stage.wait_until_online()
        watch.start()
        stage.model = (stage.run("undisturbed", ()).directory / "model.safetensors").read_bytes()
        yield stage
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
