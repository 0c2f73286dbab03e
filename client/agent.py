"""The daemon of a site: fetches tasks from the coordinator, hands them to the worker, sends the replies.

It speaks Flower's Fleet API as Flower's own SuperNode does, but never fetches a bundle: the code that
runs is the code that is installed. It opens connections, and accepts none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from typing import Final, TypeVar

import httpx
from filelock import FileLock, Timeout
from flwr.app import Context, Error, Message, RecordDict

from client import log as log_lines
from client import rest, trail
from client.access import Access
from client.fleet import Fleet, Task, without_superseded
from client.patience import Outage, is_temporary, persist, reason
from client.presence import Presence
from client.process import forkserver
from client.site import Site
from client.vitals import Vitals
from client.worker import DEFAULT_APP, WORKER_DIED, Worker, shown_run
from common import flower, logline, monitor
from common.errors import UserError
from common.logline import Format
from common.trail import account

logger = logging.getLogger("feverfew.agent")
Answer = TypeVar("Answer")

MIN_PAUSE_SECONDS: Final = 0.1
MAX_PAUSE_SECONDS: Final = 2.0
PAUSE_FRACTION: Final = 0.05
"""A waiting site asks after 5 % of the time that it has waited: what it adds to a round is 5 % at most."""
CACHED_RUNS: Final = 8
ATTEMPTS: Final = 3
"""A task over which so many workers have died is answered with an error: it is the task that kills them."""
SUPERSEDED: Final = "superseded"
"""A task of an earlier round was waiting behind a later one and is not done any more."""
NOT_READABLE: Final = "unreadable"
"""A task's parts are not what they say they are."""
MAX_TASK_BYTES: Final = 2**31
"""Of one task in memory: half a billion parameters."""
DOWNLOAD_SECONDS: Final = 600.0
"""How long the parts of a task are waited for that the coordinator has begun to send."""


def pause_seconds(waited_seconds: float) -> float:
    """Returns how long to wait before asking again.

    >>> [pause_seconds(waited) for waited in (0, 10, 3600)]
    [0.1, 0.5, 2.0]
    """
    return min(MAX_PAUSE_SECONDS, max(MIN_PAUSE_SECONDS, PAUSE_FRACTION * waited_seconds))


@dataclass(kw_only=True)
class Agent:
    """One site's daemon.

    Attributes:
        site: the site it works for.
        fleet: the connection to the coordinator.
        worker: the process with the ClientApp.
        access: where a renewed key appears; None where none can.
    """

    site: Site
    fleet: InitVar[Fleet]
    worker: Worker
    access: InitVar[Access | None] = None
    vitals: Vitals = field(default_factory=Vitals)
    _configs: dict[int, dict[str, str]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _outage: Outage = field(default_factory=Outage)

    def __post_init__(self, fleet: Fleet, access: Access | None) -> None:
        self.presence = Presence(
            note=self.site.state / "node", fleet=fleet, access=access, vitals=self.vitals, stop=self._stop
        )

    @property
    def _fleet(self) -> Fleet:
        return self.presence.fleet

    def run(self) -> None:
        """Works until ``stop`` is called or a signal raises; survives every failure of the other side.

        Raises:
            UserError: another agent runs for this site.
            DeploymentError: the installed ClientApp cannot be loaded.
        """
        self.site.state.mkdir(mode=0o700, exist_ok=True)
        try:
            with FileLock(self.site.state / "agent.lock", timeout=0):
                self._run_alone()
        except Timeout:
            raise UserError(
                f"Expected no running agent for {self.site.directory}, found one; stop it first."
            ) from None

    def stop(self) -> None:
        """Ends ``run`` after the task at hand."""
        self._stop.set()

    def _run_alone(self) -> None:
        pid_file = self.site.state / "agent.pid"
        pid_file.write_text(f"{os.getpid()}\n")
        trail.record_if_possible(self.site, "started", by=account())
        flower.shorten_backoff()
        flower.bound_messages(MAX_TASK_BYTES, max_seconds=DOWNLOAD_SECONDS)
        heart = threading.Thread(target=self.presence.beat, name="heartbeat", daemon=True)
        end_monitor = self._monitor()
        try:
            self.worker.warm_up()
            self.presence.come()
            heart.start()
            self._work()
        finally:
            self._stop.set()
            self.worker.kill()
            self.presence.go()
            self._fleet.close()
            end_monitor()
            pid_file.unlink(missing_ok=True)
            trail.record_if_possible(self.site, "stopped")
            trail.sign(self.site)

    def _monitor(self) -> Callable[[], None]:
        port = self.site.settings.monitor_port
        if port is None:
            return lambda: None
        return monitor.serve(port, self.vitals.registry, is_ready=lambda: bool(self.presence.node_id))

    def _work(self) -> None:
        since = time.monotonic()
        while not self._stop.is_set():
            if why := self._rests():
                self._rest(why)
            if self.presence.is_lost:
                self.presence.come()
            tasks = self._waiting_tasks()
            for task in tasks:
                with logline.about(round=task.server_round):
                    self._do(task)
                since = time.monotonic()
            if not tasks:
                self.presence.change_key()
                self._stop.wait(pause_seconds(time.monotonic() - since))

    def _rests(self) -> str:
        return rest.reason(self.site.state, self.site.settings.hours, now=datetime.now())

    def _rest(self, why: str) -> None:
        """Is away for the coordinator, as long as there is a reason to rest."""
        logger.info("resting: %s", why)
        self.presence.go()
        self.vitals.resting.set(1)
        while self._rests() and not self._stop.wait(MAX_PAUSE_SECONDS):
            pass
        self.vitals.resting.set(0)
        self.presence.lose()

    def _waiting_tasks(self) -> list[Task]:
        """Fetches the heads of all tasks that wait; says no to those that a later round has overtaken."""
        tasks: list[Task] = []
        try:
            while (task := self._fleet.receive()) is not None:
                tasks.append(task)
            self._outage.end()
        except httpx.ConnectError as error:
            self._outage.note(error)
            self._stop.wait(MAX_PAUSE_SECONDS)  # nothing was sent, so nothing is lost
        except httpx.TransportError as error:
            logger.warning("an answer of the coordinator was lost (%s), a task perhaps", reason(error))
            self.presence.lose()
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 503:  # the gateway is there, the SuperLink is not
                self._stop.wait(MAX_PAUSE_SECONDS)
                return tasks
            logger.warning("the coordinator refuses this site: %s", flower.refusal_text(error))
            self.presence.lose()
        except flower.UNREADABLE as error:
            logger.warning("the coordinator sent something that is no task (%s)", reason(error))
            self._stop.wait(MAX_PAUSE_SECONDS)
        kept, superseded = without_superseded(tasks)
        for task in superseded:
            self._decline(task, SUPERSEDED)
        return kept

    def _count(self, kind: str, outcome: str) -> None:
        self.vitals.tasks.labels(kind, outcome).inc()
        self.vitals.last_task.set_to_current_time()

    def _decline(self, task: Task, why: str) -> None:
        self._count(task.head.metadata.message_type, why)
        error = Error(code=flower.ErrorCode.UNKNOWN, reason=why)
        trail.record_if_possible(self.site, "refused", code=why)
        try:
            self._persist(lambda: self._fleet.drop(task), seconds=task.head.metadata.ttl)
            self._send(Message(error, reply_to=task.head))
        except httpx.HTTPError:
            logger.info("a task that is not done (%s) was not answered: its run has ended", why)

    def _do(self, task: Task) -> None:
        begun = time.monotonic()
        meta = task.head.metadata
        try:
            config = self._config(task.run_id)
            message = self._persist(lambda: self._fleet.pull(task), seconds=meta.ttl)
        except (httpx.HTTPError, flower.ObjectPullError) as error:
            logger.warning("a task could not be fetched and is dropped: %s", reason(error))
            self._note_loss(error)
            return
        except flower.UNREADABLE as error:
            logger.warning("a task is not what it says it is, and is declined (%s)", reason(error))
            self._decline(task, NOT_READABLE)
            return
        context = Context(
            run_id=task.run_id,
            node_id=self.presence.node_id,
            node_config={"site": str(self.site.directory.resolve())},
            state=RecordDict(),
            run_config=dict(config),
        )
        reply = self._answer(message, context)
        outcome = f"error: {reply.error.reason}" if reply.has_error() else "answered"
        counted = "failed" if reply.has_error() else "answered"
        is_sent = self._send(reply)
        told = {"run": shown_run(config), "round": task.server_round, "message": meta.message_type}
        trail.record_if_possible(self.site, "sent" if is_sent else "not_sent", **told, outcome=outcome)
        if not is_sent:
            outcome, counted = f"{outcome}, but not delivered", "undelivered"
        self._count(meta.message_type, counted)
        seconds = time.monotonic() - begun
        told_as = (shown_run(config), task.server_round, meta.message_type, outcome, seconds)
        with logline.about(run=shown_run(config)):
            logger.info("run %s round %s %s: %s (%.1f s)", *told_as)

    def _answer(self, message: Message, context: Context) -> Message:
        """Returns the worker's reply; a worker that dies over a task is replaced, and the task begun again.

        What the task was charged stays charged once: it is the same task (privacy rule 3).
        """
        end = time.monotonic() + message.metadata.ttl
        for attempt in range(1, ATTEMPTS + 1):
            left = max(0.0, end - time.monotonic())
            reply = self.worker.call(message, context, timeout_seconds=left)
            if not (reply.has_error() and reply.error.reason == WORKER_DIED) or attempt == ATTEMPTS:
                break
            logger.warning("the worker died over a task; beginning it again")
            self.vitals.worker_deaths.inc()
            trail.record(self.site, "worker_restarted", run=shown_run(context.run_config), attempt=attempt)
        return reply

    def _send(self, reply: Message) -> bool:
        try:
            self._persist(lambda: self._fleet.push(reply), seconds=reply.metadata.ttl)
        except (httpx.HTTPError, flower.ObjectPushError) as error:
            logger.warning("a reply was not delivered: %s", reason(error))
            self._note_loss(error)
            return False
        return True

    def _note_loss(self, error: Exception) -> None:
        """Comes again after what the coordinator could not answer, so that it learns what was lost.

        A task of which not all parts came is lost as well, for the SuperLink takes it for delivered.
        """
        is_cut = isinstance(error, flower.ObjectPullError)
        if is_cut or (isinstance(error, httpx.HTTPError) and is_temporary(error)):
            self.presence.lose()

    def _config(self, run_id: int) -> dict[str, str]:
        """Returns the plan and our id of a run; other settings of the run are not looked at."""
        if run_id not in self._configs:
            found = self._persist(lambda: self._fleet.run_config(run_id))
            self._configs[run_id] = {key: str(found[key]) for key in ("plan", "run") if key in found}
            while len(self._configs) > CACHED_RUNS:
                del self._configs[next(iter(self._configs))]
        return self._configs[run_id]

    def _persist(self, request: Callable[[], Answer], *, seconds: float = float("inf")) -> Answer:
        return persist(request, stop=self._stop, seconds=seconds)


def open_agent(site: Site, *, app: str = DEFAULT_APP, log_format: Format = "text") -> Agent:
    """Returns the agent of a site, with its key, its coordinator and a worker for the ClientApp.

    Raises:
        UserError: the site has no coordinator yet, its certificate has expired, its key is missing or open
            to others, or its proxy cannot be used.
    """
    access = Access(site.directory, proxy=site.settings.proxy)
    log = site.state.resolve() / "agent.log"
    gigabytes = site.settings.max_memory_gigabytes
    worker = Worker(
        app,
        context=forkserver(),
        threads=site.settings.threads,
        memory_bytes=None if gigabytes is None else int(gigabytes * 1e9),
        log=log,
        formatter=log_lines.formatter(log_format, "worker", site=site.name),
    )
    return Agent(site=site, fleet=access.fleet(), worker=worker, access=access)
