"""What the coordinator asks of its own SuperLink, through Flower's Control API over loopback.

Errors of the transport stay ``httpx`` errors.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common import flower


@dataclass(frozen=True, kw_only=True)
class Node:
    """A site as the SuperLink sees it; ``status`` is registered, online, offline or unregistered."""

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
        self._client = flower.control_client(address, tls=tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def register(self, name: str, *, public_key: bytes) -> int:
        """Enrols a site's public key (PEM); returns the id of its node. A key is never taken twice."""
        return int(
            self._client.RegisterNode(flower.RegisterNodeRequest(public_key=public_key, name=name)).node_id
        )

    def unregister(self, node_id: int) -> None:
        """Ends a node: it is refused from now on, and its key is never taken again."""
        self._client.UnregisterNode(flower.UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        """Returns the sites that are registered, or were."""
        found = self._client.ListNodes(flower.ListNodesRequest()).nodes_info
        return [Node(node_id=n.node_id, name=n.name, status=n.status, public_key=n.public_key) for n in found]

    def start(self, bundle: Path, *, config: Mapping[str, str]) -> int:
        """Submits a bundle directory with its run config; returns Flower's id of the run (0: refused)."""
        content = flower.build_bundle(bundle)
        request = flower.StartRunRequest(
            fab=flower.fab_to_proto(flower.Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=flower.user_config_to_proto(dict(config)),
        )
        return int(self._client.StartRun(request).run_id)

    def runs(self, run_id: int | None = None) -> list[FlowerRun]:
        """Returns all of Flower's runs, or the one with this id; newest last."""
        found = self._client.ListRuns(flower.ListRunsRequest(run_id=run_id)).run_dict
        return [_flower_run(found[key]) for key in sorted(found, key=lambda key: found[key].pending_at)]

    def stop(self, run_id: int) -> None:
        """Stops one of Flower's runs."""
        self._client.StopRun(flower.StopRunRequest(run_id=run_id))


def _flower_run(proto: Any) -> FlowerRun:
    status = proto.status.status
    if proto.status.sub_status:
        status = f"{status}:{proto.status.sub_status}"
    config = flower.user_config_from_proto(proto.override_config)
    return FlowerRun(run_id=proto.run_id, status=status, details=proto.status.details, config=config)
