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
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.plan import Plan
from server import submission
from server.run_record import RunRecord
from tests import fault_points
from tests.stage import SITES, Fault, Stage, rounds_done, staged
from tests.test_deployment import wait_for

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

COORDINATORS = ("superlink", "superexec", "gateway")
ROUNDS = 14
"""A fault takes two or three of them: one may end before the point is armed, and in another it happens."""


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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("faults"), rounds=ROUNDS) as stage:
        yield stage
    print(stage.told_seconds())


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
        wait_for(lambda: rounds_done(record) >= 2, what="round 2", seconds=120)
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
        wait_for(lambda: rounds_done(record) >= 2, what="round 2", seconds=120)
        _fill(filler)
        reached = rounds_done(record)
        wait_for(lambda: rounds_done(record) >= reached + 3, what="rounds without the site", seconds=120)
        filler.unlink()

    plan = _changed(stage.plan, quorum=3)
    record = stage.run_beside("full disk of a site", trouble, plan=plan)
    east = json.loads((record.directory / "report.json").read_text())["participation"]["east"]
    assert east["rounds_rejected"] >= 1 and "site_error" in east["story"]
    assert east["rounds_valid"] + east["rounds_rejected"] == ROUNDS and east["rounds_valid"] > 3


def test_a_damaged_checkpoint_falls_back_to_the_one_before_in_the_middle_of_a_run(stage: Stage) -> None:
    def trouble(record: RunRecord) -> None:
        wait_for(lambda: rounds_done(record) >= 3, what="round 3", seconds=120)
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
        wait_for(lambda: rounds_done(record) >= 3, what="round 3", seconds=120)
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
        wait_for(lambda: rounds_done(record) >= 2, what="round 2", seconds=120)
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
    stage.wait_until_online()
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
