"""engine=flower: the unchanged apps on Flower's own simulation runtime, which runs sites on Ray.

A SuperLink of this run alone is started on loopback, through Flower's public commands only, and ended by
its process id.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.site import Site
from common.errors import ConfigError, DeploymentError, RunError
from server import bundle
from server.report import Report

_START_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_CONNECTION = "local-simulation"


def run_on_ray(
    sites: Sequence[Site],
    *,
    run_config: Mapping[str, str],
    workers: int,
    directory: Path,
    is_durable: bool = True,
) -> None:
    """Runs a plan over sites on Flower's simulation runtime and waits for its end.

    Args:
        is_durable: as of ``LocalGrid``.

    Raises:
        ConfigError: the extra "ray" is not installed.
        RunError: the run failed; says where its log is.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=flower needs Ray, found none installed; run: pip install 'feverfew[ray]'")
    with tempfile.TemporaryDirectory(prefix="feverfew-") as place:
        home = Path(place)
        log = directory / "flower.log"
        environment = _environment(home, sites, is_durable=is_durable)
        with _superlink(home, environment, log=log) as address:
            (home / "config.toml").write_text(_connection(address), encoding="utf-8")
            flower_run = _submit(home, environment, run_config, num_sites=len(sites), workers=workers)
            _wait(flower_run, environment, log=log, directory=directory)


def _environment(home: Path, sites: Sequence[Site], *, is_durable: bool) -> dict[str, str]:
    """Nothing is asked of the internet; one thread a site, so that results are those of other engines."""
    scripts = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "FEVERFEW_DURABLE": "yes" if is_durable else "no",
        "FEVERFEW_SITES": "\n".join(str(site.directory.resolve()) for site in sites),
    }


@contextmanager
def _superlink(home: Path, environment: Mapping[str, str], *, log: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    empty = home / "empty"  # a SuperLink imports from the directory that it is started in
    empty.mkdir()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, cwd=empty, env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
    try:
        _await_port(port, process, log=log)
        yield f"127.0.0.1:{port}"
    finally:
        _end(process)


def _await_port(port: int, process: subprocess.Popen[bytes], *, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise DeploymentError(f"Expected Flower's SuperLink to start, found that it did not; see {log}.")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the SuperLink and what it started: they share a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _connection(address: str) -> str:
    return (
        f'[superlink]\ndefault = "{_CONNECTION}"\n'
        f'[superlink.{_CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
    )


def _submit(
    home: Path, environment: Mapping[str, str], run_config: Mapping[str, str], *, num_sites: int, workers: int
) -> str:
    app = bundle.write_bundle(home / "app")
    config = home / "run.toml"
    config.write_text("".join(f"{key} = '{value}'\n" for key, value in run_config.items()), encoding="utf-8")
    federation = f"num-supernodes={num_sites} client-resources-num-cpus=1 init-args-num-cpus={workers}"
    command = ["flwr", "run", str(app), _CONNECTION, "--run-config", str(config)]
    told = _flwr([*command, "--federation-config", federation], environment)
    return str(told["run-id"])


def _wait(flower_run: str, environment: Mapping[str, str], *, log: Path, directory: Path) -> None:
    while True:
        told = _flwr(["flwr", "list", _CONNECTION, "--run-id", flower_run], environment)
        status = str(told["runs"][0]["status"])
        if status == "finished:completed":
            return
        if status.startswith("finished"):
            raise RunError(_why(directory) or f"Expected the run to complete, found {status}; see {log}.")
        time.sleep(_LOOK_SECONDS)


def _why(directory: Path) -> str:
    """Returns what the ServerApp itself said, where it came so far."""
    if not (directory / "report.json").exists():
        return ""
    status = Report.read(directory).status
    return f"The run ended with status {status}; see {directory / 'report.html'}."


def _flwr(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [*command, "--format", "json"], env=dict(environment), capture_output=True, text=True, check=False
    )
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        told = {"success": False, "error-message": done.stderr.strip() or done.stdout.strip()}
    if not told.get("success"):
        raise DeploymentError(f"Expected Flower to take '{command[1]}', found: {told.get('error-message')}")
    return told
