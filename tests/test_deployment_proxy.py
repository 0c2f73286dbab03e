"""A hospital behind a proxy, in a real federation: nothing goes past the proxy, and it learns nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forward_proxy import ForwardProxy
from tests.ports import free_ports
from tests.test_client_route import ISSUER, server_context
from tests.test_deployment import ROOT, Federation, wait_for

pytestmark = [
    pytest.mark.deployment,
    # Flower 1.41 builds its archives with a name that pathspec has renamed.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

PASSWORD = "correct-horse"
WATCH = """
import os, sys

def note(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{arguments[1][1]}\\n")

sys.addaudithook(note)
"""
"""For ``sitecustomize.py``: the ports to which a process and its children connect."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[ForwardProxy]:
    with ForwardProxy(login=f"feverfew:{PASSWORD}") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watch") / "watched"


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, proxy: ForwardProxy, watched: Path
) -> Iterator[Federation]:
    """A coordinator and the site ``north``; every process is told the proxy, also the coordinator's."""
    directory = tmp_path_factory.mktemp("behind-a-proxy")
    url = proxy.url.replace("//", f"//feverfew:{PASSWORD}@")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HTTPS_PROXY": url}
    federation = Federation(directory, environment)
    gateway, internal = free_ports(2)
    made = federation.verb(
        *("feverfew-server", "init", "home", "--host", "127.0.0.1"),
        *("--port", gateway, "--internal-port", internal),
    )
    assert made.returncode == 0, made.stderr
    federation.add_site("north")
    (watched.parent / "sitecustomize.py").write_text(WATCH)
    try:
        federation.start_coordinator()
        more = {"PYTHONPATH": f"{watched.parent}{os.pathsep}{ROOT}", "WATCHED": str(watched)}
        federation.environment = environment | more
        yield federation
    finally:
        for name in reversed(list(federation.processes)):
            federation.stop(name)


def test_an_agent_waits_while_tls_is_broken_open_and_then_works_through_the_proxy_alone(
    federation: Federation, proxy: ForwardProxy, watched: Path, tmp_path: Path
) -> None:
    proxy.inspects, _ = server_context(tmp_path / "inspector")
    federation.start_agent("north")
    wait_for(lambda: "is broken open" in federation.log("north"), what="the agent's word")
    (line,) = (line for line in federation.log("north").splitlines() if "is broken open" in line)
    assert ISSUER in line and "from inspection" in line and proxy.url in line
    assert federation.processes["north"].poll() is None and proxy.read == b""
    proxy.inspects = None
    wait_for(lambda: federation.status.sites == {"north": "online"}, what="north online")

    submitted = federation.submit(sites=1, rounds=["train"] * 8)
    events = federation.home.runs / submitted.run / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count("\n") >= 2)
    proxy.cut()
    outcome, rounds = federation.follow(submitted)
    assert outcome.is_success and [event["sites_valid"] for event in rounds] == [1] * 8
    assert {int(port) for port in watched.read_text().split()} == {proxy.port}
    assert set(proxy.targets) == {federation.home.invitation.address}


def test_check_tells_the_proxy_and_its_password_stands_nowhere(
    federation: Federation, proxy: ForwardProxy
) -> None:
    told = federation.verb("feverfew-client", "check", "north", "--json")
    lines = {line["name"]: line for line in json.loads(told.stdout)["lines"]}
    assert lines["connection"]["level"] == lines["proxy"]["level"] == "ok"
    assert proxy.url in lines["proxy"]["text"] and "through the proxy" in lines["connection"]["text"]
    federation.stop("north")
    assert PASSWORD not in told.stdout + told.stderr
    for path in federation.directory.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
