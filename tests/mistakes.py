"""What a person gets who makes a mistake on the command line of ``feverfew-simulate``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simulations.__main__ import main


def require_one_clear_line(
    overrides: list[str],
    named: str,
    *,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs the command in this process, in an empty directory."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["feverfew-simulate", *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2, told
    assert len(told.splitlines()) == 1, told
    assert named in told
