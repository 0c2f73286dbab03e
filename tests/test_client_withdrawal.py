"""A patient who withdraws is used by no later task, and nothing else changes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import frozen, release, split, withdrawal
from client.cohort import Cohort, open_cohort
from client.site import Site, open_site
from common.errors import StateError, UserError
from tests.plans import asked as asked_of
from tests.sites import write_site
from tests.test_client_usage import ask, cases_of, quick, rows

COMMAND = Path(sys.executable).with_name("feverfew-client")
ASKED = asked_of()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return made(tmp_path / "north")


def made(directory: Path, **settings: Any) -> Site:
    return write_site(directory, size=8, max_epsilon=100.0, unsafe_allow_seeded_noise=True, **settings)


def opened(site: Site) -> Cohort:
    return open_cohort(site, asked=ASKED)


def somebody(site: Site) -> str:
    """A patient of the training part."""
    opened(site)
    return cases_of(site, "train")[0].case.patient


def patients(cohort: Cohort) -> set[str]:
    return {patient for sources in cohort.sources.values() for patient in sources["patient"].to_pylist()}


def quarantined(site: Site) -> dict[str, str]:
    with (site.private / "quarantine.csv").open() as stream:
        return {row["image"]: row["code"] for row in csv.DictReader(stream)}


def without(site: Site, patient: str) -> None:
    """Takes a patient out of the table."""
    table = site.directory / "cases.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not line.rstrip().endswith(f",{patient}")))


def update(site: Site) -> bytes:
    """The bytes of a seeded update, as they are stored before they are sent."""
    assert ask(site, quick(randomness="seeded", seed=1)) == ""
    (stored,) = (site.state / "replies").glob("*.safetensors")
    return stored.read_bytes()


def command(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, input=text, check=False, timeout=60
    )


def test_withdrawn_patient_is_in_no_part_and_everybody_else_is_where_they_were(site: Site) -> None:
    before, patient = opened(site), somebody(site)
    withdrawal.withdraw(site, patient=patient)
    after = opened(site)
    assert patients(before) - patients(after) == {patient}
    assert (after.offered, after.used, after.reasons) == (40, 38, {"withdrawn": 2})
    assert set(quarantined(site).values()) == {"withdrawn"}
    assert after.version == before.version
    for name, sources in after.sources.items():
        kept = [row for row in before.sources[name].to_pylist() if row["patient"] != patient]
        assert sources.to_pylist() == kept
        assert len(sources) == len(after.parts[name].images)


def test_sources_are_in_the_order_of_the_arrays(site: Site) -> None:
    cohort = opened(site)
    listed = frozen.read(site, secret=split.read_key(site))
    assert listed is not None
    known = {(*one.case.images, one.case.patient, one.content): one.case for one in listed.cases}
    for name, sources in cohort.sources.items():
        rows = sources.to_pylist()
        cases = [known[(*row["images"], row["patient"], row["content"])] for row in rows]
        labels = [("normal", "opacity").index((case.labels or ("",))[0]) for case in cases]
        assert cohort.parts[name].targets.tolist() == labels
        for positions in cohort.parts[name].patients:
            assert len({rows[int(position)]["patient"] for position in positions}) == 1


def test_update_is_that_of_a_site_that_never_had_the_patient(tmp_path: Path) -> None:
    site, never = made(tmp_path / "a"), made(tmp_path / "b")
    patient = somebody(site)
    without(never, patient)
    everybody = update(site)
    shutil.rmtree(site.state)
    shutil.rmtree(site.directory / "plans")
    release.head_path(site).unlink()
    withdrawal.withdraw(site, patient=patient)
    assert update(site) == update(never) != everybody


def test_withdrawal_holds_from_the_next_task_of_a_run_under_way(site: Site) -> None:
    asked, patient = quick(), somebody(site)
    ask(site, asked)
    used = {row["patient"] for row in rows(site)}
    withdrawal.withdraw(site, patient=patient)
    ask(site, asked, server_round=2)
    assert patient in used and {row["patient"] for row in rows(site)} == used, "used before, and kept so"
    other = quick(seed=2)
    assert ask(site, other, run="run-2") == ""
    assert {row["patient"] for row in rows(site, "run-2")} == used - {patient}


def test_undo_brings_the_patient_back(site: Site) -> None:
    before, patient = opened(site), somebody(site)
    withdrawal.withdraw(site, patient=patient)
    opened(site)
    withdrawal.undo(site, patient=patient)
    after = opened(site)
    assert patients(after) == patients(before) and after.reasons == {}
    for name, part in after.parts.items():
        assert np.array_equal(part.images, before.parts[name].images)
    assert [event.event for event in withdrawal.history(site)] == ["withdrawn", "undone"]


def test_withdrawal_changes_no_charge_and_nothing_that_a_site_tells_before_a_run(site: Site) -> None:
    asked, patient = quick(), somebody(site)
    ask(site, asked)
    withdrawal.withdraw(site, patient=patient)
    assert ask(site, asked, "prepare") == ""
    assert ask(site, asked, server_round=2) == ""
    with closing(sqlite3.connect(release.ledger_path(site))) as database:
        query = (
            "SELECT noise_multiplier, sample_rate, steps, nominal_patients FROM entries WHERE kind='charge'"
        )
        first, second = database.execute(query)
    assert first == second


def test_stored_reply_is_sent_again_as_it_was(site: Site) -> None:
    first = update(site)
    withdrawal.withdraw(site, patient=somebody(site))
    assert update(site) == first, "it has left already; another one would be a second release"


def test_withdrawn_patient_stays_withdrawn_when_the_cohort_is_frozen_anew(site: Site) -> None:
    patient = somebody(site)
    withdrawal.withdraw(site, patient=patient)
    frozen.freeze(site)
    assert patient not in patients(opened(site))


def test_patient_who_is_listed_later_is_withdrawn_already(site: Site) -> None:
    patient = somebody(site)
    table = (site.directory / "cases.csv").read_text()
    without(site, patient)
    frozen.freeze(site)
    withdrawal.withdraw(site, patient=patient)
    (site.directory / "cases.csv").write_text(table)
    frozen.freeze(site)
    assert opened(site).reasons == {"withdrawn": 2}


def test_images_of_the_withdrawn_leave_the_cache_that_is_opened_next(site: Site) -> None:
    size = sum(path.stat().st_size for path in site.cache.rglob("*.npy")) if opened(site) else 0
    withdrawal.withdraw(site, patient=somebody(site))
    opened(site)
    (records,) = site.cache.rglob("*.npy")
    assert size - records.stat().st_size == 2 * 8 * 8, "two images of 8 x 8 bytes"


def test_files_of_the_withdrawn_are_not_opened(site: Site) -> None:
    patient = somebody(site)
    for one in cases_of(site, "train"):
        if one.case.patient == patient:
            (site.directory / one.case.image).unlink()
    assert opened(site).reasons == {"missing_file": 2}
    withdrawal.withdraw(site, patient=patient)
    assert opened(site).reasons == {"withdrawn": 2}


def test_where_each_image_is_a_patient_its_path_is_withdrawn(tmp_path: Path) -> None:
    site = made(tmp_path / "north", patient_is="case")
    table = site.directory / "cases.csv"
    kept = [line.rpartition(",")[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(kept) + "\n")
    withdrawal.withdraw(site, patient="images/3.png")
    opened(site)
    assert quarantined(site) == {"images/3.png": "withdrawn"}


def test_history_is_private_and_names_each_withdrawal_once(site: Site) -> None:
    for _ in range(2):
        withdrawal.withdraw(site, patient="Müller, Ümit")
    (event,) = withdrawal.history(site)
    assert (event.patient, event.event) == ("Müller, Ümit", "withdrawn")
    assert (site.private / "withdrawn.json").stat().st_mode & 0o777 == 0o600


def test_undo_of_who_is_not_withdrawn_is_refused(site: Site) -> None:
    with pytest.raises(UserError, match="withdraw --list"):
        withdrawal.undo(site, patient="Patient 1")
    with pytest.raises(UserError, match="empty"):
        withdrawal.withdraw(site, patient="")


def test_site_whose_history_is_damaged_uses_nobody(site: Site) -> None:
    withdrawal.withdraw(site, patient="Patient 1")
    path = site.private / "withdrawn.json"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StateError, match="restore it"):
        opened(site)
    assert ask(site, quick()) == "site_error"
    with pytest.raises(StateError):
        withdrawal.withdraw(site, patient="Patient 2")


WITHDRAW = """
import sys
from pathlib import Path
from client import withdrawal
from client.site import open_site
for number in range(10):
    withdrawal.withdraw(open_site(Path(sys.argv[1])), patient=f"{sys.argv[2]}-{number}")
"""


def test_people_who_withdraw_patients_at_a_time_lose_none(site: Site) -> None:
    arguments = (sys.executable, "-c", WITHDRAW, str(site.directory))
    writers = [subprocess.Popen([*arguments, name]) for name in "abc"]
    assert [one.wait(60) for one in writers] == [0, 0, 0]
    assert set(withdrawal.withdrawn(site)) == {f"{name}-{n}" for name in "abc" for n in range(10)}


@pytest.mark.slow
def test_command_withdraws_and_lists_the_runs_that_used_the_patient(site: Site) -> None:
    asked, patient = quick(), somebody(site)
    ask(site, asked)
    told = command("withdraw", site.directory, patient, "--json")
    assert told.returncode == 0, told.stderr
    tree = json.loads(told.stdout)
    assert (tree["known"], tree["cases"], len(tree["withdrawn"]) > 0) == (True, 2, True)
    (run,) = tree["runs"]
    assert (run["run"], run["part"], run["cases"], run["plan_hash"]) == ("run-1", "train", 2, asked.hash)
    assert patient not in patients(opened(site))
    shown = command("used", site.directory, patient)
    assert shown.returncode == 0 and "run-1" in shown.stdout and "not untrained" in shown.stdout
    listed = command("withdraw", site.directory, "--list")
    assert patient in listed.stdout and "withdrawn: 1" in listed.stdout
    undone = command("withdraw", site.directory, "-", "--undo", text=f"{patient}\n")
    assert undone.returncode == 0 and "undone" in undone.stdout
    assert patient in patients(opened(site))
    assert json.loads(command("withdraw", site.directory, "--list", "--json").stdout) == {}


@pytest.mark.slow
def test_command_says_that_a_patient_is_unknown_and_keeps_the_withdrawal(site: Site) -> None:
    asked = command("used", site.directory, "Nobody")
    assert asked.returncode == 1 and "not known" in asked.stdout
    told = command("withdraw", site.directory, "Nobody")
    assert told.returncode == 1, "a script notices a misspelt name"
    assert "check the spelling" in told.stdout and "is kept" in told.stdout
    assert set(withdrawal.withdrawn(site)) == {"Nobody"}


@pytest.mark.slow
def test_command_withdraws_where_nothing_else_of_the_site_works(site: Site) -> None:
    (site.directory / "cases.csv").unlink()
    told = command("withdraw", site.directory, "Patient 3")
    assert told.returncode == 2 and told.stdout.startswith("withdrawn")
    assert set(withdrawal.withdrawn(open_site(site.directory))) == {"Patient 3"}


def test_withdrawal_asks_nothing_of_any_coordinator(site: Site) -> None:
    """No coordinator is named at this site, and the command's process opens no socket."""
    watch = (
        "import os, sys\n"
        "def note(event, arguments):\n"
        "    if event.startswith('socket.connect'): os._exit(9)\n"
        "sys.addaudithook(note)\n"
        "from client.__main__ import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", watch, "withdraw", str(site.directory), "Patient 3"]
    assert subprocess.run(words, env=os.environ, check=False, timeout=60).returncode == 0
