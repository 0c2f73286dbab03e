"""Replies on disk: stored before the first byte is sent, and sent again when the same task comes again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common import durable
from common.errors import StateError


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The content of a reply: named arrays and scalar fields."""

    arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    fields: Mapping[str, float | int | str | None]


def store(directory: Path, task: str, reply: Reply, *, is_durable: bool = True) -> None:
    """Writes a reply under its task's identity, in one step; as good as never where the power fails before
    the disk has it, unless ``is_durable``."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in reply.arrays.items()}
    write = durable.write if is_durable else durable.replace
    write(
        directory / f"{task}.safetensors", save(arrays, metadata={"fields": json.dumps(dict(reply.fields))})
    )


def load(directory: Path, task: str) -> Reply | None:
    """Returns the stored reply of a task, or None.

    Raises:
        StateError: the file is damaged.
    """
    path = directory / f"{task}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            fields = json.loads(file.metadata()["fields"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"Expected a stored reply in {path.name}, found damage: {error}.") from None
    return Reply(arrays=arrays, fields=fields)
