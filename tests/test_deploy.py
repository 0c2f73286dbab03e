"""The files of ``deploy/``, as far as they can be checked without an engine that runs them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
COMMANDS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
SANDBOX = {
    "NoNewPrivileges": "yes",
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
    "Restart": "always",
}


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    return parser["Service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_is_sandboxed_and_writes_to_one_directory_that_its_command_names(unit: Path) -> None:
    found = service(unit)
    assert {key: found[key] for key in SANDBOX} == SANDBOX
    program, verb, directory = found["ExecStart"].split()
    assert Path(program).name in COMMANDS and verb in ("run", "start")
    assert found["ReadWritePaths"] == directory and found["User"] != "root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    name = unit.name.replace("@.", "@north.")
    text = re.sub(r"^(ExecStart=)\S+", r"\1/bin/true", unit.read_text(), flags=re.M)
    (tmp_path / name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True
    )
    assert name not in done.stderr, done.stderr


def test_compose_runs_the_installed_commands_without_rights() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"coordinator", "site"}
    for found in services.values():
        assert found["command"][0] in COMMANDS and found["read_only"] and found["cap_drop"] == ["ALL"]
        assert found["security_opt"] == ["no-new-privileges:true"] and found["restart"] == "always"
    assert "ports" not in services["site"], "a hospital accepts no connection"


def test_image_runs_as_a_user_without_rights_and_installs_what_is_here() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert lines.index("USER feverfew") > lines.index("COPY . /tmp/feverfew")
    wanted = re.search(r'"(torch[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None and any(wanted[1] in line for line in lines), "the torch of pyproject.toml"


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="needs logrotate")
def test_logrotate_takes_its_file(tmp_path: Path) -> None:
    copy = tmp_path / "feverfew"
    copy.write_text(
        re.sub(r"^\s+(su|create) .*\n", "", (DEPLOY / "feverfew.logrotate").read_text(), flags=re.M)
    )
    copy.chmod(0o644)
    done = subprocess.run(
        ["logrotate", "--debug", "--state", str(tmp_path / "state"), str(copy)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "error:" not in done.stderr, done.stderr
