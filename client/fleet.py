"""What a site asks of the coordinator, through Flower's Fleet API and signed with the site's key.

Errors of the transport stay ``httpx`` errors.
"""

from __future__ import annotations

import base64
import datetime
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from client.route import Route
from common import flower, keys

MICROSECOND: Final = datetime.timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A message that waits at the SuperLink: its head, and the tree of the objects that it consists of."""

    head: Message
    tree: Any

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        return int(self.head.metadata.run_id)

    @property
    def server_round(self) -> int:
        """The round; 0 where the server's group is none."""
        return flower.round_of(self.head)


def without_superseded(tasks: Iterable[Task]) -> tuple[list[Task], list[Task]]:
    """Returns the tasks to do, and those for which a later round of the same run and kind waits."""
    tasks = list(tasks)
    newest: dict[tuple[int, str], int] = {}
    for task in tasks:
        kind = (task.run_id, task.head.metadata.message_type)
        newest[kind] = max(newest.get(kind, -1), task.server_round)
    kept = [t for t in tasks if t.server_round == newest[t.run_id, t.head.metadata.message_type]]
    return kept, [t for t in tasks if t not in kept]


class _Signature:
    """Signs the time of every request with the site's key, as the SuperLink expects it.

    Each time is later than the one before, since the gateway takes none twice. Flower's own class does not
    care, and costs every start 0.2 s of imports.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        self._lock = threading.Lock()
        self._public_key = base64.b64encode(keys.public_pem(key.public_key())).decode()

    def intercept(self, context: Any, call_next: Any) -> Any:
        timestamp = self._time().isoformat()
        signature = self._key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        values = (self._public_key, timestamp, base64.b64encode(signature).decode())
        context.request.headers.update(dict(zip(flower.SIGNATURE_HEADERS, values, strict=True)))
        return call_next(context)

    def _time(self) -> datetime.datetime:
        with self._lock:
            now = datetime.datetime.now(datetime.UTC)
            if 0 <= (self._last - now) / MICROSECOND <= 1000:  # further back is a clock that was set
                now = self._last + MICROSECOND
            self._last = now
            return now


class _Fetched:
    """The objects of a task as far as they have come: after a cut only the others are fetched."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def forget_others(self, wanted: Iterable[str]) -> None:
        """Forgets what is of no use for a task of these objects; a task that is sent anew has the same."""
        self._contents = {name: self._contents[name] for name in wanted if name in self._contents}

    def keeping(self, fetch: Callable[[str], bytes]) -> Callable[[str], bytes]:
        """Returns a function that fetches an object by its id, unless it is here."""

        def fetched(object_id: str) -> bytes:
            if object_id not in self._contents:
                self._contents[object_id] = fetch(object_id)
            return self._contents[object_id]

        return fetched


class Fleet:
    """What a site asks of the coordinator, with the site's key; safe to use from two threads.

    Args:
        route: to the gateway, which sees the site's certificate.
        key: the private key of that certificate; every request is signed with it.
    """

    def __init__(self, route: Route, *, key: ec.EllipticCurvePrivateKey) -> None:
        self._public_key = keys.public_pem(key.public_key())
        self._client = flower.fleet_client(route.address, transport=route, signature=_Signature(key))
        self._node = flower.NodeProto(node_id=0)
        self._fetched = _Fetched()

    def activate(self) -> int:
        """Says that the site is there; returns the id of its node."""
        request = flower.ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=flower.HEARTBEAT_SECONDS
        )
        self._node = flower.NodeProto(node_id=self._client.ActivateNode(request).node_id)
        return int(self._node.node_id)

    def deactivate(self, node_id: int) -> None:
        """Says that the site goes; messages on their way to it are answered with an error at once."""
        self._client.DeactivateNode(flower.DeactivateNodeRequest(node_id=node_id))

    def beat(self) -> bool:
        """Sends a heartbeat; False when the SuperLink does not know the node any more."""
        request = flower.SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=flower.HEARTBEAT_SECONDS
        )
        return bool(self._client.SendNodeHeartbeat(request).success)

    def receive(self) -> Task | None:
        """Returns the next waiting task without its content, or None."""
        response = self._client.PullMessages(flower.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        head = flower.message_from_proto(response.messages_list[0])
        return Task(head=head, tree=response.message_object_trees[0])

    def run_config(self, run_id: int) -> dict[str, Any]:
        """Returns the settings given at submission; of the bundle nothing is read."""
        response = self._client.GetRun(flower.GetRunRequest(node=self._node, run_id=run_id))
        return dict(flower.run_from_proto(response.run).override_config)

    def pull(self, task: Task) -> Message:
        """Fetches the content of a task and returns the whole message.

        After an error it goes on where it was, also for a task that is sent anew with the same content.
        """
        self._fetched.forget_others(tree.object_id for tree in flower.iterate_object_tree(task.tree))
        fetch = flower.make_pull_object_fn_protobuf(self._client.PullObject, self._node, task.run_id)
        message = flower.pull_and_inflate_object_from_tree(
            task.tree,
            self._fetched.keeping(fetch),
            self._confirmation(task.run_id),
            return_type=Message,
        )
        self._fetched.forget_others(())
        message.metadata.__dict__["_message_id"] = task.tree.object_id
        return message

    def drop(self, task: Task) -> None:
        """Lets the SuperLink forget the content of a task that will not be done."""
        self._confirmation(task.run_id)(task.tree.object_id)

    def push(self, reply: Message) -> None:
        """Sends a reply; doing it twice is the same as once."""
        flower.assign_id(reply)
        with flower.no_object_id_recompute():
            objects, tree = flower.get_all_nested_objects(reply), flower.get_object_tree(reply)
            response = self._client.PushMessages(
                flower.PushMessagesRequest(
                    node=self._node,
                    messages_list=[flower.message_to_proto(flower.remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],  # the true duration would leave the site
                )
            )
            push = flower.make_push_object_fn_protobuf(
                self._client.PushObject, self._node, reply.metadata.run_id, response.session_id
            )
            flower.push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _confirmation(self, run_id: int) -> Any:
        confirm = self._client.ConfirmMessageReceived
        return flower.make_confirm_message_received_fn_protobuf(confirm, self._node, run_id)
