"""A site's node at its coordinator: it comes, keeps itself known, changes its key, and goes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import httpx

from client.access import Access
from client.fleet import Fleet
from client.patience import MAX_RETRY_SECONDS, is_temporary, persist, reason
from client.vitals import Vitals
from common import flower

logger = logging.getLogger("feverfew.agent")
Answer = TypeVar("Answer")

BEAT_SECONDS: Final = 0.4 * flower.HEARTBEAT_SECONDS
"""Four beats before the SuperLink, which waits for two intervals, takes the site for offline."""
ADMISSION_SECONDS: Final = 1.0


@dataclass(kw_only=True)
class Presence:
    """A site's node at a coordinator.

    Attributes:
        note: the file that remembers the node for the next life of the agent.
        fleet: the connection; another one after the key has changed.
        access: where a renewed key appears; None where none can.
        stop: ends all waiting.
        node_id: 0 while the site is away.
    """

    note: Path
    fleet: Fleet
    access: Access | None
    vitals: Vitals
    stop: threading.Event
    node_id: int = 0
    _lost: threading.Event = field(default_factory=threading.Event)

    @property
    def is_lost(self) -> bool:
        """Whether the site has to come anew: something between it and the coordinator may be missing."""
        return self._lost.is_set()

    def lose(self) -> None:
        """Lets the site come anew, so that the coordinator learns what was lost."""
        self._lost.set()

    def come(self) -> None:
        """Tells the coordinator that the site is there, for as long as it takes.

        A node that is taken for online is refused, so a former life of this agent is ended first.
        """
        delay = ADMISSION_SECONDS
        while not self.stop.is_set():
            try:
                self._end_former_life()
                self.node_id = self._persist(self.fleet.activate)
            except httpx.HTTPStatusError as error:
                text = flower.refusal_text(error)
                logger.warning("not admitted (%s): is this site's key enrolled, and the clock right?", text)
            else:
                self._note_node()
                self._lost.clear()
                self.vitals.connected.set(1)
                return
            self.stop.wait(delay)
            delay = min(2 * delay, MAX_RETRY_SECONDS)

    def go(self) -> None:
        """Tells the coordinator that the site goes; it is told once, or not at all."""
        if self.node_id:
            try:
                self.fleet.deactivate(self.node_id)
            except httpx.HTTPError as error:
                logger.info("the coordinator was not told that this site goes: %s", reason(error))
            self.node_id = 0
            self.vitals.connected.set(0)

    def change_key(self) -> None:
        """Goes on with a renewed key: the site comes as a new node before the former one goes."""
        renewed = None if self.access is None else self.access.renewed()
        if self.access is None or renewed is None:
            return
        try:
            node_id = self._persist(renewed.activate)
        except httpx.HTTPError as error:
            logger.warning("the renewed key is not admitted yet: %s", reason(error))
            return
        former, former_id = self.fleet, self.node_id
        self.fleet, self.node_id = renewed, node_id
        self.access.keep()
        self._note_node()
        with contextlib.suppress(httpx.HTTPError):
            former.deactivate(former_id)

    def beat(self) -> None:
        """Keeps the site online until the end; runs in a thread of its own."""
        while not self.stop.wait(BEAT_SECONDS):
            if not self.node_id:
                continue  # it rests
            try:
                known = self.fleet.beat()
            except httpx.HTTPStatusError as error:
                known = is_temporary(error)
            except httpx.HTTPError:
                known = True  # the connection is away; the main loop says so
            if not known:
                self.lose()

    def _end_former_life(self) -> None:
        """Ends what the SuperLink still takes for this site.

        The server pushes again what it had pushed before a site came (``server.mailbox``).
        """
        if not self.note.exists():
            return
        former = self.note.read_text().strip()
        try:
            self._persist(lambda: self.fleet.deactivate(int(former)))
        except (ValueError, httpx.HTTPStatusError) as error:
            logger.debug("node %r was not online: %s", former, error)

    def _note_node(self) -> None:
        self.note.write_text(f"{self.node_id}\n")
        logger.info("connected as node %d", self.node_id)

    def _persist(self, request: Callable[[], Answer]) -> Answer:
        return persist(request, stop=self.stop)
