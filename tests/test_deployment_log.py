"""The daemons' logs as JSON, in a real federation: every line of every process, and what stands in none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client import credential
from tests import plans
from tests.ports import free_ports
from tests.test_common_logline import parsed
from tests.test_deployment import BINARIES, ROOT, Federation, wait_for

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

JSON = ("--log-format", "json")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator with a monitor and one site, by the commands that people use, with logs in JSON."""
    directory = tmp_path_factory.mktemp("logs")
    federation = Federation(directory, os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    gateway, internal, monitor = free_ports(3)
    made = federation.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert made.returncode == 0, made.stderr
    settings = directory / "home" / "coordinator.yaml"
    settings.write_text(settings.read_text().replace("monitor_port: null", f"monitor_port: {monitor}"))
    federation.add_site("north")
    broken = directory / "north" / "images" / "0.png"
    broken.write_bytes(b"Patient 0 is no picture")
    try:
        federation.spawn("coordinator", BINARIES / "feverfew-server", "start", "home", *JSON)
        wait_for(lambda: "coordinator is ready" in federation.log("coordinator"), what="the coordinator")
        federation.spawn("north", BINARIES / "feverfew-client", "run", "north", *JSON)
        wait_for(lambda: federation.status.sites == {"north": "online"}, what="north online")
        yield federation
    finally:
        for name in reversed(list(federation.processes)):
            federation.stop(name)


def metric(federation: Federation, line: str) -> float:
    """Returns the value of a metric of the coordinator, by its name and labels."""
    url = f"http://127.0.0.1:{federation.home.settings.monitor_port}/metrics"
    values = dict(text.rpartition(" ")[::2] for text in httpx.get(url, trust_env=False).text.splitlines())
    return float(values[line])


def test_metrics_of_the_coordinator_tell_what_its_gateway_passed_and_refused(federation: Federation) -> None:
    refused = 'feverfew_gateway_refused_total{reason="path"}'
    wait_for(lambda: metric(federation, "feverfew_gateway_passed_total") > 10, what="polls of the agent")
    before = metric(federation, refused)
    tls = credential.require(federation.directory / "north").tls(federation.home.invitation.certificate)
    url = f"https://{federation.home.invitation.address}/v1/control/list-runs"
    for _ in range(3):
        assert httpx.post(url, verify=tls, trust_env=False).status_code == 403
    wait_for(lambda: metric(federation, refused) == before + 3, seconds=5, what="refusals")
    federation.kill("gateway")
    wait_for(lambda: metric(federation, refused) == 0, what="a new gateway, which counts from its start")
    assert metric(federation, 'feverfew_process_restarts_total{process="gateway"}') == 1


def test_every_line_of_every_log_is_json_and_names_no_patient(federation: Federation) -> None:
    plan = plans.plan(
        randomness="seeded", rounds=2, preprocessing="grey28", privacy="none", sites=1, quorum=1
    )
    path = federation.directory / "plan.json"
    path.write_text(plan.to_json())
    told = federation.verb("feverfew-server", "submit", "home", path, "--run", "run-7", "--json")
    assert told.returncode == 0, told.stderr
    os.kill(federation.processes["north"].pid, signal.SIGTERM)
    assert federation.processes.pop("north").wait(30) == 0
    assert federation.stop("coordinator") == 0
    home, directory = federation.home, federation.directory
    logs = {path.stem: path for path in home.logs.iterdir()}
    assert set(logs) == {"superlink", "superexec", "gateway"}
    logs |= {"supervisor": directory / "coordinator.log", "agent": directory / "north.log"}
    logs |= {"the site's own": directory / "north" / "state" / "agent.log"}
    lines = {name: parsed(path.read_text()) for name, path in logs.items()}
    assert all(lines.values()), "no log is empty"
    assert {line["process"] for line in lines["superlink"]} == {"superlink"}
    assert any(line.get("site") == "north" and "refused" in line["message"] for line in lines["gateway"])
    assert any(line.get("run") == "run-7" for line in lines["supervisor"])
    assert any(line.get("run") == "run-7" and line.get("round") == 2 for line in lines["agent"])
    assert all(line["site"] == "north" for name in ("agent", "the site's own") for line in lines[name])
    for path in logs.values():
        assert not any(word in path.read_text() for word in ("Patient ", "images/", "PRIVATE KEY")), path
        assert home.superexec_secret.read_text() not in path.read_text()


def test_what_keeps_a_daemon_from_starting_is_json_too(federation: Federation, tmp_path: Path) -> None:
    for command in (("feverfew-client", "run", tmp_path), ("feverfew-server", "start", tmp_path)):
        done = federation.verb(*command, *JSON)
        assert done.returncode == 2 and done.stderr == ""
        (line,) = parsed(done.stdout)
        assert line["level"] == "ERROR" and line["message"].startswith(f"{command[0]}: Expected")
