"""Fuzzes the plan: the one text that a coordinator sends to every hospital."""

from __future__ import annotations

from common.errors import ConfigError
from common.plan import Plan
from tests.plans import plan

SEEDS = [
    plan().to_json().encode(),
    plan(model="unet", preprocessing="volume32", privacy="none", classes=("a", "b")).to_json().encode(),
    plan(model="article_cnn", preprocessing="rgb64", training="augmented").to_json().encode(),
    b'{"schema_version":3}',
    b"[" * 20_000,
    b'{"rounds":' + b"9" * 5000 + b"}",
    b'{"classes":["\\ud800","b"]}',
]


def parse(data: bytes) -> None:
    """Reads bytes as a plan; one that is read is the same when it is read again."""
    try:
        found = Plan.from_json(data.decode("utf-8", errors="replace"))
    except ConfigError:
        return
    assert Plan.from_json(found.to_json()).hash == found.hash
