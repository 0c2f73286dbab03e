"""Points at which a test ends a process: named places in the product's code, armed by files.

The product has no hooks for this. A process of a test federation has a ``sitecustomize`` that imports this
module, which wraps functions of the product as they are imported. A point ``NAME.POINT`` is armed by a file
of that name in the directory ``FAULT_POINTS``; ``NAME`` is a site, or ``server``. What stands in it is done
once: ``kill`` ends the process that arrives there by SIGKILL, ``stall`` keeps it there, ``mark`` only leaves
``NAME.POINT.reached``. While ``NAME.poison`` is there, the updates of a site are NaN.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DIRECTORY, OWNER = "FAULT_POINTS", "FAULT_OWNER"

# by module: (qualified name, "before" or "after", point)
PLACES: dict[str, list[tuple[str, str, str]]] = {
    "client.agent": [
        ("Agent._do", "before", "task_announced"),
        ("Agent._answer", "before", "task_pulled"),
        ("Agent._answer", "after", "reply_made"),
        ("Agent._send", "before", "reply_ready"),
        ("Agent._send", "after", "reply_sent"),
    ],
    "common.flower": [("push_objects", "before", "reply_half_sent")],
    "client.work": [("train", "before", "task_in_worker")],
    "client.ledger": [("Ledger.charge", "after", "charged"), ("Ledger.finish", "after", "outcome_noted")],
    "client.training": [("Descent.step", "after", "step_done")],
    "client.replies": [("store", "before", "trained"), ("store", "after", "reply_stored")],
    "server.mailbox": [("Mailbox._push", "before", "task_made"), ("Mailbox._push", "after", "task_pushed")],
    "server.strategy": [
        ("FixedPointSum.add", "after", "update_added"),
        ("FedAvg.aggregate_train", "after", "aggregated"),
    ],
    "server.checkpoint": [
        ("marked", "before", "checkpoint_half_written"),  # new parameters beside an old state
        ("save_state", "after", "checkpoint_written"),
    ],
    "server.report": [("Report.write", "before", "report_made"), ("Report.write", "after", "report_written")],
    "server.rounds": [("Rounds._deliver", "before", "tested"), ("Rounds._deliver", "after", "delivered")],
}


def arm(directory: Path, owner: str, point: str, *, action: str) -> None:
    """Arms a point; in a test."""
    (directory / f"{owner}.{point}").write_text(action)


def was_reached(directory: Path, owner: str, point: str) -> bool:
    """Says whether an armed point was reached; in a test."""
    return (directory / f"{owner}.{point}.reached").exists()


def _owned(point: str) -> str:
    return f"{os.environ[OWNER]}.{point}"


def _poisoned(reply: Any) -> Any:
    """Returns an update with a value that is no number; anything else as it is."""
    import numpy as np

    from common.arrays import packed, unpacked

    if not reply.has_error() and "update" in reply.content.array_records.get("arrays", {}):
        arrays = reply.content.array_records["arrays"]
        arrays["update"] = packed(np.full_like(unpacked(arrays["update"]), np.nan))
    return reply


def _reach(point: str) -> None:
    armed = os.path.join(os.environ[DIRECTORY], _owned(point))
    try:
        os.rename(armed, f"{armed}.reached")  # of several processes, one has it
    except FileNotFoundError:
        return
    with open(f"{armed}.reached") as file:
        action = file.read()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while action == "stall":
        time.sleep(1.0)


def _note_output(reply: Any) -> None:
    """Notes what a site sends: all runs of one plan must have the same of it in each round."""
    if reply.has_error() or "arrays" not in reply.content.array_records:
        return
    arrays = reply.content.array_records["arrays"]
    digest = hashlib.sha256(b"".join(arrays[name].data for name in sorted(arrays))).hexdigest()
    task = f"{reply.metadata.message_type}/{reply.metadata.group_id}"
    with open(os.path.join(os.environ[DIRECTORY], f"{os.environ[OWNER]}.sent"), "a") as file:
        file.write(f"{task} {digest}\n")


def _wrapped(function: Callable[..., Any], *, when: str, point: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if point == "reply_ready":
            _note_output(arguments[-1])
        if when == "before":
            _reach(point)
        result = function(*arguments, **keywords)
        if when == "after":
            _reach(point)
        if point == "reply_made" and os.path.exists(os.path.join(os.environ[DIRECTORY], _owned("poison"))):
            return _poisoned(result)
        return result

    return wrapper


def _wrap(module: ModuleType) -> None:
    for path, when, point in PLACES[module.__name__]:
        *owners, name = path.split(".")
        owner: Any = functools.reduce(getattr, owners, module)
        setattr(owner, name, _wrapped(getattr(owner, name), when=when, point=point))


class _Finder:
    """Wraps the functions of a module right after its import."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in PLACES or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wraps what is imported from now on, in a process that has an owner."""
    if DIRECTORY in os.environ and OWNER in os.environ:
        sys.meta_path.insert(0, _Finder())
