"""The last row of a site's ledger: on its way, and as the coordinator keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from common import exchange
from common.chain import Head
from common.exchange import Task
from server.heads import Heads

TASK = Task(
    run="r",
    plan_hash="0" * 64,
    server_round=0,
    purpose="prepare",
    part="",
    parameters=np.zeros(0, np.float32),
)
HEAD = Head(number=7, hash="0f" * 32, signature="AAEC")


def test_the_head_of_a_ledger_is_read_back_and_taken_out() -> None:
    record = exchange.delivered_record()
    exchange.attach_head(record, HEAD)
    assert exchange.detach_head(record) == HEAD
    assert exchange.detach_head(record) is None and set(record) == {"delivered"}
    assert exchange.read_task(exchange.task_record(replace(TASK, head=HEAD))).head == HEAD


@pytest.mark.parametrize(
    "fields",
    [{"number": -1}, {"number": True}, {"hash": "0f" * 32}, {"hash": b"short"}, {"signature": "AAEC"}]
    + [{"signature": bytes(193)}, {"more": 1}],
)
def test_a_head_that_is_something_else_is_refused(fields: dict[str, Any]) -> None:
    record = RecordDict()
    exchange.attach_head(record, HEAD)
    record["ledger"] = ConfigRecord({**record["ledger"], **fields})
    with pytest.raises(ValueError, match="expected"):
        exchange.detach_head(record)


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", "{}", '{"number": 1, "hash": "zz", "signature": ""}']
    + ['{"number": "1", "hash": "", "signature": ""}', '{"number": 1, "hash": 5, "signature": ""}']
    + [f'{{"number": 1, "hash": "{"00" * 32}", "signature": "AA*C"}}'],
)
def test_a_damaged_file_of_a_head_counts_as_none(text: str, tmp_path: Path) -> None:
    heads = Heads(tmp_path)
    (tmp_path / "a.json").write_text(text)
    assert heads.of("a") is None
    heads.keep("a", HEAD)
    assert heads.of("a") == HEAD
