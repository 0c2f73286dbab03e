"""What CI does where it cannot have what its tests need."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("ci", "expected"), [("true", 1), ("", 0)])
def test_ci_fails_without_the_packages_and_a_developer_is_only_told(
    tmp_path: Path, ci: str, expected: int
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    commands = {"dpkg": 1, "apt-get": 1, "sudo": 1, "make": 0, ".venv/bin/coverage": 0}
    for name, code in commands.items():
        path = tmp_path / name if "/" in name else tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit {code}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CI": ci}
    told = subprocess.run([tmp_path / ".ci/run"], env=environment, capture_output=True, text=True)
    assert told.returncode == expected and "will be skipped" in told.stderr
    assert ("make" in (tmp_path / "called").read_text()) == (expected == 0)
