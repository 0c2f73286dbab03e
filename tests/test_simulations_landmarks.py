"""Landmarks and the training after them, as the command does both."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.landmarks import OVERRIDE_NAME
from server.report import Report
from tests.sites import write_site
from tests.test_simulations_run import SMALL, simulate

ASKS = [
    *("plan=landmarks", "preprocessing=grey28", "data=directory", "data.classes=[normal,opacity]"),
    *("state=keep", "privacy.target_epsilon=4"),
]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sites")
    for name in ("a", "b"):
        facts = {"num_patients": 150, "cases_per_patient": 1, "max_epsilon": 20.0}
        write_site(directory / name, name=name, unsafe_allow_seeded_noise=True, **facts)
    return directory


@pytest.mark.slow
def test_landmarks_are_found_and_trained_with_and_both_are_in_the_ledger(sites: Path, tmp_path: Path) -> None:
    place = f"data.directory={sites}"
    done = simulate(tmp_path, *ASKS, place, "hydra.run.dir=first")
    assert done.returncode == 0, done.stderr
    assert "percentile to value" in done.stdout and "AUROC" not in done.stdout
    assert f"first/{OVERRIDE_NAME}" in done.stdout
    written = (tmp_path / "first" / OVERRIDE_NAME).read_text().strip()
    later = simulate(tmp_path, *SMALL, place, "preprocessing=grey28", written, "hydra.run.dir=second")
    assert later.returncode == 0, later.stderr
    report = Report.read(tmp_path / "second")
    assert report.plan["preprocessing"]["steps"][0]["name"] == "landmarks"
    for cost in report.privacy.per_site.values():
        assert cost.total_epsilon is not None and cost.epsilon is not None
        assert max(4, cost.epsilon) < cost.total_epsilon < 4 + cost.epsilon


@pytest.mark.slow
def test_landmarks_do_not_depend_on_the_number_of_workers(sites: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        seeded = ["plan.randomness=seeded", f"engine.workers={workers}", f"hydra.run.dir=run-{workers}"]
        done = simulate(tmp_path, *ASKS, f"data.directory={sites}", *seeded)
        assert done.returncode == 0, done.stderr
        found.append(Report.read(tmp_path / f"run-{workers}").landmarks)
    assert found[0] is not None and found[0] == found[1]
