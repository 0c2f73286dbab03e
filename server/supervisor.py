"""Starts the coordinator's three processes, starts them anew when they die, and ends them with itself.

SuperLink, SuperExec and gateway are separate processes: only then does a run survive the loss of one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from filelock import FileLock, Timeout

from common.errors import DeploymentError, UserError
from server import enrolment
from server.home import LOOPBACK, Home

logger = logging.getLogger("feverfew.supervisor")

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.2
MIN_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 30.0
HEALTHY_SECONDS: Final = 60.0
"""After so long a life the pause before a restart is short again; it doubles with each death before that."""
TASK_POLL_SECONDS: Final = 0.25
RUN_DIRECTORY: Final = "FEVERFEW_RUN_DIRECTORY"
HEADS_DIRECTORY: Final = "FEVERFEW_HEADS_DIRECTORY"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process of the coordinator; ``is_ready`` asks it whether it works."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process for certain: ids are used again, an id with its time of start is not."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Returns the identity of a running process, or None if there is none (or only its remains)."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] == "Z" else cls(pid=pid, started=int(fields[19]))

    @classmethod
    def read(cls, path: Path) -> Identity | None:
        """Returns the process that a pid file names if it still runs."""
        try:
            noted = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return noted if cls.of(noted.pid) == noted else None

    def write(self, path: Path) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"pid": self.pid, "started": self.started}))
        os.replace(fresh, path)


def pid_file(home: Home, name: str) -> Path:
    """Where a process of the coordinator is noted."""
    return home.state / f"{name}.pid"


def services(home: Home) -> tuple[Service, ...]:
    """Returns the coordinator's processes in the order in which they start."""
    binaries = Path(sys.executable).parent
    tls = str(home.authority_certificate)
    superlink = (
        *(str(binaries / "flower-superlink"), "--host", LOOPBACK),
        *("--port", str(home.settings.internal_port), "--ssl-ca-certfile", tls),
        *("--ssl-certfile", str(home.server_certificate), "--ssl-keyfile", str(home.server_key)),
        *("--enable-supernode-auth", "--isolation", "process"),
        *("--superexec-auth-secret-file", str(home.superexec_secret)),
        *("--database", str(home.state / "superlink.db"), "--disable-runtime-dependency-installation"),
    )
    superexec = (
        *(str(binaries / "flower-superexec"), "--runtime-api-address", home.internal_address),
        *("--root-certificates", tls, "--superexec-auth-secret-file", str(home.superexec_secret)),
    )
    gateway = (sys.executable, "-m", "server.gateway", str(home.directory))
    public = f"https://{LOOPBACK if home.settings.bind == '0.0.0.0' else home.settings.bind}"
    return (
        Service(
            name="superlink",
            command=superlink,
            is_ready=lambda: _status(home, f"https://{home.internal_address}/health") == 200,
        ),
        Service(name="superexec", command=superexec, is_ready=lambda: True),
        Service(
            name="gateway",
            command=gateway,
            is_ready=lambda: _status(home, f"{public}:{home.settings.port}/") == 403,
        ),
    )


def environment(home: Home) -> dict[str, str]:
    """Returns the environment of the coordinator's processes: nothing is asked of the internet."""
    return os.environ | {
        # Flower finds its own programs through PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home.state / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_SECONDS),
        "NO_PROXY": f"{LOOPBACK},localhost",
        RUN_DIRECTORY: str(home.runs / "{run}"),
        HEADS_DIRECTORY: str(home.heads),
    }


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
    """Runs the coordinator's processes in the foreground."""

    home: Home
    _supervised: list[Supervised] = field(default_factory=list)
    _stopping: bool = False

    def run(self, *, say: Callable[[str], None] = print) -> None:
        """Starts everything, watches it, ends it after SIGTERM or SIGINT.

        Raises:
            UserError: a supervisor runs for this directory already, or a key file is open to others.
            DeploymentError: a process does not become ready.
        """
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
        try:
            for service in services(self.home):
                end_leftover(self.home, service.name)
            for service in services(self.home):
                if self._stopping:
                    break
                self._supervised.append(self._start(service))
                self._wait_until_ready(self._supervised[-1])
                if self._stopping:
                    break
                if service.name == "superlink":
                    self._register()
                say(f"{service.name} is ready (pid {self._supervised[-1].process.pid})")
            else:
                say(f"coordinator is ready at {self.home.settings.host}:{self.home.settings.port}")
            while not self._stopping:
                self._look_after()
                time.sleep(LOOK_SECONDS)
        finally:
            self._end_all(say)
            pid_file(self.home, "supervisor").unlink(missing_ok=True)

    def _note_signal(self, *_: Any) -> None:
        self._stopping = True

    def _register(self) -> None:
        with self.home.control() as control:
            for name in enrolment.register_missing(self.home, control):
                logger.info("registered %s", name)

    def _start(self, service: Service) -> Supervised:
        workplace = self.home.state / "empty"  # Flower's programs import from their working directory
        workplace.mkdir(mode=0o700, exist_ok=True)
        with (self.home.logs / f"{service.name}.log").open("ab") as log:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=workplace,
                env=environment(self.home),
                start_new_session=True,  # Ctrl-C is for the supervisor, which ends them in order
            )
        identity = Identity.of(process.pid)
        if identity is not None:
            identity.write(pid_file(self.home, service.name))
        return Supervised(service=service, process=process, begun=time.monotonic())

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

    def _plan_restart(self, supervised: Supervised, *, code: int, now: float) -> None:
        lived = now - supervised.begun
        if lived > HEALTHY_SECONDS:
            supervised.backoff_seconds = MIN_BACKOFF_SECONDS
        supervised.due = now + supervised.backoff_seconds
        name, pause = supervised.service.name, supervised.backoff_seconds
        logger.warning("%s ended with code %d; starting it again in %.1f s", name, code, pause)
        supervised.backoff_seconds = min(2 * pause, MAX_BACKOFF_SECONDS)

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
        _end(identity)
    path.unlink(missing_ok=True)


def _end(identity: Identity) -> None:
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            # The group, of which it is the leader: SuperExec's ServerApps belong to it.
            os.killpg(identity.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if Identity.of(identity.pid) != identity:
                return
            time.sleep(0.05)


def _status(home: Home, url: str) -> int:
    try:
        return httpx.get(url, verify=home.tls, timeout=2.0, trust_env=False).status_code
    except httpx.HTTPError:
        return 0
