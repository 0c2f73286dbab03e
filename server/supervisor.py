"""Starts the coordinator's three processes, starts them anew when they die, and ends them with itself."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import httpx
from filelock import FileLock, Timeout

from common import logline, monitor
from common.errors import DeploymentError, UserError
from common.logline import Format
from server import enrolment, flower_state, process, renewal, trail
from server.dispatch import Dispatch, watch
from server.home import Home
from server.process import Identity
from server.run_record import open_runs
from server.services import Service, environment, pid_file, services
from server.status import ExpiryLog
from server.vitals import Vitals

logger = logging.getLogger("feverfew.supervisor")

START_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.2
MIN_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 30.0
HEALTHY_SECONDS: Final = 60.0
"""After so long a life the pause before a restart is short again; it doubles with each death before that."""
KEYS_SECONDS: Final = 30.0
"""How often it is looked, while a site changes its key, whether the former one can be retired."""


@dataclass(kw_only=True)
class Supervised:
    """A service with its running process and its history."""

    service: Service
    process: subprocess.Popen[bytes]
    begun: float
    backoff_seconds: float = MIN_BACKOFF_SECONDS
    due: float | None = None


@dataclass(kw_only=True)
class Supervisor:
    """Runs the coordinator's processes in the foreground. ``log_format``: of its lines, and of theirs."""

    home: Home
    log_format: Format = "text"
    _dispatch: Dispatch = field(init=False)
    _vitals: Vitals = field(init=False)
    _watch: renewal.Watch = field(init=False)
    _expiry: ExpiryLog = field(init=False)
    _supervised: list[Supervised] = field(default_factory=list)
    _stopping: bool = False
    _looked_at_keys: float = 0.0

    def __post_init__(self) -> None:
        self._dispatch = Dispatch(home=self.home)
        self._watch, self._expiry = renewal.Watch(self.home), ExpiryLog(self.home)
        self._vitals = Vitals(self.home)

    def run(self, *, say: Callable[[str], None] = print) -> None:
        """Starts everything, watches it, ends it after SIGTERM or SIGINT.

        Raises:
            UserError: a supervisor runs for this directory already, a key file is open to others, or the
                server certificate has expired.
            DeploymentError: a process does not become ready.
        """
        renewal.require_valid(self.home)
        self.home.check_secrets()
        try:
            with FileLock(self.home.state / "supervisor.lock", timeout=0):
                self._run_alone(say)
        except Timeout:
            raise UserError(
                f"Expected no running coordinator in {self.home.directory}, found one; stop it first."
            ) from None

    def _run_alone(self, say: Callable[[str], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        identity = Identity.of(os.getpid())
        assert identity is not None
        identity.write(pid_file(self.home, "supervisor"))
        trail.record_if_possible(self.home, "started")
        try:
            self._end_leftovers()
            for service in services(self.home):
                if self._stopping:
                    break
                self._supervised.append(self._start(service))
                self._wait_until_ready(self._supervised[-1])
                if self._stopping:
                    break
                if service.name == "superlink":
                    self._settle()
                say(f"{service.name} is ready (pid {self._supervised[-1].process.pid})")
            else:
                say(f"coordinator is ready at {self.home.settings.host}:{self.home.settings.port}")
            end_dispatch, end_monitor = watch(self._dispatch, threading.Event()), self._monitor()
            while not self._stopping:
                self._look_after()
                self._take_up_certificate()
                self._expiry.announce()
                self._retire_keys()
                time.sleep(LOOK_SECONDS)
            end_monitor()
            end_dispatch()
        finally:
            self._end_all(say)
            pid_file(self.home, "supervisor").unlink(missing_ok=True)
            trail.record_if_possible(self.home, "stopped")
            trail.sign(self.home)

    def _monitor(self) -> Callable[[], None]:
        port = self.home.settings.monitor_port
        if port is None:
            return lambda: None
        return monitor.serve(port, self._vitals.registry, is_ready=self._is_ready)

    def _is_ready(self) -> bool:
        return all(one.due is None and one.service.is_ready() for one in self._supervised)

    def _note_signal(self, *_: Any) -> None:
        self._stopping = True

    def _settle(self) -> None:
        with self.home.control() as control:
            for done in enrolment.settle(self.home, control):
                logger.info("%s", done)

    def _retire_keys(self) -> None:
        """Now and then, while a site has two keys, looks whether the former one is needed no more."""
        now = time.monotonic()
        if now - self._looked_at_keys < KEYS_SECONDS:
            return
        self._looked_at_keys = now
        if enrolment.is_renewing(self.home):
            with contextlib.suppress(httpx.HTTPError):
                self._settle()

    def _take_up_certificate(self) -> None:
        """Starts the processes again that use the server certificate, when it was renewed.

        Runs and sites wait meanwhile, as when such a process dies; nothing of it is a loss.
        """
        if not self._watch.has_changed():
            return
        trail.record_if_possible(self.home, "certificate_taken_up")
        for place, supervised in enumerate(self._supervised):
            name = supervised.service.name
            if name in renewal.USERS and supervised.due is None:
                end_leftover(self.home, name)
                supervised.process.wait()
                self._supervised[place] = self._start(supervised.service)
                logger.info("%s was started again with the new server certificate", name)

    def _start(self, service: Service) -> Supervised:
        if service.name == "superlink":
            self._look_at_state()
        if service.name in renewal.USERS:
            renewal.current(self.home)  # completes one that was cut off
        workplace = self.home.state / "empty"  # Flower's programs import from their working directory
        workplace.mkdir(mode=0o700, exist_ok=True)
        log = self._log_of(service)
        try:
            child = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=workplace,
                env=environment(self.home, log_format=self.log_format),
                start_new_session=True,  # Ctrl-C is for the supervisor, which ends them in order
            )
        finally:
            os.close(log)
        identity = Identity.of(child.pid)
        if identity is not None:
            identity.write(pid_file(self.home, service.name))
        return Supervised(service=service, process=child, begun=time.monotonic())

    def _log_of(self, service: Service) -> int:
        """Returns where a process writes to: its log, through a thread of ours where that is JSON."""
        path = self.home.logs / f"{service.name}.log"
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if self.log_format == "json":
            return logline.funnel(log, partial(logline.wrapped, process=service.name))[0]
        return log

    def _look_at_state(self) -> None:
        aside = flower_state.set_aside_if_damaged(self.home.state / "superlink.db")
        if aside is not None:
            logger.error(
                "Expected a whole data base of the SuperLink, found a damaged one, which is %s now; sites "
                "and open runs are made known to a new one.",
                aside,
            )

    def _wait_until_ready(self, supervised: Supervised) -> None:
        service = supervised.service
        deadline = time.monotonic() + START_SECONDS
        while not self._stopping:
            code = supervised.process.poll()
            if code is not None or time.monotonic() > deadline:
                found = "nothing after 60 s" if code is None else f"that it ended with code {code}"
                raise DeploymentError(
                    f"Expected {service.name} to become ready, found {found}; "
                    f"see {self.home.logs / (service.name + '.log')}"
                )
            if service.is_ready():
                return
            time.sleep(LOOK_SECONDS)

    def _look_after(self) -> None:
        """Starts anew what has died, after a pause that grows while it keeps dying."""
        now = time.monotonic()
        for place, supervised in enumerate(self._supervised):
            if supervised.due is None and _has_ended(supervised.process):
                _end_orphans(supervised.process)
            code = supervised.process.poll()
            if code is None:
                continue
            if supervised.due is None:
                self._plan_restart(supervised, code=code, now=now)
            elif now >= supervised.due:
                fresh = self._start(supervised.service)
                fresh.backoff_seconds = supervised.backoff_seconds
                self._supervised[place] = fresh
                logger.warning("%s was started again (pid %d)", supervised.service.name, fresh.process.pid)
                self._dispatch.restarted(supervised.service.name)
                self._vitals.restarts.labels(supervised.service.name).inc()

    def _plan_restart(self, supervised: Supervised, *, code: int, now: float) -> None:
        lived = now - supervised.begun
        if lived > HEALTHY_SECONDS:
            supervised.backoff_seconds = MIN_BACKOFF_SECONDS
        supervised.due = now + supervised.backoff_seconds
        name, pause = supervised.service.name, supervised.backoff_seconds
        logger.warning("%s ended with code %d; starting it again in %.1f s", name, code, pause)
        supervised.backoff_seconds = min(2 * pause, MAX_BACKOFF_SECONDS)

    def _end_leftovers(self) -> None:
        """Ends what a supervisor that was killed has left, the ServerApps of its runs too."""
        for service in services(self.home):
            end_leftover(self.home, service.name)
        for record, _ in open_runs(self.home.runs):
            life = record.life
            if life is not None and not life.is_over:
                process.end(life.identity)

    def _end_all(self, say: Callable[[str], None]) -> None:
        for supervised in reversed(self._supervised):
            end_leftover(self.home, supervised.service.name)
            supervised.process.wait()
            say(f"{supervised.service.name} has ended")


def end_leftover(home: Home, name: str) -> None:
    """Ends the process group that a pid file names, if it still runs, and removes the pid file."""
    path = pid_file(home, name)
    identity = Identity.read(path)
    if identity is not None:
        process.end_group(identity)
    path.unlink(missing_ok=True)


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Says whether a child has ended, and leaves it unreaped, so that its id is not used again yet."""
    if child.returncode is not None:
        return True
    found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


def _end_orphans(child: subprocess.Popen[bytes]) -> None:
    """Ends what a child that died has left: a ServerApp cannot go on without its SuperExec."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
