"""How a check is told: tables in the terminal, JSON, and ``private/check.html``, which alone names cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from client import findings, page, quarantine
from client.check import Findings, Line, check
from client.findings import Level
from client.frozen import Progress as OnProgress
from client.rules import Decision
from client.site import Site
from common.asked import Asked
from common.plan import Plan

STYLES: Mapping[Level, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}
FATES: Mapping[Decision | None, str] = {"refuse": "refused", "keep": "kept", "ask": "to decide", None: ""}


def report(
    site: Site,
    *,
    asked: Asked,
    plan: Plan | None = None,
    others: Sequence[Line] = (),
    freeze: bool = False,
    decided: Mapping[str, Decision] | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Checks a site, prints and writes what was found; returns the exit code, 0 if the site can take part.

    Args:
        freeze, decided: as ``check.check``.
        as_json: print JSON instead of tables.
        console: where to print; standard output unless given. The progress bar goes to standard error.
    """
    with progress(Console(stderr=True)) as on_progress:
        found = check(
            site,
            asked=asked,
            plan=plan,
            others=others,
            freeze=freeze,
            decided=decided,
            on_progress=on_progress,
        )
    page.write(site, found)
    findings.write(site.private / "findings.csv", found.found)
    console = console or Console()
    if as_json:
        console.print_json(data=found.to_tree())
    else:
        console.print(render(found))
    return 0 if found.ok else 1


def render(told: Findings) -> RenderableType:
    """Returns the findings as tables for a terminal; they name no case and no patient."""
    blocks = [_lines_table(told)]
    if told.found:
        blocks.insert(0, _found_table(told))
    if told.quarantined:
        blocks.insert(0, _quarantine_table(told))
    if told.parts:
        blocks.insert(0, _parts_table(told))
    return Group(*blocks)


def _parts_table(told: Findings) -> Table:
    classes = tuple(next(iter(told.parts.values())).by_class)
    table = Table(title=f"{told.site}: patients (cases)", title_justify="left")
    table.add_column("part")
    for name in (*classes, "all"):
        table.add_column(escape(name), justify="right")
    for name, part in told.parts.items():
        cells = [part.by_class[one] for one in classes]
        table.add_row(name, *(f"{cell.patients} ({cell.cases})" for cell in (*cells, part.total)))
    return table


def _quarantine_table(told: Findings) -> Table:
    table = Table(title="not used", title_justify="left")
    for name in ("code", "cases", "remedy"):
        table.add_column(name, justify="right" if name == "cases" else "left")
    for code, count in told.quarantined.items():
        table.add_row(code, str(count), quarantine.REMEDIES[code])
    return table


def _found_table(told: Findings) -> Table:
    table = Table(title="found (private/check.html has an example of each)", title_justify="left")
    for name in ("code", "cases", "what", "decided", "remedy"):
        table.add_column(name, justify="right" if name == "cases" else "left", no_wrap=name == "code")
    for one in told.found:
        says = f"{one.says}; {one.note}" if one.note else one.says
        code = f"[{STYLES[one.level]}]{one.code}[/]"
        remedy = "" if one.code in told.quarantined else one.remedy  # there it is said already
        table.add_row(code, str(one.cases or ""), escape(says), FATES[one.decision], remedy)
    return table


def _lines_table(told: Findings) -> Table:
    table = Table.grid(padding=(0, 2))
    for line in told.lines:
        table.add_row(f"[{STYLES[line.level]}]{line.level}[/]", escape(line.name), escape(line.text))
    return table


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """Shows a progress bar as long as the block lasts; yields what to hand on as ``on_progress``."""
    columns = (TextColumn("reading cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("cases", total=None)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield told
