"""Follows a run while it goes on: the coordinator's events and the sites' own progress files."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.trail import parse
from server.progress import Progress

_LOOK_SECONDS = 0.2


class Watch:
    """A thread that feeds a progress bar from files; it changes nothing of the run.

    Args:
        events: the trail of the run.
        sites: directories by name; only those that are asked in a round are looked at.
    """

    def __init__(self, progress: Progress, *, events: Path, sites: Mapping[str, Path]) -> None:
        self._progress = progress
        self._events = events
        self._sites = sites
        self._asked: list[Path] = []
        self._offset = events.stat().st_size if events.exists() else 0
        self._round = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._progress.__exit__(kind, error, trace)

    def _follow(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        for event in self._new_events():
            if event["event"] == "round_started":
                self._round = int(event["round"])
                self._asked = [self._sites[name] for name in event.get("asked", ()) if name in self._sites]
            self._progress.show(event)
        self._progress.show_steps(*self._steps())

    def _new_events(self) -> list[dict[str, Any]]:
        if not self._events.exists():
            return []
        with open(self._events, "rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        return [event for line in whole.splitlines() if (event := parse(line)) is not None]

    def _steps(self) -> tuple[int, int]:
        """Returns steps done and to do in the present round, over the sites that have begun it."""
        done = total = 0
        for site in self._asked:
            try:
                told = json.loads((site / "state" / "progress.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):  # not begun, or being written
                continue
            if told["round"] == self._round:
                done, total = done + told["step"], total + told["steps"]
        return done, total
