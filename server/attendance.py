"""What became of the tasks of every site, counted while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from common.trail import Trail
from server.checkpoint import Attendance
from server.mailbox import Bytes, Mailbox
from server.revoked import REVOKED
from server.roster import Roster


class Attendances:
    """The attendance of every site that was asked; what somebody may want to know goes to the trail as well.

    Args:
        known: by site, what the run has counted before it was interrupted.
        revoked: returns the names of the sites that are let in no more.
    """

    def __init__(
        self,
        known: Mapping[str, Attendance],
        *,
        mailbox: Mailbox,
        roster: Roster,
        trail: Trail,
        revoked: Callable[[], frozenset[str]],
    ) -> None:
        self._found = dict(known)
        self._mailbox = mailbox
        self._roster = roster
        self._trail = trail
        self._revoked = revoked

    @property
    def by_site(self) -> dict[str, Attendance]:
        """What was counted so far; it does not change when more is."""
        return dict(self._found)

    def note_update(self, name: str, *, server_round: int) -> None:
        """Counts a valid reply to a task to train, or to measure landmarks."""
        seen = self._of(name)
        self._note(name, valid=seen.valid + 1, training_tasks=seen.training_tasks + 1)
        self._trail.record("reply", round=server_round, site=name)

    def note_scores(self, name: str, *, server_round: int, part: str) -> None:
        """Counts a valid reply to a task to evaluate."""
        self._note(name, evaluations=(*self._of(name).evaluations, part))
        self._trail.record("scores", round=server_round, part=part, site=name)

    def note_problem(self, name: str, code: str, *, server_round: int) -> None:
        """Counts a reply that is missing or rejected; that of a site that was revoked is called so."""
        if code == "missing" and name in self._revoked():
            code = REVOKED
        self._found[name] = self._of(name).with_problem(code)
        self._trail.record("reply_rejected", round=server_round, site=name, code=code)

    def count_away(self, *, server_round: int) -> None:
        """Counts the tasks that were sent again since the last call because their site had gone."""
        for node in self._mailbox.lost():
            name = self._roster.name(node)
            self._note(name, away=self._of(name).away + 1)
            self._trail.record("site_away", site=name, round=server_round)

    def count_late(self) -> None:
        """Counts the replies that came since the last call, after their deadline."""
        for late in self._mailbox.late():
            name = self._roster.name(late.node)
            self._note(name, late=self._of(name).late + 1)
            self._trail.record("reply_late", site=name, round=late.group)

    def count_bytes(self) -> Bytes:
        """Adds to each site's bytes what has crossed the network since the last call; returns the sum."""
        total = Bytes()
        for node, found in self._mailbox.bytes().items():
            name = self._roster.name(node)
            seen = self._of(name)
            self._note(name, bytes_down=seen.bytes_down + found.down, bytes_up=seen.bytes_up + found.up)
            total = Bytes(down=total.down + found.down, up=total.up + found.up)
        return total

    def reasons(self) -> str:
        """Returns in words why sites took no part, or why their replies were not used."""
        told = [f"{name}: {', '.join(seen.problems)}" for name, seen in self._found.items() if seen.problems]
        told += [f"{name}: {site.reason}" for name, site in self._roster.sites.items() if site.reason]
        return "; ".join(told) or "no site took part"

    def _of(self, name: str) -> Attendance:
        return self._found.get(name, Attendance())

    def _note(self, name: str, **changes: Any) -> None:
        self._found[name] = replace(self._of(name), **changes)
