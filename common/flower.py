"""The only file that imports Flower's non-public modules; each import says why.

Who needs one of these names takes it from here.
"""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, Context, Message

# A reply's head is sent before its content.
from flwr.app.message import remove_content_from_message

# The numbers that Flower's own components put into error replies; the header of a signed timestamp, and how
# far in the past and in the future it may be.
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE, ErrorCode

# Flower's values to and from their protobuf form.
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    fab_to_proto,
    message_from_proto,
    message_to_proto,
    run_from_proto,
    user_config_from_proto,
    user_config_to_proto,
)

# The requests of the Control API: enrol, list, start, stop.
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)

# The requests of the Fleet API: what a site's agent sends.
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

# The same, for the objects of which messages consist.
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest

# What crosses the pipe to a worker process.
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.run_pb2 import GetRunRequest

# The headers that carry a site's key and signature.
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.fab import Fab

# A message travels as a tree of objects named by their hash.
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
    pull_objects,
    push_objects,
)

# ``Message`` takes run and node from here; outside Flower's own programs nobody sets it.
from flwr.supercore.task_identity import TaskIdentity

# What protobuf raises over bytes that are none of its messages.
from google.protobuf.message import DecodeError

__all__ = [
    "ActivateNodeRequest",
    "BACKOFF_SECONDS",
    "RETRY_SECONDS",
    "DeactivateNodeRequest",
    "DecodeError",
    "ErrorCode",
    "FLEET_REQUESTS",
    "Fab",
    "GetRunRequest",
    "HEARTBEAT_SECONDS",
    "ListNodesRequest",
    "ListRunsRequest",
    "NodeProto",
    "ObjectPullError",
    "ObjectPushError",
    "PullMessagesRequest",
    "PushMessagesRequest",
    "RegisterNodeRequest",
    "SIGNATURE_HEADERS",
    "SendNodeHeartbeatRequest",
    "StartRunRequest",
    "StopRunRequest",
    "SYSTEM_TIME_TOLERANCE",
    "TIMESTAMP_TOLERANCE",
    "UNREADABLE",
    "UnregisterNodeRequest",
    "assign_id",
    "bound_messages",
    "build_bundle",
    "control_client",
    "fab_to_proto",
    "fleet_client",
    "get_all_nested_objects",
    "get_object_tree",
    "iterate_object_tree",
    "inflate_object_from_contents",
    "make_confirm_message_received_fn_protobuf",
    "make_pull_object_fn_protobuf",
    "make_push_object_fn_protobuf",
    "message_from_proto",
    "message_to_proto",
    "no_object_id_recompute",
    "pack_context",
    "pack_message",
    "pull_and_inflate_object_from_tree",
    "push_objects",
    "refusal_text",
    "repeated_requests",
    "remove_content_from_message",
    "round_of",
    "run_from_proto",
    "set_identity",
    "shorten_backoff",
    "shorten_retries",
    "unpack_context",
    "unpack_message",
    "user_config_from_proto",
    "user_config_to_proto",
]

HEARTBEAT_SECONDS = 10.0
"""The least interval that the SuperLink takes; a site is offline after two of them."""

BACKOFF_SECONDS = 0.05
"""First wait when a message is seen before its objects; Flower's is 1 s. It doubles up to 10 s."""

RETRY_SECONDS = 1
"""The longest wait of the server before it asks a SuperLink that is away once more; Flower's is 20 s."""

REQUEST_SECONDS = 30.0
"""For each step of a request; as in Flower."""

SIGNATURE_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
"""The headers with which a site proves that it is the one that it says: key, time, signature of the time."""

FLEET_REQUESTS: dict[str, Any] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "push-messages": PushMessagesRequest,
    "get-run": GetRunRequest,
    "push-object": PushObjectRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
}
"""What an agent asks of the Fleet API, by the last part of its path; not ``get-fab``, no registration."""


UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError, DecodeError),
)
"""What comes out of a message whose parts are not what they say they are: whoever sent it is to blame.

Errors of the transport are none of these.
"""


def set_identity(run_id: int, *, node_id: int) -> None:
    """Sets whose messages this process makes; needed before the first ``Message`` is constructed."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def assign_id(message: Message) -> str:
    """Gives a message its id, the hash of its content, which replies to it will carry; returns it."""
    message_id = str(message.object_id)  # computed whenever it is asked for
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def round_of(message: Message) -> int:
    """Returns the round that a message belongs to; 0 where its group is none."""
    group = message.metadata.group_id
    return int(group) if group.isdecimal() and len(group) < 16 else 0


def shorten_backoff() -> None:
    """Shortens, in this process, the wait when a message is seen before its objects have arrived."""
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        function.__kwdefaults__["initial_backoff"] = BACKOFF_SECONDS


def shorten_retries() -> None:
    """Lets this process ask a SuperLink that is away again within a second, however long it has been away.

    Flower waits up to twenty, in which every site of a round may be there again and have nothing to do.
    Requests that were sent more than once are counted from then on.
    """

    retrying: Any = sys.modules.get(_RETRYING_MODULE)  # a process has imported what it asks with
    if retrying is not None:
        retrying.exponential = _short_waits


def _short_waits(**options: Any) -> Iterator[float]:
    from flwr.supercore.retry import exponential

    _repeated.append(None)  # the first wait is asked for when a request has failed
    yield from exponential(**options | {"max_delay": RETRY_SECONDS})


def repeated_requests() -> int:
    """Returns how many requests of this process were sent more than once.

    What the SuperLink had answered to the first may be lost: it hands out every reply once.
    """
    return len(_repeated)


_RETRYING_MODULE = "flwr.supercore.retry.http_retry"
_repeated: list[None] = []  # appended to by several threads


def bound_messages(max_bytes: int, *, max_seconds: float) -> None:
    """Bounds, in this process, what one message may take in memory, and how long its parts are waited for.

    A sender may name any number of parts; and an array may name one part a million times, which are a few
    kilobytes on the wire. What is refused raises one of ``UNREADABLE``. Flower waits two hours for parts that
    were promised, and looks at nothing else meanwhile; what did not come is ``MESSAGE_UNAVAILABLE``.
    """

    def inflate(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
        sizes = [
            len((children or {})[name].data) for name in get_object_children_ids_from_object_content(content)
        ]
        parts = json.loads(get_object_body(content, cls))["arraychunk_ids"]
        if sum(sizes[part] for part in parts) > max_bytes:
            raise ValueError(f"expected an array of at most {max_bytes} bytes")
        return _INFLATE_ARRAY(content, children)

    def pull(
        object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any
    ) -> dict[str, bytes]:
        counted = _counted(pull_object_fn, max_bytes=max_bytes)
        return dict(pull_objects(object_ids, counted, **options | {"max_time": max_seconds}))

    Array.inflate = classmethod(inflate)
    for name in _PULLING_MODULES & set(sys.modules):  # a process has imported what it pulls with
        sys.modules[name].pull_objects = pull  # type: ignore[attr-defined]


_INFLATE_ARRAY = Array.inflate
_PULLING_MODULES = {"flwr.superlink.grid.http_grid", "flwr.supercore.inflatable.inflatable_utils"}


def _counted(pull_object: Callable[[str], bytes], *, max_bytes: int) -> Callable[[str], bytes]:
    sizes: list[int] = []  # appended to by several threads

    def pull(object_id: str) -> bytes:
        if sum(sizes) > max_bytes:
            raise ValueError(f"expected a message of at most {max_bytes} bytes")
        content = pull_object(object_id)
        sizes.append(len(content))
        return content

    return pull


def pack_message(message: Message) -> bytes:
    """Returns a message, its id included, as bytes for another process of ours; no pickle."""
    return bytes(message_to_proto(message).SerializeToString())


def unpack_message(content: bytes) -> Message:
    """Returns the message in the bytes of ``pack_message``."""
    return message_from_proto(MessageProto.FromString(content))


def pack_context(context: Context) -> bytes:
    """Returns a context as bytes for another process of ours; no pickle."""
    return bytes(context_to_proto(context).SerializeToString())


def unpack_context(content: bytes) -> Context:
    """Returns the context in the bytes of ``pack_context``."""
    return context_from_proto(ContextProto.FromString(content))


def build_bundle(directory: Path) -> bytes:
    """Returns a bundle directory as the archive that Flower takes."""
    # Built in this process, since the command line tool costs a second for every call; imported here, since
    # only the coordinator needs it, and it costs every other process 0.4 s.
    from flwr.cli.build import build_fab_from_disk

    return bytes(build_fab_from_disk(directory))


def control_client(address: str, *, tls: ssl.SSLContext) -> Any:
    """Returns a client of a SuperLink's Control API."""
    # Imported here as in ``fleet_client``: with a client of Flower's comes a whole web server, 10 MB that
    # neither a ServerApp of a simulation nor a worker has a use for.
    from flwr.supercore.control.control_http_client import ControlHttpClient

    return _over(httpx.HTTPTransport(verify=tls, trust_env=False), ControlHttpClient, address)


def fleet_client(address: str, *, transport: httpx.BaseTransport, signature: Any) -> Any:
    """Returns a client of a SuperLink's Fleet API; ``signature`` sees every request before it is sent."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    return _over(transport, FleetHttpClient, address, interceptors=(signature,))


def _over(
    transport: httpx.BaseTransport, kind: type[Any], address: str, *, interceptors: tuple[Any, ...] = ()
) -> Any:
    """Returns a client of Flower's that goes over a transport of ours.

    Its own constructor takes proxies and passwords from the environment, and lets the other end send it
    elsewhere.
    """
    made: Any = object.__new__(kind)
    made._base_url, made._interceptors, made._retry_invoker = f"https://{address}", interceptors, None
    made._client = httpx.Client(
        transport=transport, timeout=REQUEST_SECONDS, trust_env=False, follow_redirects=False
    )
    return made


def refusal_text(error: httpx.HTTPStatusError) -> str:
    """Returns what the SuperLink says in an error response: its public sentence, or the bare status."""
    try:
        detail = error.response.json()["detail"]
    except (ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return f"HTTP status {error.response.status_code}"
    return str(detail)
