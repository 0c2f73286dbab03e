"""How the coordinator's processes are started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server import services
from server.home import create_home
from tests.forward_proxy import ForwardProxy
from tests.ports import free_port
from tests.test_server_gateway import Upstream, serving, superlink


def test_the_superlink_is_started_so_that_it_serves_nobody_but_us(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)
    (command,) = (service.command for service in services.services(home) if service.name == "superlink")
    for option, value in (("--host", "127.0.0.1"), ("--isolation", "process")):
        assert command[command.index(option) + 1] == value
    for option in ("--enable-supernode-auth", "--disable-runtime-dependency-installation", "--ssl-keyfile"):
        assert option in command
    environment = services.environment(home, log_format="text")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment[services.RUN_DIRECTORY].replace("{run}", "r") == str(home.runs / "r")
    assert environment[services.HEADS_DIRECTORY] == str(home.heads)


def test_a_proxy_of_the_environment_has_no_place_within_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=free_port())
    upstream = Upstream(nodes={b"key": 7})
    with ForwardProxy() as proxy, serving(superlink(home, upstream)):
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
            monkeypatch.setenv(name.lower(), proxy.url)
        monkeypatch.setenv("no_proxy", "example.org")  # in small letters it would win over ours
        with home.control() as control:
            assert [node.node_id for node in control.nodes()] == [7]
        found = services.environment(home, log_format="text")
    assert proxy.targets == []
    assert {name: found[name] for name in found if "proxy" in name.lower()} == {"NO_PROXY": "*"}
