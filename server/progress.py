"""What a coordinator sees of a run while it goes on: a bar over its rounds."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """A progress bar on standard error that is fed with the events of a run."""

    def __init__(self, *, num_rounds: int, console: Console | None = None) -> None:
        self._bars = Bars(
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console or Console(stderr=True),
        )
        self._rounds = self._bars.add_task("waiting for sites", total=num_rounds)
        self._steps: Any = None
        self._asked: object = "?"

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show_steps(self, done: int, total: int) -> None:
        """Shows how far the sites are inside the round, where their files can be read."""
        if self._steps is None and total:
            self._steps = self._bars.add_task("steps of this round", total=total)
        if self._steps is not None:
            self._bars.update(self._steps, completed=done, total=total or None)

    def show(self, event: dict[str, Any]) -> None:
        """Takes an event: the bar moves with rounds, failures stay above it as lines of their own."""
        match event:
            case {"event": "round_finished", "round": int(done), **more}:
                self._bars.update(self._rounds, completed=done, description=self._summary(more))
            case {"event": "round_started", "round": int(number), **more}:
                self._asked = more.get("sites", "?")
                self._bars.update(self._rounds, description=f"round {number} is under way")
            case {"event": "run_finished"}:
                self._bars.update(self._rounds, description="finished")
            case {"event": "run_failed", "status": str(status)}:
                self._bars.update(self._rounds, description=status.replace("_", " "))
            case {"event": "site_prepared", "site": site, "status": "waiting"}:
                self._tell(f"{site} has not approved the plan yet")
            case {"event": "approval_awaited", "seconds": float(seconds)} if seconds > 0:
                self._bars.update(self._rounds, description=f"waiting {seconds:.0f} s at most for approval")
            case {"event": "site_prepared", "site": site, "status": str(status), "reason": reason}:
                if status != "approved":
                    self._tell(f"{site} does not take part: {status} {reason}")
            case {"event": "site_rejected", "site": site, "code": code}:
                self._tell(f"{site} does not take part: {code}")
            case {"event": "reply_rejected", "site": site, "code": code, "round": number}:
                self._tell(f"round {number}: no valid reply of {site}: {code}")
            case {"event": "reply_late", "site": site, "round": number}:
                self._tell(f"round {number}: {site} was too late")
            case {"event": "restarted", "process": process}:
                self._tell(f"the coordinator's {process} was lost and is started again")
            case {"event": "quorum_not_reached", "message": message}:
                self._tell(str(message))

    def _tell(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False)

    def _summary(self, fields: dict[str, Any]) -> str:
        parts = []
        if "sites_valid" in fields:
            parts.append(f"{fields['sites_valid']} of {self._asked} sites")
        for key, name in (("train_loss", "loss"), ("auroc", "AUROC"), ("dice", "Dice")):
            if isinstance(fields.get(key), float):
                parts.append(f"{name} {fields[key]:.3f}")
        return ", ".join(parts)
