"""One simulated run: sites on disk, an engine, and a report completed from the sites' own files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from safetensors.numpy import load_file

from client import frozen, tally
from client.release import open_ledger
from client.site import Site, open_site
from common import durable, measure
from common.calibration import require_reachable
from common.dice import DiceScores
from common.errors import ConfigError
from common.measure import Exact
from common.metrics import Scores
from common.plan import Plan
from common.trail import read
from server.landmarks import OVERRIDE_NAME
from server.progress import Progress
from server.report import Report
from server.summary import summary_table
from simulations import engine
from simulations.forgotten import forgotten
from simulations.settings import Settings, require_resumable
from simulations.watch import Watch
from simulations.workers import Workers


def simulate(
    plan: Plan, sites: Sequence[Path], *, settings: Settings, directory: Path, pool: Workers | None = None
) -> Report:
    """Runs a plan over site directories and returns the completed report, which is also written.

    Args:
        pool: processes that stay for other runs; None: of this run alone.

    Raises:
        ConfigError: ``resume`` without a run to resume; a privacy target that cannot be reached.
        DataError: a site's case table cannot be used.
        QuorumNotReached: the run stopped early; what is left of it is written.
    """
    require_resumable(settings, directory=directory)
    directory.mkdir(parents=True, exist_ok=True)
    opened = [open_site(path) for path in sites]
    for site in opened:
        _require_usable(site, plan)
    run = run_id(directory, resume=settings.resume)
    heads = Path(settings.sites_directory).resolve() / ".heads"
    with _locked(sites), ExitStack() as stack:
        if settings.state == "empty" and not settings.resume:
            stack.enter_context(forgotten(opened, heads=heads))
        heads.mkdir(parents=True, exist_ok=True)
        os.environ["FEVERFEW_RUN_DIRECTORY"] = str(directory)
        os.environ["FEVERFEW_HEADS_DIRECTORY"] = str(heads)
        os.environ["FEVERFEW_TRAIL_KEY"] = str(heads / "trail.key")
        os.environ["FEVERFEW_ENGINE"] = settings.engine.name
        console = Console(stderr=True)
        directories = {site.name: site.directory for site in opened}
        progress = Progress(num_rounds=plan.rounds, console=console)
        is_durable = settings.state == "keep"  # else the next run puts aside what this one wrote
        watch = Watch(progress, events=directory / "events.jsonl", sites=directories)
        with watch, durable.waiting(is_durable):
            engine.run(
                plan,
                opened,
                run=run,
                name=settings.engine.name,
                workers=settings.engine.workers,
                directory=directory,
                pool=pool,
                is_durable=is_durable,
            )
        report = completed(Report.read(directory), opened, run=run)
    report.write(directory)
    return report


def _require_usable(site: Site, plan: Plan) -> None:
    """Finds before the start what would stop a site for certain."""
    next(frozen.listed_rows(site), None)
    if site.settings.role == "training":
        require_reachable(plan, nominal_patients=site.settings.nominal_patients)


def show(report: Report, *, directory: Path) -> None:
    """Prints the closing table and where the files are."""
    console = Console()
    console.print(summary_table(report))
    if report.landmarks is not None:
        console.print(f"harmonised: {directory / OVERRIDE_NAME}", highlight=False, soft_wrap=True)
    console.print(f"report: {directory / 'report.html'}", highlight=False, soft_wrap=True)


def run_id(directory: Path, *, resume: bool) -> str:
    """Returns a new id, or that of the run to go on with; ``require_resumable`` says whether there is one."""
    events = directory / "events.jsonl"
    if not resume:
        name = "".join(char if char.isalnum() else "-" for char in directory.name.lower())
        return f"{name[:40].strip('-')}-{secrets.token_hex(4)}"
    return next(str(event["run"]) for event in read(events) if event["event"] == "run_started")


def completed(report: Report, sites: Sequence[Site], *, run: str) -> Report:
    """Returns the report with what only the sites' own files tell: exact scores, totals, counts."""
    exact = {site.name: scores for site in sites if (scores := _exact_scores(site, run)) is not None}
    tested = {name: scores for name, scores in exact.items() if name in report.final.per_site}
    known = [site for site in sites if site.name in report.participation]
    return report.with_exact(tested).with_site_facts(
        privacy={site.name: _budget(site, report) for site in known if site.name in report.privacy.per_site},
        participation={site.name: _counts(site, run) for site in known},
    )


def _exact_scores(site: Site, run: str) -> Exact | None:
    path = site.state / "scores" / run / "test.safetensors"
    if not path.exists():
        return None
    found = measure.statistic(load_file(path))
    assert isinstance(found, Scores | DiceScores), "sites keep exact scores only"
    return found


def _budget(site: Site, report: Report) -> dict[str, Any]:
    if report.privacy.unit == "none" or not (site.state / "ledger.sqlite").exists():
        return {}
    with open_ledger(site) as ledger:
        return {"budget": site.settings.max_epsilon, "total_epsilon": ledger.spent().value}


def _counts(site: Site, run: str) -> dict[str, Any]:
    """Returns what the site's tasks found and wrote down; nothing of a site that did none."""
    found = tally.last(site, run=run)
    if found is None:
        return {}
    return {
        "offered": found.offered,
        "used": found.used,
        "quarantined": sum(found.quarantined.values()),
        "reasons": found.quarantined,
    }


class _locked:
    """Holds a lock in the folder that the sites are in, however many they are: two simulations never share
    a site."""

    def __init__(self, sites: Sequence[Path]) -> None:
        folders = sorted({path.resolve().parent for path in sites})
        self._locks = [FileLock(folder / ".lock") for folder in folders]

    def __enter__(self) -> None:
        try:
            for lock in self._locks:
                lock.acquire(timeout=0)
        except Timeout as error:
            self.__exit__()
            raise ConfigError(
                f"Expected sites that no other process uses, found {error.lock_file} held; wait for "
                "the other run or set sites_directory."
            ) from None

    def __exit__(self, *error: object) -> None:
        for lock in self._locks:
            lock.release()
