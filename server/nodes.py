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
"""A key without a node makes us ask the SuperLink no more often than this."""


class Nodes:
    """The node of each key; a key has one node for ever, so that what is known stays true.

    Args:
        ask: returns all nodes that the SuperLink has registered, by public key (PEM); may block.
    """

    def __init__(self, ask: Callable[[], Mapping[bytes, int]]) -> None:
        self._ask = ask
        self._known: dict[bytes, int] = {}
        self._asked = -ASK_AGAIN_SECONDS
        self._asking = asyncio.Lock()

    async def of(self, key: bytes) -> int | None:
        """Returns the node of a key; None where it has none.

        Raises:
            httpx.HTTPError: the SuperLink, which has to be asked, does not answer.
        """
        if key not in self._known:
            async with self._asking:
                if key not in self._known and time.monotonic() - self._asked >= ASK_AGAIN_SECONDS:
                    self._known |= await asyncio.to_thread(self._ask)
                    self._asked = time.monotonic()
        return self._known.get(key)


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
