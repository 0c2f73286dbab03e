"""What a real federation gives away, and what its ledgers do, seen from outside its processes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from flwr.app import ArrayRecord, Message

from client import rehearsal, release
from client.cost import planned_spends
from client.site import open_site
from common.plan import Plan
from common.privacy import epsilon, merged
from tests import plans, planted, wire
from tests.ports import free_ports
from tests.test_deployment import BINARIES, ROOT, Federation, wait_for
from tests.test_docs import PRIVACY, quoted, table

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

NAMES = ("north", "south", "west")
FAMILY, GIVEN, NUMBER = "Wolkenstein", "Oswald", "4711081517"
BUDGET = 6.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    import os

    directory = tmp_path_factory.mktemp(f"{GIVEN}-{FAMILY}")
    hook, recorded = directory / "hook", directory / "recorded"
    hook.mkdir()
    recorded.mkdir()
    (hook / "sitecustomize.py").write_text(wire.RECORDER)
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
    for name in NAMES:
        made.add_site(name)
        with_names(made.directory / name)
        change(made.directory / name, max_epsilon=BUDGET if name == "south" else 1000.0)
    try:
        made.start_coordinator()
        for name in NAMES:
            start(made, name)
        wait_for(lambda: list(made.status.sites.values()) == ["online"] * 3, what="sites online")
        yield made
    finally:
        for name in reversed(list(made.processes)):
            made.stop(name)


def start(federation: Federation, name: str) -> None:
    federation.spawn(name, BINARIES / "feverfew-client", "run", name)


def with_names(directory: Path) -> None:
    """Puts a patient's name where hospitals have it: in paths, in DICOM, in the table, in a broken file."""
    import numpy as np

    from simulations import dicom_file
    from simulations.anatomy import Difficulty, random_anatomy
    from simulations.phantom import draw, random_scanner

    rng = np.random.default_rng(1)
    folder = directory / "images" / f"{FAMILY}^{GIVEN}"
    folder.mkdir()
    scanner = random_scanner(rng, index=0, image_size=64)
    image = draw(random_anatomy(rng, diseased=False, difficulty=Difficulty()), scanner, rng)
    path = folder / f"{NUMBER}.dcm"
    dicom_file.write(path, image, scanner=scanner, patient_id=NUMBER, study=FAMILY, instance=1)
    dataset = pydicom.dcmread(path)
    planted.name_all(dataset)
    dataset.save_as(path)
    assert NUMBER.encode() in path.read_bytes()
    broken = folder / f"{GIVEN}.dcm"
    broken.write_bytes(path.read_bytes()[:400] + f"{FAMILY}^{GIVEN}".encode())
    with (directory / "cases.csv").open("a", encoding="utf-8", newline="") as file:
        rows = [(one.relative_to(directory), "normal", f"{FAMILY} {GIVEN}") for one in (path, broken)]
        csv.writer(file).writerows([*rows, (f"images/{FAMILY}-lost.dcm", "normal", NUMBER)])


def change(directory: Path, **settings: Any) -> None:
    path = directory / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def plan(**changes: Any) -> Plan:
    """Small and quick: every patient in every step."""
    fields: dict[str, Any] = {
        "sites": 3,
        "quorum": 2,
        "rounds": 2,
        "preprocessing": "grey28",
        "training__expected_batch": 1000,
        "privacy__target_epsilon": 3.0,
    }
    return plans.plan(**(fields | changes))


def run(federation: Federation, asked: Plan, name: str) -> dict[str, Any]:
    """Submits a plan; returns the coordinator's report."""
    path = federation.directory / "plan.json"
    path.write_text(asked.to_json())
    told = federation.verb("feverfew-server", "submit", "home", path, "--run", name, "--json")
    assert told.returncode == 0, told.stderr
    report: dict[str, Any] = json.loads((federation.home.runs / name / "report.json").read_text())
    return report


def test_three_runs_are_in_the_ledger_as_one_accountant_counts_them_and_the_fourth_is_declined(
    federation: Federation,
) -> None:
    asked = [plan(seed=1), plan(seed=2, rounds=3), plan(seed=3, privacy__target_epsilon=2.0)]
    for number, one in enumerate(asked):
        assert run(federation, one, f"run-{number}")["participation"]["south"]["status"] == "approved"
    told = federation.verb("feverfew-client", "ledger", "south", "--json")
    statement = json.loads(told.stdout)
    site = open_site(federation.directory / "south")
    for part, value in statement["parts"].items():
        spends = [spend for one in asked for spend in planned_spends(site, one)[part]]
        assert value == pytest.approx(epsilon(merged(spends), delta=site.settings.delta).value, abs=1e-6)
    assert statement["epsilon"] == max(statement["parts"].values()) <= BUDGET

    report = run(federation, plan(seed=4), "run-4")
    assert report["status"] == "completed"
    assert report["participation"]["south"]["status"] == "declined"
    assert {entry["sites_valid"] for entry in report["rounds"]} == {2}
    assert report["privacy"]["per_site"]["south"]["epsilon"] == 0
    assert str(BUDGET) not in json.dumps(report["participation"]["south"])
    page = (federation.home.runs / "run-4" / "report.html").read_text()
    assert "south" in page and "declined" in page
    again = json.loads(federation.verb("feverfew-client", "ledger", "south", "--json").stdout)
    assert again["epsilon"] == statement["epsilon"]


def test_site_that_was_put_back_to_an_old_copy_declines_until_it_is_restored(federation: Federation) -> None:
    west = federation.directory / "west"
    federation.stop("west")
    copy = federation.directory / "backup"
    shutil.copytree(west, copy)
    start(federation, "west")
    wait_for(lambda: list(federation.status.sites.values()) == ["online"] * 3, what="sites online")
    run(federation, plan(seed=5), "run-5")
    federation.stop("west")
    shutil.rmtree(west)
    copy.rename(west)
    start(federation, "west")
    wait_for(lambda: list(federation.status.sites.values()) == ["online"] * 3, what="sites online")
    report = run(federation, plan(seed=6, quorum=1), "run-6")
    assert report["participation"]["west"]["status"] == "declined"
    assert "feverfew-client ledger restore" in (west / "state" / "agent.log").read_text()
    federation.stop("west")
    refused = federation.verb("feverfew-client", "run", "west")
    assert refused.returncode == 1 and "ledger restore" in refused.stderr

    lost = plan(seed=5)
    path = federation.directory / "lost.json"
    path.write_text(lost.to_json())
    told = federation.verb("feverfew-client", "ledger", "restore", "west")
    assert told.returncode == 2 and "missing rows" in told.stderr, "the copy knows nothing of the lost plan"
    told = federation.verb("feverfew-client", "ledger", "restore", "west", "--plan", path)
    assert told.returncode == 0, told.stderr
    start(federation, "west")
    wait_for(lambda: list(federation.status.sites.values()) == ["online"] * 3, what="sites online")
    report = run(federation, plan(seed=7, quorum=1), "run-7")
    assert report["participation"]["west"]["status"] == "approved"


def test_every_field_that_crossed_the_gateway_is_in_the_table(federation: Federation) -> None:
    documented = {(row[0], *quoted(row[1])) for row in table(PRIVACY, "fields")}
    replies = wire.messages(federation.directory / "recorded")
    assert len(replies) > 30
    found = set()
    for reply in replies:
        kind = kind_of(reply)
        found |= {(kind, field.field) for field in rehearsal.fields(kind, reply.content)}
    assert found <= documented, found - documented
    private = {("train", "arrays.update"), ("evaluate", "arrays.histogram"), ("train", "metrics.train-loss")}
    assert private <= found
    assert ("train", "ledger.hash") in found


def kind_of(reply: Message) -> str:
    """The name of a message as the table has it."""
    content = reply.content
    for record, kind in (("refused", "refused"), ("delivered", "deliver"), ("reply", "prepare")):
        if record in content:
            return kind
    arrays = content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return "train" if "update" in arrays else "evaluate"


def test_no_name_in_paths_tags_tables_or_broken_files_is_sent(federation: Federation) -> None:
    sent = wire.raw(federation.directory / "recorded")
    assert len(sent) > 100_000
    assert planted.found(sent, [planted.DATE, *planted.HEADERS.values()]) == set()
    for secret in (FAMILY, GIVEN, NUMBER):
        for form in (secret, secret.lower(), secret.upper()):
            for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
                assert form.encode(encoding) not in sent, (form, encoding)
    table = (federation.directory / "north" / "cases.csv").read_bytes()
    assert FAMILY.encode() in table, "there was something to find"


def test_no_name_is_in_a_file_that_the_product_wrote_outside_private(federation: Federation) -> None:
    home = federation.home.runs.parent
    places = [home, *(federation.directory / name / made for name in NAMES for made in ("state", "cache"))]
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    assert {"agent.log", "ledger.sqlite", "index.json", "report.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes().replace(str(federation.directory).encode(), b"")  # has a name of its own
        words = (FAMILY, GIVEN, NUMBER, planted.DATE, *planted.HEADERS.values())
        assert planted.found(str(path.relative_to(federation.directory)).encode() + content, words) == set()
    used = b"".join(path.read_bytes() for path in federation.directory.rglob("used_cases.parquet"))
    assert FAMILY.encode() in used, "the hospital itself is told"


def test_the_recorder_sees_what_a_site_sends(federation: Federation) -> None:
    """Else the two tests above could not fail."""
    sent = wire.raw(federation.directory / "recorded")
    for name in NAMES:
        assert name.encode() in sent
    with release.open_ledger(open_site(federation.directory / "north")) as ledger:
        heads = [
            reply.content["ledger"]["hash"].hex()
            for reply in wire.messages(federation.directory / "recorded")
            if "ledger" in reply.content
        ]
        assert ledger.head.hash in heads
