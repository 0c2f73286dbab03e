"""LocalGrid: Flower's Grid over a pool of worker processes; and Flower's own runtime on Ray."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from client.site import Site
from client.worker import Taken, Worker
from common import flower
from common.plan import Plan
from server.app import app as server_app
from simulations.workers import Workers

RUN_ID = 1
_LOOK_SECONDS = 0.5
_MOST_DEATHS = 3
"""Workers that a task may cost, one that needs too much memory above all; then its site has failed."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A site on the grid; Flower's NodeInfo has these names."""

    node_id: int
    name: str


class LocalGrid(Grid):  # type: ignore[misc]
    """The sites of this machine, behind the interface that a deployed ServerApp sees.

    A task goes to the worker that had its site before, which has the cohort open; an idle worker takes
    what another has waiting. Results do not depend on which worker does a task. A task whose worker died is
    done again by a new one: the site knows it by its identity, and charges nothing twice.

    Args:
        sites: names and directories of the sites.
        run_config: what ``flwr run`` would pass on: ``plan`` and ``run``.
        workers: idle ones; they are not ended here.
        is_durable: whether what a site writes waits for the disk.
    """

    def __init__(
        self,
        sites: Sequence[tuple[str, Path]],
        *,
        run_config: dict[str, str],
        workers: Sequence[Worker],
        is_durable: bool = True,
    ) -> None:
        flower.set_identity(RUN_ID, node_id=1)
        self._nodes = {number: Node(node_id=number, name=name) for number, (name, _) in enumerate(sites, 2)}
        self._contexts = {
            number: Context(
                run_id=RUN_ID,
                node_id=number,
                node_config={"site": str(path), "durable": is_durable},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number, (_, path) in enumerate(sites, 2)
        }
        self._workers = workers
        self._homes: dict[int, int] = {}
        self._queues: list[deque[Message]] = [deque() for _ in self._workers]
        self._doing: list[Message | None] = [None] * len(workers)
        self._deaths: Counter[str] = Counter()
        self._replies: dict[str, Taken] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set: a LocalGrid belongs to one run."""

    @property
    def run(self) -> Any:
        """None: Flower's record of a run exists where a SuperLink does."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refused: deprecated in Flower; construct ``Message`` instead."""
        raise NotImplementedError("construct flwr.app.Message instead")

    def get_node_ids(self) -> Iterable[int]:
        """Returns the node ids of all sites."""
        return list(self._nodes)

    def get_nodes(self) -> Iterable[Any]:
        """Returns id and name of every site."""
        return list(self._nodes.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages and starts what can be started; returns their ids."""
        ids = []
        with flower.no_object_id_recompute():  # the tasks of a round have one content
            for message in messages:
                ids.append(flower.assign_id(message))
                self._queues[self._home(message.metadata.dst_node_id)].append(message)
        self._start_idle()
        return ids

    def arrived(self, message_ids: Iterable[str], *, seconds: float) -> list[str]:
        """Returns which of these messages have a reply; waits at most so long for a first one."""
        wanted = set(message_ids)
        self._collect(seconds if wanted.isdisjoint(self._replies) else 0.0)
        return [message_id for message_id in self._replies if message_id in wanted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that are there."""
        wanted = list(message_ids)
        if not self._replies.keys() >= set(wanted):
            self._collect(0.0)
        return [self._replies.pop(message_id).reply for message_id in wanted if message_id in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pushes messages and yields replies until all are there or the time is over."""
        pending = set(self.push_messages(messages))
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while pending and time.monotonic() < end:
            for message_id in self.arrived(pending, seconds=_LOOK_SECONDS):
                pending.discard(message_id)
                yield from self.pull_messages([message_id])

    def _home(self, node: int) -> int:
        """Returns the worker of a site: the sites go to the workers in turn, as they are first asked."""
        return self._homes.setdefault(node, len(self._homes) % len(self._workers))

    def _start_idle(self) -> None:
        for number, worker in enumerate(self._workers):
            if self._doing[number] is None:
                message = self._next(number)
                if message is not None:
                    self._doing[number] = message
                    worker.start(message, self._contexts[message.metadata.dst_node_id])

    def _next(self, number: int) -> Message | None:
        """The worker's own next message, or the last of the longest queue of another."""
        if self._queues[number]:
            return self._queues[number].popleft()
        longest = max(self._queues, key=len)
        return longest.pop() if longest else None

    def _collect(self, seconds: float) -> None:
        busy = {thing: number for number in self._busy() for thing in self._workers[number].waitables}
        ready = {busy[thing] for thing in wait(list(busy), timeout=seconds)}
        for number in sorted(ready):
            message = self._doing[number]
            assert message is not None
            taken, self._doing[number] = self._workers[number].taken(), None
            message_id = message.metadata.message_id
            self._deaths[message_id] += taken.has_died
            if taken.has_died and self._deaths[message_id] < _MOST_DEATHS:
                self._queues[number].appendleft(message)
            else:
                self._replies[message_id] = taken  # unpacked when it is pulled, since the worker waits
        if ready:
            self._start_idle()

    def _busy(self) -> list[int]:
        return [number for number, message in enumerate(self._doing) if message is not None]


def run(
    plan: Plan,
    sites: Sequence[Site],
    *,
    run: str,
    name: str,
    workers: int | None,
    directory: Path,
    pool: Workers | None = None,
    is_durable: bool = True,
) -> None:
    """Runs a plan over sites with the unchanged apps.

    Args:
        run: our id of the run.
        name: ``local`` or ``flower``.
        workers: processes; None for one per processor core.
        directory: the run directory.
        pool: processes that stay for other runs; None: of this run alone, their log in ``directory``.
        is_durable: whether what a site writes waits for the disk.

    Raises:
        RunError: the run stopped early.
    """
    count = workers or len(os.sched_getaffinity(0))
    run_config = {"plan": plan.to_json(), "run": run}
    if name == "flower":
        from simulations.runtime import run_on_ray  # Flower's own runtime takes seconds to import

        run_on_ray(sites, run_config=run_config, workers=count, directory=directory, is_durable=is_durable)
        return
    with nullcontext(pool) if pool is not None else Workers(log=directory / "sites.log") as processes:
        grid = LocalGrid(
            [(site.name, site.directory) for site in sites],
            run_config=run_config,
            workers=processes.take(max(1, min(count, len(sites)))),
            is_durable=is_durable,
        )
        context = Context(
            run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
        )
        server_app(grid, context)
