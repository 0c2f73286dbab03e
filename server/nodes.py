"""Which node of Flower's belongs to which key, and whose node a request speaks for.

Flower compares a request's node with the key that signed it, but not the sender that a message names in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from common import flower

ASK_AGAIN_SECONDS: Final = 1.0
"""Requests for a wrong node make us ask the SuperLink no more often than this."""


class Nodes:
    """The node of each key, as long as the SuperLink keeps its data base.

    Args:
        ask: returns all nodes that the SuperLink has registered, by public key (PEM); may block.
    """

    def __init__(self, ask: Callable[[], Mapping[bytes, int]]) -> None:
        self._ask = ask
        self._known: Mapping[bytes, int] = {}
        self._asked = -ASK_AGAIN_SECONDS
        self._asking = asyncio.Lock()

    async def belong(self, claimed: set[int], *, to: bytes) -> bool:
        """Says whether a key has one node, and that is all that is claimed.

        What does not fit is asked for again: with a new data base the same keys have other nodes.

        Raises:
            httpx.HTTPError: the SuperLink, which has to be asked, does not answer.
        """
        if claimed != {self._known.get(to)}:
            async with self._asking:
                if claimed != {self._known.get(to)} and time.monotonic() - self._asked >= ASK_AGAIN_SECONDS:
                    self._known = await asyncio.to_thread(self._ask)
                    self._asked = time.monotonic()
        return claimed == {self._known.get(to)}


def key_of(request: Any) -> bytes | None:
    """Returns the key (PEM) that a request asks to be let in; None where it asks for something else."""
    return bytes(request.public_key) if isinstance(request, flower.ActivateNodeRequest) else None


def nodes_of(request: Any) -> set[int]:
    """Returns all nodes for which a request speaks: as the asking one, and as the sender of messages."""
    if isinstance(request, flower.DeactivateNodeRequest):
        return {request.node_id}
    found = {request.node.node_id}
    if isinstance(request, flower.PushMessagesRequest):
        found |= {message.metadata.src_node_id for message in request.messages_list}
    return found
