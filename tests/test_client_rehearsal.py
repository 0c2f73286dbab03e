from __future__ import annotations

from pathlib import Path

from client import rehearsal
from client.cohort import freeze
from common import keys
from tests.plans import TINY, plan
from tests.sites import write_site


def test_a_rehearsal_charges_nothing_and_tells_what_a_run_would_cost(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", policies=[], max_epsilon=10.0)
    asked = plan(**TINY, privacy__target_epsilon=2.0)
    found = rehearsal.rehearse(site, asked)
    assert found.status == "approved"
    assert 1.98 <= found.run_epsilon <= 2.0
    assert found.total_epsilon == found.run_epsilon, (
        "nothing was spent before, nothing is spent by rehearsing"
    )
    assert not (site.state / "ledger.sqlite").exists()
    assert {field.message for field in found.fields} == {
        "prepare",
        "train",
        "evaluate validation",
        "evaluate test",
        "deliver",
    }


def test_a_rehearsal_of_a_plan_over_the_budget_says_declined_and_trains_nothing(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", max_epsilon=1.0)
    found = rehearsal.rehearse(site, plan(**TINY, privacy__target_epsilon=2.0))
    assert (found.status, found.reason) == ("declined", "budget_exceeded")
    assert {field.message for field in found.fields} == {"prepare"}


def test_a_rehearsal_leaves_the_records_of_the_site_as_they_were(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", max_epsilon=10.0)
    keys.write_private(site.private / "site.key", keys.generate())
    freeze(site)
    before = {path: path.read_bytes() for path in site.directory.rglob("*") if path.is_file()}
    assert rehearsal.rehearse(site, plan(**TINY, privacy__target_epsilon=2.0)).status == "approved"
    after = {path: path.read_bytes() for path in site.directory.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    made = {path.relative_to(site.directory).parts[0] for path in after.keys() - before.keys()}
    assert made == {"cache", "private"}
    assert [path.name for path in after.keys() - before.keys() if "private" in path.parts] == [
        "quarantine.csv"
    ]
    assert not site.runs.exists() and not site.state.exists()
