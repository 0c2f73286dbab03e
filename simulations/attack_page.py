"""Renders ``attack.html``: what an attack found, for somebody who has to trust the ledger."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.template import template
from server.page import delta, number, percent, upward

if TYPE_CHECKING:
    from simulations.attack import AttackReport
    from simulations.auditor import Audit


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of the picture; ``share`` is its length over the whole width."""

    label: str
    value: str
    share: float
    kind: str


def render(report: AttackReport, *, picture: bytes | None = None) -> str:
    """Returns the whole page as text; everything that comes from outside is escaped.

    Args:
        picture: the recovered images, PNG.
    """
    filters = {"number": number, "percent": percent, "upward": upward, "delta": delta}
    page = template(Path(__file__).with_name("attack.html"), filters=filters)
    return page.render(
        report=report,
        audit=report.audit,
        bars=list(bars(report.audit)),
        picture=None if picture is None else base64.b64encode(picture).decode("ascii"),
    )


def bars(audit: Audit) -> Iterator[Bar]:
    """Yields the ledger's upper bound and under it the lower bounds, on one scale."""
    most = max(audit.ledger_epsilon, *(finding.lower_bound for finding in audit.findings))
    yield Bar(
        label="The ledger says: at most",
        value=upward(audit.ledger_epsilon),
        share=audit.ledger_epsilon / most,
        kind="upper",
    )
    for finding in audit.findings:
        is_broken = finding.lower_bound > audit.ledger_epsilon
        yield Bar(
            label=f"Proved from the {finding.seen}: at least",
            value=number(finding.lower_bound, 2),
            share=finding.lower_bound / most,
            kind="broken" if is_broken else "lower",
        )
