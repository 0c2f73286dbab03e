"""Prints a proposal, and what waits and was decided, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.decision import Decision
from client.leaving import Leaving
from client.proposal import Cost, Proposal
from client.waiting import Waiting

UNBOUNDED = "Nothing bounds what this plan tells about a patient: it has no privacy, or its noise is known."


def show(found: Proposal, *, console: Console) -> None:
    """Prints all of a proposal, the most important last, beside the question."""
    for title, values in found.sections.items():
        _print(console, title, ("key", "value"), [(key, _text(value)) for key, value in values.items()])
    names = ("message", "field", "what it is", "protected by")
    _print(console, "Everything that will leave (docs/privacy.md)", names, _leaving(found.leaves))
    _print_difference(console, found)
    for line in cost_lines(found.cost, study=found.study):
        console.print(line, markup=False)
    console.print(f"plan {found.plan_hash} of study {found.study}", markup=False)
    if found.status != "waiting":
        console.print(f"it is {found.status} by {found.decided_by}", markup=False)
    if found.obstacle:
        console.print(f"whatever you decide, this site declines it: {found.obstacle}", markup=False)


def show_all(waiting: Sequence[Waiting], decided: Sequence[Decision], *, console: Console) -> None:
    """Prints the plans that wait, and what was decided."""
    rows = [(one.plan.hash[:12], one.plan.study, one.since) for one in waiting]
    _print(console, "Plans that wait for approval", ("plan", "study", "since"), rows)
    told = [
        (one.plan_hash[:12], one.plan.study, one.verdict, f"{one.by} {one.who}", one.time, one.reason)
        for one in decided
    ]
    names = ("plan", "study", "decision", "by", "time", "reason")
    _print(console, "What was decided", names, told)


def cost_lines(cost: Cost, *, study: str) -> list[str]:
    """Returns what a run costs, and what is left, in sentences."""
    if cost.epsilon is None:
        lines = [UNBOUNDED]
    else:
        lines = [f"A run costs epsilon {cost.epsilon:.3f} at delta {cost.delta:g} for a patient here."]
    if cost.total_epsilon is not None and cost.left is not None:
        lines.append(
            f"The ledger would be at {cost.total_epsilon:.3f} of {cost.max_epsilon:g}, {cost.left:.3f} left."
        )
    if cost.study_epsilon is not None:
        of = "" if cost.study_max_epsilon is None else f" of {cost.study_max_epsilon:g}"
        left = "no budget of its own" if cost.study_left is None else f"{cost.study_left:.3f} left"
        lines.append(f"Study {study} would be at {cost.study_epsilon:.3f}{of}, {left}.")
    return [*lines, *([f"It does not fit. {cost.problem}"] if cost.problem else [])]


def _leaving(leaves: Sequence[Leaving]) -> list[tuple[str, ...]]:
    """Returns a row for each field; one that several messages have stands once."""
    messages: dict[tuple[str, ...], list[str]] = {}
    for one in leaves:
        messages.setdefault((one.field, one.what, one.mechanism), []).append(one.message)
    return [(", ".join(names), *rest) for rest, names in messages.items()]


def _print_difference(console: Console, found: Proposal) -> None:
    if not found.compared_with:
        console.print("No other plan was approved here before.\n")
        return
    rows = [(one.key, _text(one.old), _text(one.new)) for one in found.changes]
    title = f"What is not as in plan {found.compared_with[:12]}, the last that was approved"
    _print(console, title, ("key", "old", "new"), rows)


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console.print(title, style="bold", markup=False)
    if not rows:
        console.print("none\n")
        return
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    console.print(table)
    console.print()


def _plain(text: str) -> str:
    """Nothing that came from elsewhere may speak to the terminal."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)
