"""Under which node a site is reached, and since when.

One name may have two nodes while the site's key is renewed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp import Grid


class Addresses:
    """The nodes of a grid by the name under which the site is enrolled; remembers what it has seen."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}
        self._arrivals: dict[int, str] = {}
        self._latest: list[Any] = []
        self._online: dict[int, str] = {}

    def online(self) -> Mapping[int, str]:
        """Returns the nodes that are online with their names, "" where the grid gives none.

        Of two nodes of one name it is the one that was registered last. The mapping is that of the last look
        itself where nothing has changed since.
        """
        latest = list(self._grid.get_nodes())
        if latest != self._latest:
            self._latest, self._online = latest, self._looked_at(latest)
        return self._online

    def _looked_at(self, latest: list[Any]) -> dict[int, str]:
        nodes = sorted(latest, key=lambda node: str(getattr(node, "registered_at", "")))
        found = {node.node_id: str(getattr(node, "name", "")) for node in nodes}
        self._names |= found
        self._arrivals |= {node.node_id: str(getattr(node, "last_activated_at", "")) for node in nodes}
        newest = {name: node for node, name in found.items()}
        return {node: name for node, name in found.items() if not name or newest[name] == node}

    def name(self, node: int) -> str:
        """Returns the name of a node that was online before; "" where it is not known."""
        return self._names.get(node, "")

    def arrival(self, node: int) -> str:
        """Returns when the site of a node came last, as of the last look; "" where the grid gives no time."""
        return self._arrivals.get(node, "")

    def successor(self, node: int) -> int:
        """Returns the node under which the site of a node is reached now; the same where it is not known."""
        name = self.name(node)
        return next((one for one, found in self.online().items() if name and found == name), node)
