"""The seeds of fuzzing, each once, and cheap changes of them; ``make fuzz`` goes on from here for hours."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest

from client import decoder
from tests.fuzz import PARSERS

CHANGES = 100


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harnesses change what a fuzzing process needs changed."""
    from flwr.app import Array
    from flwr.supercore.inflatable import inflatable_utils

    monkeypatch.setattr(Array, "inflate", Array.__dict__["inflate"])
    monkeypatch.setattr(inflatable_utils, "pull_objects", inflatable_utils.pull_objects)
    monkeypatch.setattr(decoder, "stored_pixels", decoder.stored_pixels)


@pytest.mark.parametrize("parser", PARSERS)
def test_parser_of_outside_bytes_raises_nothing_but_its_own_errors(parser: str) -> None:
    harness: Any = importlib.import_module(f"tests.fuzz_{parser}")
    for seed in harness.SEEDS:
        harness.parse(seed)
    for seed in harness.SEEDS:
        for changed in _changed(seed):
            harness.parse(changed)


def _changed(seed: bytes) -> list[bytes]:
    """Bits turned, bytes left out, parts repeated; the same at every run."""
    source = random.Random(len(seed))
    found = []
    for _ in range(CHANGES if len(seed) < 5000 else 5):
        data = bytearray(seed)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(data) + 1)
            length = source.randint(1, 8)
            kind = source.randrange(3)
            if kind == 0:
                data[at : at + length] = bytes(source.randrange(256) for _ in range(length))
            elif kind == 1:
                del data[at : at + length]
            else:
                data[at:at] = data[at : at + length * 4]
        found.append(bytes(data))
    return found
