"""The coordinator's three processes: how each is started, and how it is asked whether it works.

SuperLink, SuperExec and gateway are separate processes: only then does a run survive the loss of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from common import logline
from common.logline import Format
from server.home import LOOPBACK, Home

TASK_POLL_SECONDS: Final = 0.25
RUN_DIRECTORY: Final = "FEVERFEW_RUN_DIRECTORY"
HEADS_DIRECTORY: Final = "FEVERFEW_HEADS_DIRECTORY"
TRAIL_KEY: Final = "FEVERFEW_TRAIL_KEY"
CERTIFICATES_DIRECTORY: Final = "FEVERFEW_CERTIFICATES_DIRECTORY"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process of the coordinator; ``is_ready`` asks it whether it works."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]


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
            is_ready=lambda: _wants_certificate(home, f"{public}:{home.settings.port}/"),
        ),
    )


def environment(home: Home, *, log_format: Format) -> dict[str, str]:
    """Returns the environment of the coordinator's processes: nothing is asked of the internet.

    They speak with each other over loopback only, where a proxy has no place, whatever names one.
    """
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {
        # Flower finds its own programs through PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home.state / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_SECONDS),
        "NO_PROXY": "*",
        RUN_DIRECTORY: str(home.runs / "{run}"),
        HEADS_DIRECTORY: str(home.heads),
        TRAIL_KEY: str(home.trail_key),
        CERTIFICATES_DIRECTORY: str(home.sites),
        logline.VARIABLE: log_format,
    }


def _status(home: Home, url: str) -> int:
    try:
        return httpx.get(url, verify=home.tls, timeout=2.0, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def _wants_certificate(home: Home, url: str) -> bool:
    """Says whether a gateway answers: it refuses whoever shows no certificate, as we do here."""
    try:
        httpx.get(url, verify=home.tls, timeout=2.0, trust_env=False)
    except httpx.RemoteProtocolError:
        return True  # asyncio closes a connection without the alert that TLS has for this
    except httpx.HTTPError:
        return False
    return False
