"""A grid of this process: every node is a function from a message to its reply, or None for silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from common import flower

Behaviour = Callable[[Message], Message | None]


@dataclass(frozen=True, kw_only=True)
class Node:
    node_id: int
    name: str
    last_activated_at: str = ""


class InlineGrid(Grid):  # type: ignore[misc]
    """Calls nodes when they are pushed to; keeps at most what was not pulled yet."""

    def __init__(self, nodes: dict[str, Behaviour]) -> None:
        flower.set_identity(1, node_id=1)
        self.behaviours = {number: behave for number, behave in enumerate(nodes.values(), 2)}
        self.names = {number: name for number, name in enumerate(nodes, 2)}
        self.pending: dict[str, Message] = {}
        self.pushed: list[Message] = []
        self.largest_batch = 0
        self.unregistered: set[int] = set()
        self.arrivals: dict[int, str] = {}

    def get_nodes(self) -> Iterable[Any]:
        came = self.arrivals
        return [
            Node(node_id=number, name=name, last_activated_at=came.get(number, "2026-01-01"))
            for number, name in self.names.items()
        ]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.unregistered:
                ids.append("")
                continue
            ids.append(flower.assign_id(message))
            self.pushed.append(message)
            self.pending[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [message_id for message_id in message_ids if message_id in self.pending]
        self.largest_batch = max(self.largest_batch, len(wanted))
        replies = []
        for message_id in wanted:
            message = self.pending[message_id]
            reply = self.behaviours[message.metadata.dst_node_id](message)
            if reply is not None:
                del self.pending[message_id]
                replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise AssertionError("the round loop streams; it never asks for all replies at once")

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated in Flower")
