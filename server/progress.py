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
                self._bars.update(self._rounds, completed=done, description=_summary(more))
            case {"event": "round_started", "round": int(number)}:
                self._bars.update(self._rounds, description=f"round {number} is under way")
            case {"event": "run_finished"}:
                self._bars.update(self._rounds, description="finished")
            case {"event": "run_failed", **more}:
                self._bars.update(self._rounds, description="failed")
                self._bars.console.print(f"failed: {more.get('reason', 'see the events')}", markup=False)
            case {"event": "reply", "site": site, "reason": str(reason)} if reason:
                self._bars.console.print(f"{site}: {reason}", markup=False)


def _summary(fields: dict[str, Any]) -> str:
    parts = []
    if "sites_valid" in fields:
        parts.append(f"{fields['sites_valid']} of {fields.get('sites_asked', '?')} sites")
    for key, name in (("train_loss", "loss"), ("auroc", "AUROC")):
        if isinstance(fields.get(key), float):
            parts.append(f"{name} {fields[key]:.3f}")
    return ", ".join(parts)
