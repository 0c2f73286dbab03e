"""Random sequences of crash, retry, duplicate and reorder on the ledger alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from client import release
from client.journal import Journal
from client.ledger import Ledger
from client.replies import Reply
from common.errors import Refusal
from common.exchange import Task
from common.privacy import Spend, epsilon
from tests.plans import plan
from tests.sites import write_site

PLAN = plan()
SPEND = Spend(noise_multiplier=5.0, sample_rate=1.0, steps=1)
BUDGET = 12
"""How many charges the site can pay."""


class Killed(BaseException):
    """What a process that is killed never gets beyond."""


CRASHES = ("before the row", "before the second file", "charged", "working", "stored", "finished")


class Sequences(RuleBasedStateMachine):
    """A site that is asked, killed and asked again; ``outputs`` is what was sent, by task."""

    @initialize()
    def begin(self) -> None:
        self.place = tempfile.TemporaryDirectory()
        limit = epsilon([SPEND] * BUDGET, delta=1e-4).value
        self.site = write_site(
            Path(self.place.name) / "north", num_patients=1, max_epsilon=limit, max_repeats=2
        )
        self.outputs: dict[str, set[bytes]] = {}
        self.charged: set[str] = set()
        self.tasks: list[Task] = []

    def teardown(self) -> None:
        self.place.cleanup()

    @rule(server_round=st.integers(1, 6), value=st.integers(0, 4))
    def the_server_sends_a_task(self, server_round: int, value: int) -> None:
        """A new round, or an old one with other parameters after the server lost its state."""
        self._ask(self._known(server_round, value), None)

    @rule(data=st.data(), crash=st.sampled_from([None, *CRASHES]))
    def a_task_is_delivered_again(self, data: st.DataObject, crash: str | None) -> None:
        """Any earlier one: a retry, a duplicate, or out of order."""
        if self.tasks:
            self._ask(data.draw(st.sampled_from(self.tasks)), crash)

    @rule(server_round=st.integers(1, 6), crash=st.sampled_from(CRASHES))
    def a_new_task_meets_a_crash(self, server_round: int, crash: str) -> None:
        self._ask(self._known(server_round, 9), crash)

    def _known(self, server_round: int, value: int) -> Task:
        task = Task(
            run="run-1",
            plan_hash=PLAN.hash,
            server_round=server_round,
            purpose="train",
            part="",
            parameters=np.full(2, value, np.float32),
        )
        if task.identity not in {one.identity for one in self.tasks}:
            self.tasks.append(task)
        return task

    def _ask(self, task: Task, crash: str | None) -> None:
        work = self._work(crash)
        try:
            with _crashing(crash):
                reply = release.once(self.site, PLAN, task, part="train", spend=SPEND, work=work)
        except (Killed, Refusal):
            return
        self.outputs.setdefault(task.identity, set()).add(reply.arrays["update"].tobytes())

    def _work(self, crash: str | None) -> Any:
        def work() -> Reply:
            if crash == "working":
                raise Killed
            return Reply(arrays={"update": np.random.default_rng().normal(size=2)}, fields={})

        return work

    @invariant()
    def every_output_is_charged_once_and_there_is_one_a_task(self) -> None:
        if not hasattr(self, "site"):
            return
        with release.open_ledger(self.site) as ledger:
            ledger.verify_signatures()
            spent = ledger.spent().value
            charges = sum(count for *_, count in ledger.runs())
        assert all(len(outputs) == 1 for outputs in self.outputs.values())
        assert len(self.outputs) <= charges <= min(BUDGET, len(self.tasks))
        assert spent == epsilon([SPEND] * charges, delta=1e-4).value
        assert spent <= self.site.settings.max_epsilon


def _crashing(crash: str | None) -> Any:
    """Kills at a step of the ledger; ``working`` is in the work itself."""

    def after(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            function(*arguments, **named)
            raise Killed

        return call

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    match crash:
        case "before the row":
            return patch.object(Journal, "append", killed)
        case "before the second file":
            return patch.object(Journal, "_remember", _later(Journal._remember))
        case "charged":
            return patch.object(Ledger, "charge", after(Ledger.charge))
        case "stored":
            return patch.object(Ledger, "finish", killed)
        case "finished":
            return patch.object(Ledger, "finish", after(Ledger.finish))
        case _:
            return patch.object(Ledger, "close", Ledger.close)


def _later(remember: Any) -> Any:
    """The second file of an empty ledger is written; that of a row is not."""

    def call(journal: Journal, head: Any) -> None:
        if head.number:
            raise Killed
        remember(journal, head)

    return call


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestManySequences(Sequences.TestCase):
    settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
