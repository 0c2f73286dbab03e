"""RunState: all that a run needs to go on, saved atomically after every round (safetensors and JSON)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common import durable, schema
from common.errors import StateError
from common.exchange import Prepared
from common.model import FlatArray
from server.revoked import REVOKED

SCHEMA = 2
"""Of ``state.json``; the first had no mark and no turns. Later ones keep ``sha256``, or are damaged here."""
_TENSORS = ("parameters", "velocity")
_MARK = b', "sha256": "'
_KEPT = 2  # if the newest is damaged, the one before still is there
_SPARE = ".spare"


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What one round gave; the measures are those of the validation part.

    Raises:
        ValueError: a number is not finite: JSON has none such.
    """

    server_round: int
    seconds: float
    sites_asked: int
    sites_valid: int
    train_loss: float | None
    auroc: float | None = None
    auroc_interval: tuple[float, float] | None = None
    dice: float | None = None
    dice_interval: tuple[float, float] | None = None
    accuracy: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None

    def __post_init__(self) -> None:
        single = (self.seconds, self.train_loss, self.auroc, self.dice, self.accuracy)
        numbers = (*single, *(self.auroc_interval or ()), *(self.dice_interval or ()))
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"Expected finite numbers of round {self.server_round}, found {numbers}.")


@dataclass(frozen=True, kw_only=True)
class Attendance:
    """What became of the tasks of one site; ``problems`` counts rejected and missing replies by code.

    ``away`` counts the tasks that were sent again because the site had gone before it answered.
    ``bytes_down`` and ``bytes_up``: the content of the messages to the site, and from it.
    """

    valid: int = 0
    late: int = 0
    away: int = 0
    rejected: int = 0
    missing: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    training_tasks: int = 0
    evaluations: tuple[str, ...] = ()
    problems: dict[str, int] = field(default_factory=dict)

    def with_problem(self, code: str) -> Attendance:
        """Returns the attendance with one more problem."""
        problems = {**self.problems, code: self.problems.get(code, 0) + 1}
        is_missing = code in ("missing", REVOKED)
        return replace(
            self,
            problems=problems,
            missing=self.missing + is_missing,
            rejected=self.rejected + (not is_missing),
        )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run after ``server_round`` rounds. parameters: float32, (num_parameters,).

    ``velocity``: what ``strategy.server_momentum`` has gathered, as ``parameters``; None where there is none.
    ``turns`` and ``turns_key``: see ``server.turns``; empty where every site is asked in every round.
    ``waiting_since``: the sites that wait for a person's approval, and when they said so first (UTC).
    """

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    run: str
    plan_hash: str
    server_round: int
    parameters: FlatArray
    started: str
    rounds: tuple[RoundRecord, ...] = ()
    sites: dict[str, Prepared] = field(default_factory=dict)
    attendance: dict[str, Attendance] = field(default_factory=dict)
    waiting_since: dict[str, str] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    turns_key: str = ""
    velocity: FlatArray | None = None


_STATE = TypeAdapter(RunState)


class _Entries:
    """The JSON of a mapping. Its values do not change, so a value that was there the last time is not written
    down again: of many sites few have something new in a round.
    """

    def __init__(self, kind: type) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
        self._last: Mapping[str, object] = {}
        self._texts: dict[str, bytes] = {}
        self._json = b"{}"

    def json(self, values: Mapping[str, object]) -> bytes:
        """Returns the JSON of an object."""
        if values is not self._last:
            new = {name: value for name, value in values.items() if self._last.get(name) is not value}
            texts = self._texts | {name: self._entry(name, value) for name, value in new.items()}
            self._texts = texts if list(texts) == list(values) else {name: texts[name] for name in values}
            self._last, self._json = values, b"{" + b",".join(self._texts.values()) + b"}"
        return self._json

    def _entry(self, name: str, value: object) -> bytes:
        return json.dumps(name).encode() + b":" + self._adapter.dump_json(value, exclude_defaults=True)


_ENTRIES = {"sites": _Entries(Prepared), "attendance": _Entries(Attendance)}


def save_state(directory: Path, state: RunState) -> None:
    """Writes ``checkpoints/<round>/``; after a crash it is there whole or not at all.

    It is written over a state that is kept no longer: where something is deleted in every round, some file
    systems make all files slowly.
    """
    spare = directory / _SPARE
    spare.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(state, name) for name in _TENSORS if getattr(state, name) is not None}
    parameters = save(tensors)
    text = _text(state)
    durable.write_over(spare / "parameters.safetensors", parameters)
    durable.write_over(spare / "state.json", marked(text, parameters=parameters))
    final = directory / f"{state.server_round:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(spare, final)
    durable.sync_directory(directory)
    for old in _saved(directory)[:-_KEPT]:
        shutil.rmtree(spare, ignore_errors=True)
        os.replace(old, spare)


def _text(state: RunState) -> bytes:
    """Returns the JSON of a state without its tensors."""
    entries = [f'"{name}":'.encode() + one.json(getattr(state, name)) for name, one in _ENTRIES.items()]
    rest = _STATE.dump_json(state, exclude={*_TENSORS, *_ENTRIES}, exclude_defaults=True)
    return f'{{"schema": {SCHEMA}, '.encode() + b",".join([*entries, rest[1:]])


def marked(text: bytes, *, parameters: bytes) -> bytes:
    """Returns what stands in ``state.json``: a state, and the sha256 of it and of the bytes beside it."""
    checksum = _checksum(text, parameters=parameters).encode()
    return b"".join((memoryview(text)[:-1], _MARK, checksum, b'"}'))  # of many sites it is long: one copy


def _is_whole(content: bytes, *, parameters: bytes) -> bool:
    text, _, end = content.rpartition(_MARK)
    return end == _checksum(text + b"}", parameters=parameters).encode() + b'"}'


def _checksum(text: bytes, *, parameters: bytes) -> str:
    found = hashlib.sha256(hashlib.sha256(parameters).digest())
    found.update(text)
    return found.hexdigest()


def latest(directory: Path, *, run: str, plan_hash: str) -> RunState | None:
    """Returns the newest state that is whole, or None where nothing was saved.

    Raises:
        StateError: checkpoints are there, but each is damaged or of another run.
        SchemaError: a newer Feverfew has saved it.
    """
    saved = _saved(directory)
    for path in reversed(saved):
        state = _load(path)
        if state is not None and state.run == run and state.plan_hash == plan_hash:
            return state
    if saved:
        raise StateError(
            f"Expected a whole checkpoint of run {run} in {directory}, found only damaged ones or another "
            "plan's; move the folder away to begin again."
        )
    return None


def newest_round(directory: Path) -> int:
    """Returns the round after which a run was saved last; 0 if never."""
    return max((int(path.name) for path in _saved(directory)), default=0)


def _saved(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir())


def _load(path: Path) -> RunState | None:
    """Returns None where anything is missing, cut or changed."""
    try:
        data = (path / "parameters.safetensors").read_bytes()
        content = (path / "state.json").read_bytes()
        if not _is_whole(content, parameters=data):
            return None
        tree: dict[str, Any] = json.loads(content)
        del tree["sha256"]
        schema.require(tree.pop("schema", 1), newest=SCHEMA, what=f"the checkpoint {path}")
        datetime.fromisoformat(tree["started"])
        tensors = load(data)
        tree |= {"parameters": tensors["parameters"], "velocity": tensors.get("velocity")}
        return _STATE.validate_python(tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None
