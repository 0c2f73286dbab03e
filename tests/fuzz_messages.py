"""Fuzzes the readers of messages, at both ends, over whatever Flower makes of the bytes."""

from __future__ import annotations

from functools import partial

import numpy as np
from flwr.app import Message, RecordDict

from common import exchange, flower, measure
from common.errors import InvalidReply, Refusal
from common.exchange import Prepared, Scored, Task, Update
from common.quantisation import BLOCK, DTYPES, Form, quantised
from server.heads import taken_from
from tests.plans import asked

SIZE = 3
EXPECTED = [measure.arrays_of(asked(), bins=2, exact=exact) for exact in (True, False)]


def _packed(record: RecordDict) -> bytes:
    flower.set_identity(1, node_id=1)
    return flower.pack_message(Message(record, 7, "train"))


def _records() -> list[RecordDict]:
    values = np.ones(SIZE, np.float32)
    task = Task(run="r", plan_hash="0" * 64, server_round=1, purpose="train", part="", parameters=values)
    prepared = Prepared(
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
    exact = {
        "scores": np.ones((2, 1), np.float32),
        "targets": np.ones((2, 1), np.int8),
        "weights": np.ones(2),
    }
    noised = {"histogram": np.ones((1, 2, 2))}
    return [
        exchange.task_record(task),
        exchange.prepared_record(prepared),
        *(exchange.task_record(task, form=form) for form in BLOCK),
        *(
            exchange.update_record(
                Update(server_round=1, arrays=quantised(values, form=form), weight=1.0, train_loss=0.5)
            )
            for form in DTYPES
        ),
        *(exchange.scored_record(Scored(server_round=1, part="test", arrays=of)) for of in (exact, noised)),
        exchange.refusal_record("budget_exceeded"),
        exchange.delivered_record(),
    ]


SEEDS = [_packed(record) for record in _records()]


def _read_update(record: RecordDict, form: Form) -> Update:
    return exchange.read_update(
        record, server_round=1, num_parameters=SIZE, form=form, bound=16.0, max_norm=9.0, weight=1.0
    )


def parse(data: bytes) -> None:
    """Reads bytes as a message, and that as a task and as each kind of reply."""
    try:
        message = flower.unpack_message(data)
        if not message.has_content():
            return
        contents = [flower.unpack_message(data).content for _ in range(6)]  # a reader may take parts out
    except flower.UNREADABLE:
        return
    task, head, prepared, update, exact, noised = contents
    try:
        exchange.read_task(task)
    except Refusal as refusal:
        assert refusal.code == "malformed_task"
    for read in (
        lambda: taken_from(head),
        lambda: exchange.require_accepted(head),
        lambda: exchange.read_prepared(prepared),
        *(partial(_read_update, update, form) for form in DTYPES),
        lambda: exchange.read_scored(exact, server_round=1, part="test", expected=EXPECTED[0]),
        lambda: exchange.read_scored(noised, server_round=1, part="test", expected=EXPECTED[1]),
    ):
        try:
            read()
        except InvalidReply as problem:
            assert len(problem.code) <= 48
