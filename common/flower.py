"""The only file that imports Flower's non-public modules; each import says why.

Above it stand plain values: ``Fleet`` is what a site asks of the coordinator, ``Control`` what the
coordinator asks of its own SuperLink. Errors of the transport stay ``httpx`` errors.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

# A reply's head is sent before its content.
from flwr.app.message import remove_content_from_message

# The numbers that Flower's own components put into error replies; the header of a signed timestamp.
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode

# Flower's messages and settings to and from their protobuf form.
from flwr.common.serde import (
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
)

# The requests of the Fleet API: what a site's agent sends.
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.run_pb2 import GetRunRequest

# The headers that carry a site's key and signature.
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

# The two clients of the SuperLink that Flower's own programs use.
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab

# A message travels as a tree of objects named by their hash.
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
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
    pull_and_inflate_object_from_tree,
    pull_objects,
    push_objects,
)

# ``Message`` takes run and node from here; outside Flower's own programs nobody sets it.
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from common import keys

__all__ = [
    "BACKOFF_SECONDS",
    "HEARTBEAT_SECONDS",
    "SIGNATURE_HEADERS",
    "Control",
    "ErrorCode",
    "Fleet",
    "FlowerRun",
    "Node",
    "ObjectPullError",
    "ObjectPushError",
    "Task",
    "assign_id",
    "refusal_text",
    "set_identity",
    "shorten_backoff",
]

HEARTBEAT_SECONDS = 10.0
"""The least interval that the SuperLink takes; a site is offline after two of them."""

BACKOFF_SECONDS = 0.05
"""First wait when a message is seen before its objects; Flower's is 1 s. It doubles up to 10 s."""


SIGNATURE_HEADERS = tuple(
    name.lower().encode()
    for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
)
"""The headers with which a site proves that it is the one that it says; in lower case."""


def set_identity(run_id: int, *, node_id: int) -> None:
    """Sets whose messages this process makes; needed before the first ``Message`` is constructed."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def assign_id(message: Message) -> str:
    """Gives a message its id, the hash of its content, which replies to it will carry; returns it."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return str(message.object_id)


def shorten_backoff() -> None:
    """Shortens, in this process, the wait when a message is seen before its objects have arrived."""
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        function.__kwdefaults__["initial_backoff"] = BACKOFF_SECONDS


@dataclass(frozen=True, kw_only=True)
class Task:
    """A message that waits at the SuperLink: its head, and the tree of the objects that it consists of."""

    head: Message
    tree: Any

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        return int(self.head.metadata.run_id)


class _Signature:
    """Signs the time of every request with the site's key, as the SuperLink expects it.

    Flower's own class does the same and costs every start 0.2 s of imports.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public_key = base64.b64encode(keys.public_pem(key.public_key())).decode()

    def intercept(self, context: Any, call_next: Any) -> Any:
        timestamp = datetime.datetime.now(datetime.UTC).isoformat()
        signature = self._key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public_key
        context.request.headers[TIMESTAMP_HEADER] = timestamp
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = base64.b64encode(signature).decode()
        return call_next(context)


class Fleet:
    """What a site asks of the coordinator, with the site's key; safe to use from two threads.

    Args:
        address: ``host:port`` of the gateway.
        tls: trusts the coordinator's certificate authority and nothing else.
        key: the site's private key; every request is signed with it.
    """

    def __init__(self, address: str, *, tls: ssl.SSLContext, key: ec.EllipticCurvePrivateKey) -> None:
        self._public_key = keys.public_pem(key.public_key())
        self._client = FleetHttpClient(f"https://{address}", interceptors=[_Signature(key)], verify=tls)
        self._node = NodeProto(node_id=0)

    def activate(self) -> int:
        """Says that the site is there; returns the id of its node."""
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS)
        self._node = NodeProto(node_id=self._client.ActivateNode(request).node_id)
        return int(self._node.node_id)

    def deactivate(self, node_id: int) -> None:
        """Says that the site goes; messages on their way to it are answered with an error at once."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def beat(self) -> bool:
        """Sends a heartbeat; False when the SuperLink does not know the node any more."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        return bool(self._client.SendNodeHeartbeat(request).success)

    def receive(self) -> Task | None:
        """Returns the next waiting task without its content, or None."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        head = message_from_proto(response.messages_list[0])
        return Task(head=head, tree=response.message_object_trees[0])

    def run_config(self, run_id: int) -> dict[str, Any]:
        """Returns the settings given at submission; of the bundle nothing is read."""
        response = self._client.GetRun(GetRunRequest(node=self._node, run_id=run_id))
        return dict(run_from_proto(response.run).override_config)

    def pull(self, task: Task) -> Message:
        """Fetches the content of a task and returns the whole message."""
        message = pull_and_inflate_object_from_tree(
            task.tree,
            make_pull_object_fn_protobuf(self._client.PullObject, self._node, task.run_id),
            self._confirmation(task.run_id),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = task.tree.object_id
        return message

    def drop(self, task: Task) -> None:
        """Lets the SuperLink forget the content of a task that will not be done."""
        self._confirmation(task.run_id)(task.tree.object_id)

    def push(self, reply: Message) -> None:
        """Sends a reply; doing it twice is the same as once."""
        assign_id(reply)
        with no_object_id_recompute():
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],  # the true duration would leave the site
                )
            )
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, reply.metadata.run_id, response.session_id
            )
            push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _confirmation(self, run_id: int) -> Any:
        confirm = self._client.ConfirmMessageReceived
        return make_confirm_message_received_fn_protobuf(confirm, self._node, run_id)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A registered site as the SuperLink sees it; ``status`` is registered, online or offline."""

    node_id: int
    name: str
    status: str
    public_key: bytes


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """One of Flower's runs; a run of ours may need several of them, one after the other.

    ``status`` is pending, starting, running, ``finished:completed``, ``finished:failed`` or
    ``finished:stopped``; ``config`` the settings given at submission.
    """

    run_id: int
    status: str
    details: str
    config: Mapping[str, Any]

    @property
    def is_finished(self) -> bool:
        return self.status.startswith("finished")


class Control:
    """What the coordinator asks of its own SuperLink; reached over loopback only.

    Args:
        address: ``host:port`` of the SuperLink.
        tls: trusts the coordinator's certificate authority.
    """

    def __init__(self, address: str, *, tls: ssl.SSLContext) -> None:
        self._client = ControlHttpClient(f"https://{address}", verify=tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def register(self, name: str, *, public_key: bytes) -> int:
        """Enrols a site's public key (PEM); returns the id of its node. A key is never taken twice."""
        return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def nodes(self) -> list[Node]:
        """Returns the sites that are registered."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node_id=n.node_id, name=n.name, status=n.status, public_key=n.public_key) for n in found]

    def start(self, bundle: Path, *, config: Mapping[str, str]) -> int:
        """Submits a bundle directory with its run config; returns Flower's id of the run (0: refused)."""
        # Built in this process: the command line tool costs a second for every call. Imported here since
        # only the coordinator needs it, and it costs every other process 0.4 s.
        from flwr.cli.build import build_fab_from_disk

        content = build_fab_from_disk(bundle)
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        return int(self._client.StartRun(request).run_id)

    def runs(self, run_id: int | None = None) -> list[FlowerRun]:
        """Returns all of Flower's runs, or the one with this id; newest last."""
        found = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        return [_flower_run(found[key]) for key in sorted(found, key=lambda key: found[key].pending_at)]

    def stop(self, run_id: int) -> None:
        """Stops one of Flower's runs."""
        self._client.StopRun(StopRunRequest(run_id=run_id))


def _flower_run(proto: Any) -> FlowerRun:
    status = proto.status.status
    if proto.status.sub_status:
        status = f"{status}:{proto.status.sub_status}"
    config = user_config_from_proto(proto.override_config)
    return FlowerRun(run_id=proto.run_id, status=status, details=proto.status.details, config=config)


def refusal_text(error: httpx.HTTPStatusError) -> str:
    """Returns what the SuperLink says in an error response: its public sentence, or the bare status."""
    try:
        detail = error.response.json()["detail"]
    except (ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return f"HTTP status {error.response.status_code}"
    return str(detail)
