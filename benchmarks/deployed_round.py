"""The fixed cost of a deployed round: a tiny model, no training, 4 sites on loopback; beside stock Flower.

Run with ``python -m benchmarks.deployed_round``. Both have TLS and authenticated sites, and each site and
each part of the server is a process of its own. Feverfew: gateway, SuperLink, SuperExec, agents. Flower:
SuperLink with its own SuperExec, stock SuperNodes, FedAvg without evaluation, on a model of as many numbers.
A round lasts from the end of the one before to its own end, as the server's app sees it; the first, which
waits for the sites, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from benchmarks.figure import tell
from common import keys

BINARIES = Path(sys.executable).parent
SITES = 4
PARAMETERS = 977
QUIET = {
    "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}
OURS = [
    "plan.classes=[normal,opacity]",
    f"plan.sites={SITES}",
    f"plan.quorum={SITES}",
    "plan.evaluation.validation_every=0",
    "plan.evaluation.test_at_end=false",
    "training.local_steps=0",
    "privacy=none",
    "model.channels=[16]",
    "model.pool_sizes=[4]",
    "model.head_size=7",
]
THEIR_PROJECT = """
[project]
name = "stock"
version = "1.0.0"
license = {file = "LICENSE"}
dependencies = ["flwr>=1.41.0,<1.42"]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["*.py", "LICENSE"]
[tool.flwr.app.components]
serverapp = "stock:server"
clientapp = "stock:client"
[tool.flwr.app.config]
rounds = 3
times = ""
"""
THEIR_APP = f"""
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    arrays = message.content["arrays"]
    metrics = MetricRecord({{"num-examples": 1}})
    return Message(RecordDict({{"arrays": arrays, "metrics": metrics}}), reply_to=message)

class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        with open(self.times, "a") as file:
            file.write(f"{{time.time()}}\\n")
        return result

@server.main()
def main(grid, context):
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes={SITES}, min_available_nodes={SITES})
    strategy.times = context.run_config["times"]
    model = ArrayRecord({{"x": Array(np.zeros({PARAMETERS}, np.float32))}})
    strategy.start(grid=grid, initial_arrays=model, num_rounds=int(context.run_config["rounds"]))
"""


def run(place: Path, *command: object, **environment: str) -> str:
    """Runs a command to its end; returns what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=place,
        env=os.environ | QUIET | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout} {done.stderr}")
    return done.stdout


@contextmanager
def running(place: Path, name: str, *command: object, **environment: str) -> Iterator[None]:
    """Keeps a process running; it and what it has started end with the block."""
    with (place / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=place,
            env=os.environ | QUIET | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def ports(number: int) -> list[int]:
    """Returns ports that are free."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


def wait_for(path: Path, text: str, *, times: int = 1) -> None:
    """Waits until a text stands in a file so often."""
    while not path.exists() or path.read_text().count(text) < times:
        time.sleep(0.1)


def ours(place: Path, *, rounds: int) -> list[float]:
    """Returns the seconds of each round but the first."""
    gateway, internal = ports(2)
    written = place / "sites" / "bench"
    small = ["experiment.name=bench", "data.patients_per_site=4", "plan.rounds=1", "privacy=none"]
    run(place, BINARIES / "feverfew-simulate", *small, f"data.num_sites={SITES}", "training.local_steps=0")
    init = ("init", "home", "--host", "127.0.0.1", "--port", gateway, "--internal-port", internal)
    run(place, BINARIES / "feverfew-server", *init)
    (place / "plan.json").write_text(
        run(place, BINARIES / "feverfew-server", "plan", f"plan.rounds={rounds}", *OURS)
    )
    with ExitStack() as processes:
        start = ("feverfew-server", BINARIES / "feverfew-server", "start", "home")
        processes.enter_context(running(place, *start))
        wait_for(place / "feverfew-server.log", "coordinator is ready")
        for number in range(1, SITES + 1):
            _join(place, f"hospital-{number}", data=written / f"site-{number}")
            command = (f"hospital-{number}", BINARIES / "feverfew-client", "run", f"hospital-{number}")
            processes.enter_context(running(place, *command))
        for number in range(1, SITES + 1):
            wait_for(place / f"hospital-{number}.log", "connected as node")
        done = json.loads(run(place, BINARIES / "feverfew-server", "submit", "home", "plan.json", "--json"))
    events = (Path(done["directory"]) / "events.jsonl").read_text().splitlines()
    times = [
        datetime.fromisoformat(event["time"]).timestamp()
        for event in map(json.loads, events)
        if event["event"] == "round_finished"
    ]
    return _gaps(times)


def _join(place: Path, name: str, *, data: Path) -> None:
    client, server = BINARIES / "feverfew-client", BINARIES / "feverfew-server"
    run(place, client, "init", name, "--nominal-patients", 4)
    for part in ("images", "cases.csv"):
        _copy(data / part, place / name / part)
    settings = place / name / "site.yaml"
    text = settings.read_text().replace("unsafe_allow_no_privacy: false", "unsafe_allow_no_privacy: true")
    settings.write_text(text)
    run(place, server, "enroll", "home", name, f"{name}/{name}.csr", "--invitation", f"{name}.invitation")
    run(place, client, "init", name, "--invitation", f"{name}.invitation")
    run(place, client, "approve", name, "plan.json", "--yes")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def theirs(place: Path, *, rounds: int) -> list[float]:
    """Returns the seconds of each round but the first, of stock Flower."""
    link, *apis = ports(1 + SITES)
    host = ("init", "certificates", "--host", "127.0.0.1")
    run(place, BINARIES / "feverfew-server", *host)
    home = place / "certificates"
    app = place / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(THEIR_PROJECT)
    (app / "stock.py").write_text(THEIR_APP)
    (app / "LICENSE").write_text("none")
    flower = {"FLWR_HOME": str(place / "flower")}
    (place / "flower").mkdir()
    (place / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "b"\n[superlink.b]\naddress = "127.0.0.1:{link}"\n'
        f'root-certificates = "{home}/authority.crt"\ninsecure = false\n'
    )
    superlink = (
        *(BINARIES / "flower-superlink", "--host", "127.0.0.1", "--port", link),
        *("--ssl-ca-certfile", home / "authority.crt", "--ssl-certfile", home / "server.crt"),
        *("--ssl-keyfile", home / "private" / "server.key", "--enable-supernode-auth"),
        *("--database", place / "link.db", "--disable-runtime-dependency-installation"),
    )
    times = place / "times"
    with ExitStack() as processes:
        processes.enter_context(running(place, "superlink", *superlink, **flower))
        _wait_for_port(link)
        for number, api in enumerate(apis):
            key = _key(place / f"node{number}")
            run(place, BINARIES / "flwr", "supernode", "register", f"{key}.pub", "b", **flower)
            node = (
                *(BINARIES / "flower-supernode", "--superlink", f"127.0.0.1:{link}"),
                *("--root-certificates", home / "authority.crt", "--auth-supernode-private-key", key),
                *("--host", "127.0.0.1", "--port", api),
            )
            own = {"FLWR_HOME": str(place / f"flower{number}")}
            processes.enter_context(running(place, f"supernode{number}", *node, **own))
        config = f'rounds={rounds} times="{times}"'
        run(place, BINARIES / "flwr", "run", app, "b", "--run-config", config, **flower)
        wait_for(times, "\n", times=rounds)
    return _gaps([float(line) for line in times.read_text().splitlines()])


def _key(path: Path) -> Path:
    key = keys.generate()
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


def _wait_for_port(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def main() -> None:
    """Prints the median, least and greatest seconds of a round, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    found = {}
    for name, measure, number in (("Feverfew", ours, rounds), ("Flower", theirs, max(4, rounds // 2))):
        with tempfile.TemporaryDirectory() as place:
            found[name] = measure(Path(place), rounds=number)
        seconds = found[name]
        median = statistics.median(seconds)
        print(f"{name:>9}: {median:.2f} s a round ({min(seconds):.2f} to {max(seconds):.2f})")
    ratio = statistics.median(found["Flower"]) / statistics.median(found["Feverfew"])
    tell("a deployed round of four sites", found["Feverfew"], unit="s", at_most=1.5)
    tell("the same, stock Flower over ours", [ratio], at_least=4.0)


if __name__ == "__main__":
    main()
