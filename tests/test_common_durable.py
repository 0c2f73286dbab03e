"""Files that are replaced whole, whatever goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import durable


def test_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    durable.write(path, b"old")
    (tmp_path / f".plan.json.{os.getpid()}").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write(path, b"new")
    assert path.read_bytes() == b"old"
