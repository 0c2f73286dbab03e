"""Fuzzes how a message is put together from the objects in which it crosses the network.

An input is a list of objects, each after its length in four bytes; the first is the root. Objects name each
other by place (``@0``, ``@1``), since a fuzzer does not find the hash of what it changes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common import flower
from common.arrays import packed

MOST_BYTES = 4096


def _seed(record: RecordDict) -> bytes:
    flower.set_identity(1, node_id=1)
    message = Message(record, 7, "train")
    objects = flower.get_all_nested_objects(message)
    order = list(reversed(list(objects)))
    parcel = b""
    for name in order:
        content = objects[name].deflate()
        for place, other in enumerate(order):
            content = content.replace(other.encode(), f"@{place}".encode())
        parcel += len(content).to_bytes(4, "big") + content
    return parcel


SEEDS = [
    _seed(RecordDict({"arrays": ArrayRecord({"update": packed(np.zeros(3, np.float32))})})),
    _seed(RecordDict({"task": ConfigRecord({"run": "r"}), "metrics": MetricRecord({"weight": 1.0})})),
]


def parse(data: bytes) -> None:
    """Puts the objects together; every error is one of those that our two readers expect."""
    flower.bound_messages(MOST_BYTES, max_seconds=1)
    contents, root = objects(data)
    try:
        message: Any = flower.inflate_object_from_contents(root, contents)
        arrays = list(message.content.array_records.values()) if isinstance(message, Message) else []
    except flower.UNREADABLE:
        return
    assert all(len(array.data) <= MOST_BYTES for record in arrays for array in record.values())


def objects(data: bytes) -> tuple[dict[str, bytes], str]:
    """Returns contents by name, and the name of the root."""
    return named(split(data))


def split(data: bytes) -> list[bytes]:
    """Returns the parts of an input."""
    parts = []
    while len(data) > 4 and len(parts) < 32:
        length = int.from_bytes(data[:4], "big")
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


def named(parts: list[bytes]) -> tuple[dict[str, bytes], str]:
    """Gives parts the names by which they call each other, and heads that say their length."""
    contents: dict[str, bytes] = {}
    names = ["0" * 64] * len(parts)
    for place in reversed(range(len(parts))):  # children come after their parents
        content = parts[place]
        for other in range(place + 1, len(parts)):
            content = content.replace(f"@{other}".encode(), names[other].encode())
        head, divider, body = content.partition(b"\0")
        kind = b" ".join([*head.split(b" ")[:2], str(len(body)).encode()])
        names[place] = hashlib.sha256(kind + divider + body).hexdigest()
        contents[names[place]] = kind + divider + body
    return contents, names[0] if names else ""
