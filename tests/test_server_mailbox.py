"""What was pushed to a site is pushed again once the site may have lost it, and only then."""

from __future__ import annotations

import time
from collections.abc import Iterable

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.retry import http_retry

from common import flower
from server.mailbox import Mailbox
from tests.grid import InlineGrid

NORTH, SOUTH = 2, 3


def _task(node: int) -> Message:
    content = RecordDict({"task": ConfigRecord({"server-round": 1})})
    return Message(content, dst_node_id=node, message_type="train", ttl=60.0, group_id="1")


def _answered(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def _ask(grid: InlineGrid, *, deadline_seconds: float = 30.0) -> tuple[dict[int, bool], Mailbox]:
    """Returns by node whether its task was answered."""
    mailbox = Mailbox(grid)
    mailbox.addresses.online()
    asked = mailbox.ask([_task(node) for node in grid.names], deadline_seconds=deadline_seconds)
    return {node: reply is not None for node, reply in asked}, mailbox


def test_a_task_is_pushed_again_to_a_site_that_has_come_anew() -> None:
    """It may have come and gone between two looks: nothing says that it was away."""
    seen: list[int] = []

    def loses_the_first(message: Message) -> Message | None:
        grid.arrivals[NORTH] = "2026-01-02"
        seen.append(id(message))
        return _answered(message) if len(set(seen)) > 1 else None

    grid = InlineGrid({"north": loses_the_first, "south": _answered})
    answered, mailbox = _ask(grid)
    assert answered == {NORTH: True, SOUTH: True}
    assert [message.metadata.dst_node_id for message in grid.pushed] == [NORTH, SOUTH, NORTH]
    assert mailbox.lost() == [NORTH] and mailbox.lost() == []


class _Cut(InlineGrid):
    """Asks as Flower's grid does, and loses the answer to its first request that had a reply in it."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        again = http_retry.make_simple_http_retry_invoker()
        again.wait_function = lambda seconds: None
        return list(again.invoke(self._request, list(message_ids)))

    def _request(self, message_ids: list[str]) -> list[Message]:
        found = list(super().pull_messages(message_ids))
        if found and not self.is_cut:
            self.is_cut = True
            raise httpx.ReadError("the SuperLink was killed")
        return found

    is_cut = False


def test_a_reply_that_was_handed_to_a_request_without_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower hands a reply out once; the site has it stored, and sends it again for the same task."""
    monkeypatch.setattr(http_retry, "exponential", http_retry.exponential)
    flower.shorten_retries()
    grid = _Cut({"north": _answered, "south": _answered})
    answered, mailbox = _ask(grid, deadline_seconds=5.0)
    assert grid.is_cut and answered == {NORTH: True, SOUTH: True} and len(grid.pushed) == 3
    assert mailbox.lost() == [], "no site was away"


def test_a_site_that_stays_is_sent_its_task_once_however_long_it_takes() -> None:
    begun = time.monotonic()
    grid = InlineGrid(
        {"north": lambda message: _answered(message) if time.monotonic() > begun + 2.5 else None}
    )
    answered, mailbox = _ask(grid)
    assert answered == {NORTH: True} and len(grid.pushed) == 1 and mailbox.lost() == []


def test_a_site_that_comes_anew_and_never_answers_is_missing_at_the_deadline() -> None:
    def restless(message: Message) -> None:
        grid.arrivals[NORTH] = str(len(grid.pushed))

    grid = InlineGrid({"north": restless})
    answered, _ = _ask(grid, deadline_seconds=1.5)
    assert answered == {NORTH: False} and len(grid.pushed) == 2
