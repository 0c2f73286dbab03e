"""Tasks out, replies in: polled one by one, so that one reply is in memory at a time."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid

from common.flower import UNREADABLE, ErrorCode, repeated_requests
from server.addresses import Addresses

_SHORTEST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.25
_PAUSE_FRACTION = 0.02  # of the time waited so far: what polling may add to a round
_PAUSE_TO_POLL = 2.0  # of the time that the last look took: polling must not keep the SuperLink from its work
_PUSH_AGAIN_SECONDS = 1.0
_LONGEST_PUSH_AGAIN_SECONDS = 60.0
_ARRIVALS_SECONDS = 1.0  # how often it is asked which sites have come anew
NOT_READABLE = 1000
"""The code of the error that stands for a reply whose parts are not what they say they are."""
# What Flower answers itself when a node was away: the task is lost, the site may be back.
_LOST = {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}


@dataclass(frozen=True, kw_only=True)
class Late:
    """A reply that came after its deadline; it is counted, never used."""

    node: int
    group: str


@dataclass(kw_only=True)
class Bytes:
    """What a node was sent, and what came from it: the content of messages, without headers and TLS."""

    down: int = 0
    up: int = 0


@runtime_checkable
class Knowing(Protocol):
    """A grid that is told of replies, and need not be asked for each."""

    def arrived(self, message_ids: Iterable[str], *, seconds: float) -> list[str]:
        """Returns which of these messages have a reply; waits at most so long for a first one."""
        ...


class Mailbox:
    """Sends messages through Flower's Grid and yields what comes back before a deadline.

    Deadlines are monotonic: a clock that jumps changes nothing.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._knowing = grid if isinstance(grid, Knowing) else None
        self.addresses = Addresses(grid)
        self._overdue: dict[str, Late] = {}
        self._lost: list[int] = []
        self._arrivals: dict[int, str] = {}  # by node: since when its site was there, at its last task
        self._bytes: defaultdict[int, Bytes] = defaultdict(Bytes)

    def ask(
        self, messages: Sequence[Message], *, deadline_seconds: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Pushes messages and yields (node, reply) as they come, at the end (node, None) for the missing.

        A task that Flower lost because its node was away is pushed again until the deadline, to the node
        under which the site is reached by then; so is one whose site has come anew since, for it comes
        anew when something on its way may be lost; and so is one whose reply Flower may have handed to a
        request that got no answer. The site recognises a task by its identity. A node that is not registered
        any more gets no task: it is missing at once.
        """
        pending = self._push(messages)
        yield from self._refused(messages, pending)
        again: dict[int, tuple[float, Message]] = {}  # by node: when to push what a second time
        lost: Counter[int] = Counter()  # by node: replies of which not all came
        start = looked = time.monotonic()
        is_last_look = False
        pause = 0.0
        while (pending or again) and not is_last_look:
            arrived = False
            ready = self._after(pause, pending)
            began = time.monotonic()
            # Flower waits for the rest of a reply that was begun, while those of others lie ready: all get a
            # look after the deadline.
            is_last_look = began >= start + deadline_seconds
            for message_id in ready:
                message = pending[message_id]
                repeated = repeated_requests()
                try:
                    reply = self._pull(message_id)
                except UNREADABLE:  # one site's broken reply must not end the run of all
                    reply = Message(Error(code=NOT_READABLE, reason="unreadable"), reply_to=message)
                if reply is None and repeated_requests() > repeated:
                    again[message.metadata.dst_node_id] = (time.monotonic(), pending.pop(message_id))
                if reply is None:
                    continue
                arrived = True
                self._bytes[message.metadata.dst_node_id].up += _size(reply)
                del pending[message_id]
                if reply.has_error() and reply.error.code in _LOST:
                    node = message.metadata.dst_node_id
                    lost[node] += reply.error.code != ErrorCode.NODE_UNAVAILABLE
                    delay = min(_PUSH_AGAIN_SECONDS * 2 ** lost[node], _LONGEST_PUSH_AGAIN_SECONDS)
                    again[node] = (time.monotonic() + delay, message)
                    self._lost.append(node)
                    continue
                yield message.metadata.dst_node_id, reply
                del reply
            if began >= looked + _ARRIVALS_SECONDS:
                looked = began
                for message_id in self._left_behind(pending):
                    message = pending.pop(message_id)
                    again[message.metadata.dst_node_id] = (began, message)
                    self._lost.append(message.metadata.dst_node_id)
            due = [node for node, (when, _) in again.items() if when <= time.monotonic()]
            if due and not is_last_look:
                fresh = [self._readdressed(again.pop(node)[1]) for node in due]
                pushed = self._push(fresh)
                yield from self._refused(fresh, pushed)
                pending |= pushed
            now = time.monotonic()
            pause = 0.0 if arrived else _pause(waited=now - start, look=now - began)
        for message_id, message in pending.items():
            metadata = message.metadata
            self._overdue[message_id] = Late(node=metadata.dst_node_id, group=metadata.group_id)
            yield metadata.dst_node_id, None
        for node in again:
            yield node, None

    def lost(self) -> list[int]:
        """Returns the nodes that went away over a task, once for each task, and forgets them."""
        found, self._lost = self._lost, []
        return found

    def bytes(self) -> dict[int, Bytes]:
        """Returns what has crossed the network since the last call, by node, and forgets it."""
        found, self._bytes = dict(self._bytes), defaultdict(Bytes)
        return found

    def late(self) -> list[Late]:
        """Returns the replies to earlier messages that have come since, and forgets them."""
        found = []
        for message_id, late in list(self._overdue.items()):
            try:
                reply = self._pull(message_id)
            except UNREADABLE:
                del self._overdue[message_id]
                continue
            if reply is not None:
                del self._overdue[message_id]
                self._bytes[late.node].up += _size(reply)
                if not reply.has_error():
                    found.append(late)
        return found

    def _push(self, messages: Sequence[Message]) -> dict[str, Message]:
        fresh = [_copy(message, node=message.metadata.dst_node_id) for message in messages]
        ids = list(self._grid.push_messages(fresh))
        pushed = {str(i): message for i, message in zip(ids, fresh, strict=True) if i}
        for message in pushed.values():
            node = message.metadata.dst_node_id
            self._bytes[node].down += _size(message)
            self._arrivals[node] = self.addresses.arrival(node)
        return pushed

    def _left_behind(self, pending: Mapping[str, Message]) -> list[str]:
        """Returns the messages whose site has come anew since they were pushed."""
        self.addresses.online()
        nodes = {message_id: message.metadata.dst_node_id for message_id, message in pending.items()}
        return [i for i, node in nodes.items() if self.addresses.arrival(node) != self._arrivals[node]]

    def _readdressed(self, message: Message) -> Message:
        return _copy(message, node=self.addresses.successor(message.metadata.dst_node_id))

    def _refused(
        self, messages: Sequence[Message], pushed: Mapping[str, Message]
    ) -> Iterator[tuple[int, Message | None]]:
        taken = {message.metadata.dst_node_id for message in pushed.values()}
        for message in messages:
            if message.metadata.dst_node_id not in taken:
                yield message.metadata.dst_node_id, None

    def _after(self, seconds: float, pending: Mapping[str, Message]) -> list[str]:
        """Returns the messages to look at: after a pause, or as soon as a grid knows what is there."""
        if self._knowing is not None:
            return self._knowing.arrived(pending, seconds=seconds)
        time.sleep(seconds)
        return list(pending)

    def _pull(self, message_id: str) -> Message | None:
        """Returns the first reply to a message; further ones are never looked at."""
        return next(iter(self._grid.pull_messages([message_id])), None)


def _pause(*, waited: float, look: float) -> float:
    """Returns how long to wait after a look that found nothing: in seconds, as all here."""
    pause = max(waited * _PAUSE_FRACTION, look * _PAUSE_TO_POLL)
    return min(max(pause, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)


def _size(message: Message) -> int:
    return 0 if message.has_error() else sum(map(_part_size, message.content.values()))


def _part_size(part: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if isinstance(part, ArrayRecord):
        return sum(len(array.data) for array in part.values())
    return len(part.deflate())


def _copy(message: Message, *, node: int) -> Message:
    """A message that is pushed a second time needs a creation time of its own."""
    metadata = message.metadata
    return Message(
        message.content,
        dst_node_id=node,
        message_type=metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )
