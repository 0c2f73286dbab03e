"""What a coordinator does over the years, with real processes: two studies side by side, a new server
certificate, a revoked site, a directory that comes back from a backup."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from client.cost import planned_spends
from client.site import open_site
from common import certificates
from common.plan import Plan
from common.privacy import epsilon, merged
from server import checkpoint, renewal
from tests import plans
from tests.ports import free_ports
from tests.test_client_backup import commands, does
from tests.test_deployment import BINARIES, ROOT, Federation, wait_for

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]
NAMES = ("north", "south", "west")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("upkeep")
    made = Federation(directory, os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    gateway, internal = free_ports(2)
    told = made.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert told.returncode == 0, told.stderr
    for name in NAMES:
        made.add_site(name)
        path = directory / name / "site.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"max_epsilon": 1000.0}))
    try:
        made.start_coordinator()
        for name in NAMES:
            made.spawn(name, BINARIES / "feverfew-client", "run", name)
        wait_online(made)
        yield made
    finally:
        for name in reversed(list(made.processes)):
            made.stop(name)


def wait_online(federation: Federation) -> None:
    wait_for(lambda: set(federation.status.sites.values()) == {"online"}, what="sites online")


def plan(**changes: Any) -> Plan:
    """Small and quick: every patient in every step."""
    fields: dict[str, Any] = {
        "sites": 3,
        "quorum": 2,
        "rounds": 3,
        "preprocessing": "grey28",
        "training__expected_batch": 1000,
        "privacy__target_epsilon": 3.0,
    }
    return plans.plan(**(fields | changes))


def submit(federation: Federation, asked: Plan, run: str) -> None:
    path = federation.directory / f"{run}.json"
    path.write_text(asked.to_json())
    told = federation.verb("feverfew-server", "submit", "home", path, "--run", run, "--no-follow")
    assert told.returncode == 0, told.stderr


def status_of(federation: Federation, run: str) -> str:
    (found,) = [line.status for line in federation.status.runs if line.run == run]
    return found


def wait_ended(federation: Federation, run: str, *, seconds: float = 120) -> dict[str, Any]:
    """Returns the report of a run that has ended."""
    going = ("waiting", "running", "lost")
    wait_for(lambda: status_of(federation, run) not in going, seconds=seconds, what=f"the end of {run}")
    report: dict[str, Any] = json.loads((federation.home.runs / run / "report.json").read_text())
    return report


def wait_round(federation: Federation, run: str, number: int) -> None:
    checkpoints = federation.home.runs / run / "checkpoints"
    wait_for(lambda: checkpoint.newest_round(checkpoints) >= number, what=f"round {number} of {run}")


def test_two_studies_run_side_by_side_and_a_third_that_is_stopped_touches_neither(
    federation: Federation,
) -> None:
    asked = {name: plan(study=name, rounds=6, seed=number) for number, name in enumerate(("chest", "hip"))}
    begun = time.monotonic()
    for name, one in asked.items():
        submit(federation, one, name)
    submit(federation, plan(study="knee", rounds=500), "knee")
    for name in asked:
        wait_round(federation, name, 1)
    wait_round(federation, "knee", 1)
    assert {status_of(federation, name) for name in (*asked, "knee")} == {"running"}, "all at a time"
    told = federation.verb("feverfew-server", "status", "home").stdout
    assert all(any(line.split()[:2] == ["run", name] for line in told.splitlines()) for name in asked)
    assert federation.verb("feverfew-server", "stop", "home", "knee").returncode == 0
    for name in asked:
        report = wait_ended(federation, name)
        assert (report["status"], report["study"]) == ("completed", name)
        assert [entry["sites_valid"] for entry in report["rounds"]] == [3] * 6
        assert report["restarts"] == {}
        assert {part["story"] for part in report["participation"].values()} == {"trained 6 of 6 rounds"}
    print(f"two runs of 6 rounds beside a third took {time.monotonic() - begun:.1f} s")
    assert status_of(federation, "knee") == "stopped"
    for name in NAMES:
        told = spent(federation, name)
        for study, one in asked.items():
            assert told[study] == pytest.approx(cost(federation, name, one), abs=1e-6)
        assert told[""] > max(told["chest"], told["hip"])


def spent(federation: Federation, name: str) -> dict[str, float]:
    """Returns what a site has spent by study, and under "" altogether."""
    told = json.loads(federation.verb("feverfew-client", "ledger", name, "--json").stdout)
    return {study["study"]: study["epsilon"] for study in told["studies"]} | {"": told["epsilon"]}


def cost(federation: Federation, name: str, asked: Plan) -> float:
    """Returns what one whole run costs a site, every task charged once."""
    site = open_site(federation.directory / name)
    alone = [merged(spends) for spends in planned_spends(site, asked).values()]
    return max(epsilon(spends, delta=site.settings.delta).value for spends in alone)


def test_the_server_certificate_is_renewed_in_the_middle_of_a_run_and_no_round_is_missed(
    federation: Federation,
) -> None:
    submit(federation, plan(rounds=10, seed=7), "renewed")
    wait_round(federation, "renewed", 2)
    former, pids = renewal.current(federation.home), federation.status.processes
    told = federation.verb("feverfew-server", "renew", "home")
    assert told.returncode == 0 and "is taken up now" in told.stdout, told.stderr
    wait_for(
        lambda: all(federation.status.processes[name] not in (None, pids[name]) for name in renewal.USERS),
        what="gateway and SuperLink with the new certificate",
    )
    assert checkpoint.newest_round(federation.home.runs / "renewed" / "checkpoints") < 10, "in the middle"
    report = wait_ended(federation, "renewed")
    assert report["status"] == "completed"
    assert [entry["sites_valid"] for entry in report["rounds"]] == [3] * 10
    assert report["restarts"] == {}, "nothing of it is a loss"
    made = renewal.current(federation.home)
    assert made != former
    assert shown_certificate(federation) == made
    after = federation.status.processes
    assert (after["supervisor"], after["superexec"]) == (pids["supervisor"], pids["superexec"])
    print("seconds of each round:", [round(entry["seconds"], 1) for entry in report["rounds"]])


def shown_certificate(federation: Federation) -> certificates.Certificate:
    """What the gateway shows to whoever comes."""
    port = federation.home.settings.port
    return certificates.from_pem(ssl.get_server_certificate(("127.0.0.1", port)))


def test_a_site_that_is_revoked_in_the_middle_of_a_run_is_called_revoked_in_its_report(
    federation: Federation,
) -> None:
    federation.add_site("east")
    federation.spawn("east", BINARIES / "feverfew-client", "run", "east")
    wait_online(federation)
    submit(federation, plan(sites=4, rounds=8, seed=9), "revoked")
    wait_round(federation, "revoked", 2)
    assert federation.verb("feverfew-server", "revoke", "home", "east").returncode == 0
    report = wait_ended(federation, "revoked")
    told = report["participation"]["east"]
    assert report["status"] == "completed" and told["status"] == "revoked"
    assert told["story"].startswith("revoked by the coordinator; before, it trained ")
    assert "missing" not in told["story"]
    assert report["rounds"][-1]["sites_asked"] == 3
    print("seconds of each round:", [round(entry["seconds"], 1) for entry in report["rounds"]])
    federation.stop("east")


def test_a_coordinator_that_comes_back_from_a_backup_goes_on_with_its_sites_and_its_runs(
    federation: Federation,
) -> None:
    """As docs/operation.md says: stopped and copied, gone on with, lost, and the copy in its place."""
    asked = plan(study="kept", rounds=12, seed=11)
    submit(federation, asked, "kept")
    wait_round(federation, "kept", 2)
    assert federation.stop("coordinator") == 0
    home, place = federation.directory / "home", federation.directory
    (back_up,), (bring_back,) = commands("back up a coordinator"), commands("bring a coordinator back")
    assert does(back_up.replace("coordinator", "home"), place=place).returncode == 0
    copied = checkpoint.newest_round(home / "runs" / "kept" / "checkpoints")
    federation.start_coordinator()
    wait_round(federation, "kept", copied + 3)
    assert federation.stop("coordinator") == 0
    assert checkpoint.newest_round(home / "runs" / "kept" / "checkpoints") < 12, "in the middle"
    shutil.rmtree(home)
    assert does(bring_back.replace("coordinator", "home"), place=place).returncode == 0
    assert (home / "private" / "authority.key").stat().st_mode & 0o777 == 0o600
    federation.start_coordinator()
    wait_online(federation)
    report = wait_ended(federation, "kept")
    assert report["status"] == "completed"
    assert [entry["sites_valid"] for entry in report["rounds"]] == [3] * 12
    for name in NAMES:
        assert spent(federation, name)["kept"] == pytest.approx(cost(federation, name, asked), abs=1e-6)
    told = federation.verb("feverfew-server", "trail", "verify", "home")
    assert told.returncode == 0, told.stdout
    print("seconds of each round:", [round(entry["seconds"], 1) for entry in report["rounds"]])


def test_sites_say_that_the_servers_certificate_has_expired_and_go_on_after_a_renewal(
    federation: Federation,
) -> None:
    assert federation.stop("coordinator") == 0
    renewal.renew(federation.home, days=-1)
    refused = federation.verb("feverfew-server", "start", "home")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "run: feverfew-server renew" in refused.stderr
    renewal.renew(federation.home, days=20 / 86400)
    federation.start_coordinator()
    wait_online(federation)
    assert "feverfew-server renew" in federation.log("coordinator"), "the end that is near is announced"
    wait_for(lambda: certificates.days_left(renewal.current(federation.home)) < 0, what="the end")
    federation.stop("south")
    federation.spawn("south", BINARIES / "feverfew-client", "run", "south")
    wait_for(lambda: "certificate has expired" in federation.log("south"), seconds=30, what="a clear line")
    assert "its certificate has expired" in federation.verb("feverfew-server", "status", "home").stdout
    assert federation.verb("feverfew-server", "renew", "home").returncode == 0
    wait_for(lambda: set(federation.status.sites.values()) == {"online"}, seconds=60, what="sites online")
    submit(federation, plan(rounds=1, seed=13), "after")
    assert wait_ended(federation, "after")["rounds"][0]["sites_valid"] == 3
