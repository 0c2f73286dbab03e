"""The app directory that Flower asks for. Ours names the installed apps and holds no code."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

SERVER_APP = "server.app:app"
CLIENT_APP = "client.app:app"

PYPROJECT = """\
[project]
name = "feverfew-bundle"
version = "{feverfew}"
description = "Names the apps that are installed at both ends; holds no code"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flower}"]

[tool.flwr.app]
publisher = "feverfew"
fab-format-version = 1
flwr-version-target = "{flower}"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "{server_app}"
clientapp = "{client_app}"

# The two settings of a run: the plan's canonical JSON, and our own id of the run.
[tool.flwr.app.config]
plan = ""
run = ""
"""

LICENSE = """\
This bundle holds no code. Feverfew, whose installed apps it names, is licensed under the Apache License 2.0.
"""


def write_bundle(directory: Path, *, server_app: str = SERVER_APP, client_app: str = CLIENT_APP) -> Path:
    """Writes the bundle's two files into a new directory and returns it."""
    directory.mkdir(mode=0o700)
    text = PYPROJECT.format(
        feverfew=version("feverfew"), flower=version("flwr"), server_app=server_app, client_app=client_app
    )
    (directory / "pyproject.toml").write_text(text, encoding="utf-8")
    (directory / "LICENSE").write_text(LICENSE, encoding="utf-8")
    return directory
