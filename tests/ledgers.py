"""Ledgers with charges, for tests of them and of what is under them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from client.ledger import Charge, Ledger
from common.privacy import Spend, epsilon

DELTA = 1e-5
NOISY = Spend(noise_multiplier=2.0, sample_rate=1.0, steps=1)
KEY = ec.derive_private_key(2026, ec.SECP384R1())  # the same in every process of a test


def cost(releases: int, spend: Spend = NOISY) -> float:
    """Epsilon of that many equal releases."""
    return epsilon([spend] * releases, delta=DELTA).value


def charge_of(task: str = "a", **changes: Any) -> Charge:
    fields: dict[str, Any] = {
        "task": task,
        "run": "run-1",
        "plan_hash": "ab" * 32,
        "study": "chest",
        "server_round": 1,
        "purpose": "train",
        "part": "train",
        "spend": NOISY,
        "nominal_patients": 100,
    }
    return Charge(**(fields | changes))


def ledger_at(path: Path, *, max_epsilon: float = 100.0, delta: float = DELTA, **settings: Any) -> Ledger:
    head = path.with_name("ledger.head")
    return Ledger(path, head=head, key=KEY, max_epsilon=max_epsilon, delta=delta, **settings)


def opened(path: Path, *, max_epsilon: float = 100.0, delta: float = DELTA) -> Any:
    return closing(ledger_at(path, max_epsilon=max_epsilon, delta=delta))


def fill(path: Path, rounds: int) -> None:
    with opened(path) as ledger:
        for number in range(1, rounds + 1):
            assert ledger.charge(charge_of(f"task-{number}", server_round=number), max_repeats=0)


def fill_more(path: Path, start: int, stop: int, *, name: str = "task") -> None:
    with opened(path) as ledger:
        for number in range(start + 1, stop + 1):
            assert ledger.charge(charge_of(f"{name}-{number}", server_round=number), max_repeats=0)


def rows(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT * FROM entries ORDER BY number").fetchall()


def alter(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)
