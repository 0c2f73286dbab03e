"""What a coordinator's processes, sites and runs are doing."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass

import httpx

from common import certificates
from common.errors import UserError
from server import checkpoint, enrolment, renewal
from server.control import Node
from server.home import Home
from server.process import Identity
from server.run_record import SUBMISSION, RunRecord
from server.services import pid_file

logger = logging.getLogger("feverfew.supervisor")

PROCESSES = ("supervisor", "superlink", "superexec", "gateway")
ANNOUNCE_SECONDS = 86400.0
OFFLINE = "offline"
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run: ``waiting`` for its start, ``running``, ``lost`` and soon started again, or how it ended."""

    run: str
    status: str
    server_round: int
    details: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """Processes by name with their pid (None: not running), sites by name, runs.

    ``expiring``: the days that certificates have left which end soon, by name of the site or ``gateway``.
    """

    processes: dict[str, int | None]
    sites: dict[str, str]
    expiring: dict[str, int]
    runs: list[RunLine]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """Returns one line for each process, site and run."""
        lines = [
            f"process  {name:<12} {'not running' if pid is None else f'running (pid {pid})'}"
            for name, pid in self.processes.items()
        ]
        lines += [f"site     {name:<12} {state}" for name, state in self.sites.items()]
        lines += [f"expiry   {name:<12} {_expiry(days)}" for name, days in self.expiring.items()]
        lines += [
            f"run      {line.run:<12} {line.status} after round {line.server_round} {line.details}".rstrip()
            for line in self.runs
        ]
        return "\n".join(lines)


def status(home: Home) -> Status:
    """Asks the coordinator's processes, or what they have left when they do not run."""
    processes = {name: Identity.read(pid_file(home, name)) for name in PROCESSES}
    nodes = _ask(home)
    return Status(
        processes={name: None if found is None else found.pid for name, found in processes.items()},
        sites=_sites(home, nodes),
        expiring=expiring(home),
        runs=[
            _run_line(RunRecord(directory=path.parent)) for path in sorted(home.runs.glob(f"*/{SUBMISSION}"))
        ],
    )


def _ask(home: Home) -> list[Node] | None:
    try:
        with home.control() as control:
            return control.nodes()
    except httpx.HTTPError:
        return None  # not running, which the processes tell


def _sites(home: Home, nodes: list[Node] | None) -> dict[str, str]:
    names = [site.name for site in enrolment.enrolled(home)]
    if nodes is None:
        return dict.fromkeys(names, UNKNOWN)
    # Flower's "registered" means that the site has never been there.
    online = {node.public_key for node in nodes if node.status == "online"}
    present = {site.name for site in enrolment.enrolled(home) if site.pem in online}
    return {name: "online" if name in present else OFFLINE for name in names}


def expiring(home: Home) -> dict[str, int]:
    """Returns the days that certificates have left which end within 30 days, by site, or ``gateway``."""
    own = renewal.current(home)
    ends = {site.name: site.certificate for site in enrolment.newest(home)} | {"gateway": own}
    days = {name: math.floor(certificates.days_left(certificate)) for name, certificate in ends.items()}
    return {name: left for name, left in days.items() if left < certificates.NOTICE_DAYS}


class ExpiryLog:
    """Says in the log, once a day, which certificates end soon."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._due = 0.0

    def announce(self) -> None:
        """Writes a line for each, if it is time."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + ANNOUNCE_SECONDS
        remedy = {"gateway": f"; feverfew-server renew {self._home.directory}"}
        try:
            for name, days in expiring(self._home).items():
                logger.warning("%s: %s%s", name, _expiry(days), remedy.get(name, ""))
        except (OSError, UserError) as error:  # a damaged certificate of one site must not end all
            logger.error("%s", error)


def _expiry(days: int) -> str:
    return f"its certificate expires in {days} days" if days >= 0 else "its certificate has expired"


def _run_line(record: RunRecord) -> RunLine:
    end = record.end
    return RunLine(
        run=record.run,
        status=_going(record) if end is None else end.status,
        server_round=checkpoint.newest_round(record.directory / "checkpoints"),
        details="" if end is None else end.message,
    )


def _going(record: RunRecord) -> str:
    """Returns the state of a run that has not ended."""
    life = record.life
    if life is None:
        return "waiting"
    return "lost" if life.is_over else "running"
