"""How the coordinator's processes are started."""

from __future__ import annotations

import sys
from pathlib import Path

from server import services
from server.home import create_home


def test_the_superlink_is_started_so_that_it_serves_nobody_but_us(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)
    (command,) = (service.command for service in services.services(home) if service.name == "superlink")
    for option, value in (("--host", "127.0.0.1"), ("--isolation", "process")):
        assert command[command.index(option) + 1] == value
    for option in ("--enable-supernode-auth", "--disable-runtime-dependency-installation", "--ssl-keyfile"):
        assert option in command
    environment = services.environment(home)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment[services.RUN_DIRECTORY].replace("{run}", "r") == str(home.runs / "r")
    assert environment[services.HEADS_DIRECTORY] == str(home.heads)
