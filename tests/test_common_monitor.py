"""What a daemon tells its own computer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

import client.vitals
import server.vitals
from common import monitor
from server.home import create_home
from server.traffic import Traffic

OPERATION = Path(__file__).parents[1] / "docs" / "operation.md"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        found: int = probe.getsockname()[1]
    return found


@pytest.fixture
def is_ready(port: int) -> Iterator[list[bool]]:
    """Serves the vitals of a site that is ready as long as the list holds True."""
    state = [True]
    end = monitor.serve(port, client.vitals.Vitals().registry, is_ready=lambda: state[0])
    yield state
    end()


def test_health_readiness_and_metrics_are_told(port: int, is_ready: list[bool]) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)

    assert get("/health").status_code == get("/ready").status_code == 200
    is_ready[0] = False
    assert get("/health").status_code == 200 and get("/ready").status_code == 503
    assert "feverfew_site_connected 0.0" in get("/metrics").text
    assert get("/").status_code == get("/metrics/x").status_code == 404
    assert httpx.post(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 404


def test_monitor_answers_on_this_computer_only(port: int, is_ready: list[bool]) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{port}/health", trust_env=False)


def metric_names(registry: CollectorRegistry) -> set[str]:
    return {sample.name for family in registry.collect() for sample in family.samples} | {
        family.name for family in registry.collect()
    }


def test_every_metric_is_in_the_docs(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)
    Traffic(passed=0, refused={}, connections=0, sites=0).write(home.traffic)
    found = metric_names(client.vitals.Vitals().registry) | metric_names(server.vitals.Vitals(home).registry)
    text = OPERATION.read_text()
    told = {name for name in found if name.startswith("feverfew_") and not name.endswith("_created")}
    assert told >= {"feverfew_site_tasks", "feverfew_process_up", "feverfew_runs", "feverfew_gateway_refused"}
    assert {name for name in told if f"`{name.removesuffix('_total')}" not in text} == set()
