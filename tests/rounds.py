"""Sites that answer in memory, and runs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from common import exchange, model
from common.exchange import Prepared, Scored, Task, Update
from common.plan import Plan
from common.trail import Trail
from server import checkpoint
from server.checkpoint import RunState
from server.heads import Heads
from server.rounds import Rounds
from server.strategy import FedAvg
from tests.grid import Behaviour, InlineGrid
from tests.plans import plan as make_plan

Edit = Callable[[RecordDict, Message], RecordDict | Message | None]


def tiny_plan(**changes: Any) -> Plan:
    base: dict[str, Any] = {
        "rounds": 2,
        "sites": 4,
        "quorum": 2,
        "node_deadline_seconds": 1,
        "reply_deadline_seconds": 1,
        "evaluation__validation_every": 0,
        "evaluation__test_at_end": False,
        "strategy__weights": "equal",
        "privacy": "none",
        "preprocessing": "grey28",
    }
    return make_plan(**{**base, **changes})


def site(plan: Plan, name: str, step: float, *, edit: Edit | None = None, **facts: Any) -> Behaviour:
    """A site that answers as the installed one does, its update all ``step``; ``edit`` misbehaves."""

    def behave(message: Message) -> Message | None:
        task = exchange.read_task(message.content)
        record = _answer(plan, task, name, step, facts)
        edited: RecordDict | Message | None = record
        if edit is not None and task.purpose == "train":
            edited = edit(record, message)
        if edited is None or isinstance(edited, Message):
            return edited
        return Message(edited, reply_to=message)

    return behave


def _answer(plan: Plan, task: Task, name: str, step: float, facts: dict[str, Any]) -> RecordDict:
    if task.purpose == "prepare":
        fields = {
            "site": name,
            "status": "approved",
            "reason": "",
            "role": "training",
            "data": "private",
            "nominal_patients": 10,
            "patient_is": "column",
            "parts": ("train", "validation", "test"),
            "feverfew": "0",
        }
        return exchange.prepared_record(Prepared(**{**fields, **facts}))
    if task.purpose == "train":
        values = np.full(task.parameters.shape, step, dtype=np.float32)
        update = Update(server_round=task.server_round, arrays={"values": values}, weight=1.0, train_loss=1.0)
        return exchange.update_record(update)
    if task.purpose == "evaluate":
        arrays = {
            "scores": np.array([[0.2], [0.9]], dtype=np.float32),
            "targets": np.array([[0], [1]], dtype=np.int8),
            "weights": np.ones(2),
        }
        return exchange.scored_record(Scored(server_round=task.server_round, part=task.part, arrays=arrays))
    return exchange.delivered_record()


def run(
    plan: Plan,
    nodes: dict[str, Behaviour],
    directory: Path,
    *,
    state: RunState | None = None,
    grid: type[InlineGrid] = InlineGrid,
    strategy: type[FedAvg] = FedAvg,
) -> Rounds:
    start = model.flatten(model.build(plan))
    state = state or RunState(
        run="r", plan_hash=plan.hash, server_round=0, parameters=start, started="2026-01-01T00:00:00+00:00"
    )
    rounds = Rounds(
        grid(nodes),
        plan=plan,
        state=state,
        strategy=lambda of: strategy(nodes=of, bound=plan.strategy.update_bound, ttl_seconds=60),
        trail=Trail(directory / "events.jsonl"),
        heads=Heads(directory / "heads"),
        save=lambda state: checkpoint.save_state(directory / "checkpoints", state),
    )
    rounds.run()
    return rounds


def moved(rounds: Rounds, plan: Plan) -> np.ndarray[Any, Any]:
    return rounds.state.parameters - model.flatten(model.build(plan))


def dies(record: RecordDict, message: Message) -> Message:
    return Message(Error(code=8, reason="worker_died"), reply_to=message)
