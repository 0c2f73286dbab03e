from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from client import replies
from client.replies import Reply
from common.errors import StateError

ARRAYS = {
    "update": np.array([1.5, -0.0, 1e-45], dtype=np.float32),
    "histogram": np.array([[[0.1, 2.0], [3.0, -4.0]]]),
    "targets": np.array([[0], [1]], dtype=np.int8),
    "scores": np.zeros((0, 1), dtype=np.float32),
}


def test_reply_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    fields = {"weight": 0.1 + 0.2, "train_loss": None, "part": "test", "steps": 3}
    replies.store(tmp_path / "replies", "task", Reply(arrays=ARRAYS, fields=fields))
    again = replies.load(tmp_path / "replies", "task")
    assert again is not None
    assert again.fields == fields
    assert set(again.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert again.arrays[name].dtype == array.dtype
        assert again.arrays[name].shape == array.shape
        assert again.arrays[name].tobytes() == array.tobytes()


def test_array_that_is_not_contiguous_is_stored_by_its_values(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4).T[::2]
    replies.store(tmp_path, "task", Reply(arrays={"a": array}, fields={}))
    again = replies.load(tmp_path, "task")
    assert again is not None
    np.testing.assert_array_equal(again.arrays["a"], array)


def test_reply_that_was_never_stored_is_none(tmp_path: Path) -> None:
    assert replies.load(tmp_path / "nowhere", "task") is None
    replies.store(tmp_path, "task", Reply(arrays=ARRAYS, fields={}))
    assert replies.load(tmp_path, "other") is None


def test_nothing_but_the_reply_is_left_in_the_directory(tmp_path: Path) -> None:
    replies.store(tmp_path, "task", Reply(arrays=ARRAYS, fields={}))
    replies.store(tmp_path, "task", Reply(arrays=ARRAYS, fields={}))
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "no fields", "broken fields"])
def test_damaged_reply_is_an_error_and_is_never_sent(tmp_path: Path, damage: str) -> None:
    replies.store(tmp_path, "task", Reply(arrays=ARRAYS, fields={"weight": 1.0}))
    path = tmp_path / "task.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "garbage": bytes(range(256)),
            "no fields": save(ARRAYS),
            "broken fields": save(ARRAYS, metadata={"fields": "{"}),
        }[damage]
    )
    with pytest.raises(StateError, match="found damage"):
        replies.load(tmp_path, "task")


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from client import replies
replace = os.replace
def killed(*paths):
    if sys.argv[2] == "after":
        replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
replies.store(Path(sys.argv[1]), "task", replies.Reply(arrays={"a": np.ones(9)}, fields={}))
"""


@pytest.mark.parametrize(("moment", "is_there"), [("before", False), ("after", True)])
def test_reply_of_a_killed_process_is_there_whole_or_not_at_all(
    tmp_path: Path, moment: str, is_there: bool
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    assert child.returncode == -signal.SIGKILL
    reply = replies.load(tmp_path, "task")
    assert (reply is not None) == is_there
    if reply is not None:
        assert (reply.arrays["a"] == 1).all()
