from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import SchemaError, StateError
from common.exchange import Prepared
from server import checkpoint
from server.checkpoint import Attendance, RoundRecord, RunState

PREPARED = Prepared(
    site="a",
    status="approved",
    reason="",
    role="training",
    data="private",
    nominal_patients=10,
    patient_is="column",
    parts=("train", "test"),
    feverfew="0.1",
)


def state(server_round: int = 3) -> RunState:
    return RunState(
        run="r",
        plan_hash="h",
        server_round=server_round,
        parameters=np.arange(5, dtype=np.float32) / 3,
        started="2026-01-01T00:00:00+00:00",
        rounds=(
            RoundRecord(server_round=1, seconds=0.5, sites_asked=2, sites_valid=2, train_loss=None),
            RoundRecord(
                server_round=2,
                seconds=0.5,
                sites_asked=2,
                sites_valid=1,
                train_loss=0.7,
                auroc=0.9,
                auroc_interval=(0.8, 0.95),
            ),
        ),
        sites={"a": PREPARED},
        attendance={"a": Attendance(valid=2, evaluations=("test",)).with_problem("missing")},
    )


def saved(directory: Path) -> RunState | None:
    return checkpoint.latest(directory, run="r", plan_hash="h")


def test_nothing_saved_gives_none(tmp_path: Path) -> None:
    assert saved(tmp_path) is None


def test_a_state_comes_back_equal_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state())
    found = saved(tmp_path)
    assert found is not None
    assert found.parameters.tobytes() == state().parameters.tobytes()
    for name in ("run", "plan_hash", "server_round", "started", "rounds", "sites", "attendance"):
        assert getattr(found, name) == getattr(state(), name)


def test_a_velocity_comes_back_equal_bit_for_bit(tmp_path: Path) -> None:
    velocity = np.arange(5, dtype=np.float32) / 7
    checkpoint.save_state(tmp_path, replace(state(), velocity=velocity))
    found = saved(tmp_path)
    assert found is not None and found.velocity is not None
    assert found.velocity.tobytes() == velocity.tobytes()
    assert found.parameters.tobytes() == state().parameters.tobytes()


def test_the_newest_of_several_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save_state(tmp_path, state(number))
    found = saved(tmp_path)
    assert found is not None and found.server_round == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".spare", "000002", "000003"]


def test_what_is_kept_no_longer_is_written_over_and_nothing_is_deleted(tmp_path: Path) -> None:
    def files(server_round: int) -> set[int]:
        return {path.stat().st_ino for path in (tmp_path / f"{server_round:06d}").iterdir()}

    longer = replace(state(1), velocity=np.ones(5, np.float32))
    checkpoint.save_state(tmp_path, replace(longer, rounds=longer.rounds * 9))
    first = files(1)
    for number in (2, 3, 4):
        checkpoint.save_state(tmp_path, state(number))
    assert files(4) == first
    found = saved(tmp_path)
    assert found is not None and found.server_round == 4 and found.velocity is None


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    checkpoint.save_state(tmp_path, state(1))
    checkpoint.save_state(tmp_path, state(2))
    path = tmp_path / "000002" / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    found = saved(tmp_path)
    assert found is not None and found.server_round == 1


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state(1))
    (tmp_path / "000001" / "state.json").write_text("{")
    with pytest.raises(StateError, match="only damaged"):
        saved(tmp_path)
    assert (tmp_path / "000001" / "parameters.safetensors").exists()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state(1))
    with pytest.raises(StateError, match="another plan"):
        checkpoint.latest(tmp_path, run="r", plan_hash="other")


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save_state(tmp_path, state(number))
    (half,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    (half / "state.json").write_bytes((tmp_path / "000003" / "state.json").read_bytes()[:-9])
    found = saved(tmp_path)
    assert found is not None and found.server_round == 3
    checkpoint.save_state(tmp_path, state(4))
    found = saved(tmp_path)
    assert found is not None and found.server_round == 4


@pytest.mark.parametrize(
    ("written", "changed"), [('"valid":2', '"valid":3'), ('"run":"r"', '"run":"r","more":1')]
)
def test_a_changed_digit_in_the_state_is_noticed(written: str, changed: str, tmp_path: Path) -> None:
    for server_round in (2, 3):
        checkpoint.save_state(tmp_path, state(server_round))
    path = tmp_path / "000003" / "state.json"
    text = path.read_text()
    assert written in text
    path.write_text(text.replace(written, changed))
    found = saved(tmp_path)
    assert found is not None and found.server_round == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_neither_kept_nor_read(number: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        checkpoint.RoundRecord(server_round=1, seconds=1.0, sites_asked=1, sites_valid=1, train_loss=number)
    checkpoint.save_state(tmp_path, state())
    record = {"server_round": 1, "seconds": number, "sites_asked": 1, "sites_valid": 1, "train_loss": None}
    resaved(tmp_path, rounds=[record])
    with pytest.raises(StateError):
        saved(tmp_path)
    resaved(tmp_path, rounds=[record | {"seconds": 1.0}])
    assert saved(tmp_path) is not None


def test_a_value_of_another_kind_is_noticed_even_under_a_checksum_that_fits(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state())
    folder = tmp_path / "000003"
    tree = json.loads((folder / "state.json").read_text())
    del tree["sha256"]
    tree["server_round"] = {}
    data = (folder / "parameters.safetensors").read_bytes()
    (folder / "state.json").write_bytes(checkpoint.marked(json.dumps(tree).encode(), parameters=data))
    with pytest.raises(StateError):
        saved(tmp_path)


def resaved(directory: Path, **changed: object) -> None:
    """Writes the state of round 3 anew, as software of another version would."""
    path = directory / "000003"
    tree = json.loads((path / "state.json").read_text())
    del tree["sha256"]
    tree = {name: value for name, value in (tree | changed).items() if value is not None}
    parameters = (path / "parameters.safetensors").read_bytes()
    (path / "state.json").write_bytes(checkpoint.marked(json.dumps(tree).encode(), parameters=parameters))


def test_a_state_from_before_schemas_were_noted_is_read(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state())
    resaved(tmp_path, schema=None, turns=None, turns_key=None)
    found = saved(tmp_path)
    assert found is not None and found.server_round == 3


def test_a_state_of_a_newer_version_is_refused_and_no_older_one_is_taken_instead(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, state(2))
    checkpoint.save_state(tmp_path, state(3))
    resaved(tmp_path, schema=checkpoint.SCHEMA + 1, momentum=[1.0])
    with pytest.raises(SchemaError, match="at most, found .: a newer Feverfew wrote it"):
        saved(tmp_path)


def test_what_changed_from_one_round_to_the_next_is_in_the_newer_checkpoint(tmp_path: Path) -> None:
    """What did not change is not written down again. Each change must be seen: of a value, of the sites, of
    their order."""
    names = [f'site-{number} "\u00fc' for number in range(5)]
    sites = {name: replace(PREPARED, site=name) for name in names}
    attendance = {name: Attendance(valid=1) for name in names}
    first = replace(state(1), sites=sites, attendance=attendance)
    again = dict(reversed(attendance.items())) | {names[2]: Attendance(valid=2).with_problem("missing")}
    fewer = {name: sites[name] for name in names[:4]} | {names[0]: replace(PREPARED, status="declined")}
    second = replace(state(2), sites=fewer, attendance=again)
    for asked in (first, second, first):
        checkpoint.save_state(tmp_path, asked)
        found = checkpoint._load(tmp_path / f"{asked.server_round:06d}")
        assert found is not None
        assert list(found.sites.items()) == list(asked.sites.items())
        assert list(found.attendance.items()) == list(asked.attendance.items())
