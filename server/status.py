"""What a coordinator's processes, sites and runs are doing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import httpx

from server import enrolment
from server.control import FlowerRun, Node
from server.home import Home
from server.supervisor import Identity, pid_file

PROCESSES = ("supervisor", "superlink", "superexec", "gateway")
OFFLINE = "offline"
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run under our id, with Flower's word for how it goes."""

    run: str
    flower_run: int
    status: str
    details: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """Processes by name with their pid (None: not running), sites by name, runs."""

    processes: dict[str, int | None]
    sites: dict[str, str]
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
        lines += [f"run      {line.run:<12} {line.status} {line.details}".rstrip() for line in self.runs]
        return "\n".join(lines)


def status(home: Home) -> Status:
    """Asks the coordinator's processes, or what they have left when they do not run."""
    processes = {name: Identity.read(pid_file(home, name)) for name in PROCESSES}
    nodes, runs = _ask(home)
    return Status(
        processes={name: None if found is None else found.pid for name, found in processes.items()},
        sites=_sites(home, nodes),
        runs=[] if runs is None else [_run_line(run) for run in runs],
    )


def _ask(home: Home) -> tuple[list[Node] | None, list[FlowerRun] | None]:
    try:
        with home.control() as control:
            return control.nodes(), control.runs()
    except httpx.HTTPError:
        return None, None  # not running, which the processes tell


def _sites(home: Home, nodes: list[Node] | None) -> dict[str, str]:
    if nodes is None:
        return {site.name: UNKNOWN for site in enrolment.enrolled(home)}
    states = {node.public_key: node.status for node in nodes}
    # Flower's "registered" means that the site has never been there.
    return {
        site.name: "online" if states.get(site.pem) == "online" else OFFLINE
        for site in enrolment.enrolled(home)
    }


def _run_line(run: FlowerRun) -> RunLine:
    name = str(run.config.get("run", ""))
    return RunLine(run=name, flower_run=run.run_id, status=run.status, details=run.details)
