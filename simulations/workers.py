"""The worker processes of this machine: they stay from run to run of a sweep, with the cohorts that they
have open and the networks that they have built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from client.process import forkserver
from client.worker import Worker


class Workers:
    """Processes that are started when first needed, and ended with this value.

    Args:
        log: where they write what went wrong; None is standard error.
        threads: torch threads of each; results depend on their number.
    """

    def __init__(self, *, log: Path | None, threads: int = 1) -> None:
        self._context = forkserver()
        self._log = log
        self._threads = threads
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, count: int) -> Sequence[Worker]:
        """Returns so many idle workers, those that were there before first; one run has them at a time."""
        for worker in self._workers:
            if worker.is_busy:  # a run that ended early did not wait for it
                worker.kill()
                worker.finish()
        while len(self._workers) < count:
            self._workers.append(Worker(context=self._context, threads=self._threads, log=self._log))
        return self._workers[:count]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []
