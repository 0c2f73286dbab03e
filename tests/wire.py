"""What hospitals send, as the gateway gets it: recorded in the gateway's process, read back as messages."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

RECORDER = """
import os, sys, time

def record():
    import httpx
    post = httpx.AsyncClient.post

    async def recorded(self, url, *, content=b"", headers=(), **named):
        name = f"{time.time_ns()}-{str(url).rpartition('/')[2]}"
        with open(os.path.join(os.environ["RECORDED"], name), "wb") as file:
            file.write(content)
        with open(os.path.join(os.environ["RECORDED"], name + ".headers"), "wb") as file:
            file.write(repr(headers).encode())
        return await post(self, url, content=content, headers=headers, **named)

    httpx.AsyncClient.post = recorded

if "server.gateway" in sys.orig_argv:
    record()
"""
"""For ``sitecustomize.py``: every request that the gateway hands on, in a file of its own."""


def raw(recorded: Path) -> bytes:
    """Returns everything that was sent, headers included."""
    return b"\n".join(path.read_bytes() for path in sorted(recorded.iterdir()))


def messages(recorded: Path) -> list[Message]:
    """Returns the replies of all sites, put together again from their parts."""
    contents: dict[str, bytes] = {}
    for path in sorted(recorded.glob("*-push-object")):
        request = PushObjectRequest.FromString(path.read_bytes())
        contents[request.object_id] = request.object_content
    found = []
    for path in sorted(recorded.glob("*-push-messages")):
        request = PushMessagesRequest.FromString(path.read_bytes())
        assert set(request.clientapp_runtime_list) <= {0.0}, "durations are releases"
        for tree in request.message_object_trees:
            found.append(inflate_object_from_contents(tree.object_id, contents, keep_object_contents=True))
    return found
