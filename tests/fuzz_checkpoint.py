"""Fuzzes the checkpoint: its JSON with a checksum that fits, and its tensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from common.errors import StateError
from common.exchange import Prepared
from server import checkpoint
from server.checkpoint import Attendance, RoundRecord, RunState
from tests.fuzz import PLACE

DIVIDER = b"\n--\n"


def _seed() -> bytes:
    site = Prepared(
        site="north",
        status="approved",
        reason="",
        role="training",
        data="private",
        nominal_patients=20,
        patient_is="column",
        parts=("train", "test"),
        feverfew="0",
    )
    state = RunState(
        run="r",
        plan_hash="0" * 64,
        server_round=1,
        parameters=np.zeros(3, np.float32),
        started="2026-01-01T00:00:00+00:00",
        rounds=(RoundRecord(server_round=1, seconds=1, sites_asked=2, sites_valid=2, train_loss=0.5),),
        sites={"north": site},
        attendance={"north": Attendance(valid=1, problems={"shape": 1})},
    )
    with tempfile.TemporaryDirectory() as place:
        checkpoint.save_state(Path(place), state)
        saved = Path(place) / "000001"
        return (saved / "state.json").read_bytes() + DIVIDER + (saved / "parameters.safetensors").read_bytes()


SEEDS = [
    _seed(),
    b"[" * 20_000,
    b"null",
    _seed().replace(b'round": 1', b'round": {}'),
    b'{"rounds":3}' + DIVIDER,
]


def parse(data: bytes) -> None:
    """Reads bytes as the only checkpoint of a run; what is read can be saved again."""
    text, _, tensors = data.partition(DIVIDER)
    saved = PLACE / "000001"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "parameters.safetensors").write_bytes(tensors)
    (saved / "state.json").write_bytes(_with_checksum(text, tensors))
    try:
        state = checkpoint.latest(PLACE, run="r", plan_hash="0" * 64)
    except StateError:
        return
    assert state is not None
    checkpoint.save_state(PLACE / "again", state)


def _with_checksum(text: bytes, tensors: bytes) -> bytes:
    """A damaged file is found by its checksum; what lies behind that check is of interest too."""
    try:
        tree = json.loads(text)
        tree.pop("sha256", None)
        return checkpoint.marked(json.dumps(tree).encode(), parameters=tensors)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text
