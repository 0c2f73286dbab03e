"""A ClientApp and a ServerApp of a few lines, for tests of what carries messages between such apps."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common import flower
from common.errors import RunError
from server.app import MIN_REPLY_BYTES, UPLOAD_SECONDS, noted_end
from server.mailbox import Mailbox
from server.run_record import RunRecord

SECRET = "patient 4711"

client_app = ClientApp()
server_app = ServerApp()


def task(kind: str, *, server_round: int = 1, node: int = 7, size: int = 3, ttl: float = 60) -> Message:
    """Returns a message of a kind (message type) with an array of zeros, float32, (size,)."""
    arrays = ArrayRecord({"x": Array(np.zeros(size, np.float32))})
    content = RecordDict({"arrays": arrays})
    return Message(content, node, kind, group_id=str(server_round), ttl=ttl)


def context(**run_config: Any) -> Context:
    """Returns the context that a site of no particular directory would get."""
    return Context(run_id=1, node_id=7, node_config={"site": "."}, state=RecordDict(), run_config=run_config)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Adds one, and tells which process did it."""
    x = message.content.array_records["arrays"]["x"].numpy()
    told = MetricRecord({"pid": os.getpid(), "omp": int(os.environ.get("OMP_NUM_THREADS", 0))})
    arrays = ArrayRecord({"x": Array(x + 1)})
    return Message(RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)


@client_app.train("torch_threads")
def torch_threads(message: Message, context: Context) -> Message:
    import torch

    told = MetricRecord({"threads": torch.get_num_threads()})
    return Message(RecordDict({"metrics": told}), reply_to=message)


@client_app.train("told")
def told(message: Message, context: Context) -> Message:
    """Answers what the site told the app."""
    config = {f"node {k}": str(v) for k, v in context.node_config.items()}
    config |= {f"run {k}": str(v) for k, v in context.run_config.items()}
    return Message(RecordDict({"config": ConfigRecord(dict(config))}), reply_to=message)


@client_app.train("raises")
def raises(message: Message, context: Context) -> Message:
    raise RuntimeError(f"cannot read {SECRET}")


@client_app.train("leaves")
def leaves(message: Message, context: Context) -> Message:
    sys.exit(SECRET)


@client_app.train("prints")
def prints(message: Message, context: Context) -> Message:
    """Writes as libraries do: a warning, to standard output, and to standard error past Python."""
    warnings.warn(f"invalid value for PN: {SECRET}", stacklevel=1)
    print(SECRET, flush=True)
    os.write(2, f"{SECRET}\n".encode())
    return train(message, context)


@client_app.train("dies")
def dies(message: Message, context: Context) -> Message:
    os._exit(3)


@client_app.train("sleeps")
def sleeps(message: Message, context: Context) -> Message:
    """Sleeps for a minute, after noting its process in the file that the run config names."""
    if note := context.run_config.get("note"):
        Path(str(note)).write_text(str(os.getpid()))
    time.sleep(60)
    return Message(RecordDict(), reply_to=message)


@client_app.train("sleeps_once")
def sleeps_once(message: Message, context: Context) -> Message:
    """Sleeps for a minute the first time, after noting its process in the site's directory."""
    note = Path(str(context.node_config["site"])) / "sleeper"
    if note.exists():
        return train(message, context)
    note.write_text(str(os.getpid()))
    time.sleep(60)
    return Message(RecordDict(), reply_to=message)


@client_app.train("nothing")
def nothing(message: Message, context: Context) -> Message:
    return None  # type: ignore[return-value]


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the plan's rounds: {"sites": 2, "rounds": ["train", "train.dies"]}; writes events and a report.

    Started again, it goes on after the rounds that it finished before, as the product does.
    """
    flower.shorten_backoff()
    flower.bound_messages(MIN_REPLY_BYTES, max_seconds=UPLOAD_SECONDS)
    run = str(context.run_config["run"])
    plan = json.loads(str(context.run_config["plan"]))
    record = RunRecord(directory=Path(os.environ["FEVERFEW_RUN_DIRECTORY"].format(run=run)))
    record.begin_life(context.run_id)
    with noted_end(record):
        rounds = _finished(record.directory)
        for number in range(len(rounds) + 1, len(plan["rounds"]) + 1):
            rounds.append(_round(grid, plan, number, record.directory))
        if plan.get("fails"):
            raise RunError("this plan fails")
        (record.directory / "report.json").write_text(json.dumps({"rounds": rounds}))


def _finished(directory: Path) -> list[dict[str, Any]]:
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "round_finished"]


def _round(grid: Grid, plan: dict[str, Any], number: int, directory: Path) -> dict[str, Any]:
    mailbox = Mailbox(grid)
    while len(nodes := list(mailbox.addresses.online())) < plan["sites"]:
        time.sleep(0.1)
    begun = time.monotonic()
    kind = plan["rounds"][number - 1]
    size = plan.get("size", 3)
    messages = [task(kind, server_round=number, node=node, size=size) for node in nodes]
    valid, reasons, pids = 0, [], []
    for _, reply in mailbox.ask(messages, deadline_seconds=60):
        if reply is None or reply.has_error():
            reasons.append("missing" if reply is None else reply.error.reason)
            continue
        assert (reply.content.array_records["arrays"]["x"].numpy() == 1).all()
        pids.append(reply.content.metric_records["metrics"]["pid"])
        valid += 1
    told = {"round": number, "sites_valid": valid, "reasons": reasons, "pids": pids}
    told["seconds"] = time.monotonic() - begun
    with (directory / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "round_finished", "time": time.time(), **told}) + "\n")
    return told
