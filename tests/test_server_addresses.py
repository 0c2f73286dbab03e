from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from server.addresses import Addresses


class Grid:
    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def get_nodes(self) -> list[Any]:
        return self.nodes


def node(number: int, name: str, registered_at: str) -> Any:
    return SimpleNamespace(node_id=number, name=name, registered_at=registered_at)


def test_of_two_nodes_of_a_name_the_one_that_was_registered_last_counts() -> None:
    grid: Any = Grid()
    addresses = Addresses(grid)
    north = [node(3, "north", "2026-11-02"), node(2, "north", "2026-11-01")]
    grid.nodes = [*north, node(4, "south", "2026-01-01")]
    assert addresses.online() == {3: "north", 4: "south"}
    assert (addresses.successor(2), addresses.successor(3), addresses.successor(4)) == (3, 3, 4)
    grid.nodes = [node(2, "north", "2026-11-01")]
    assert addresses.online() == {2: "north"} and addresses.successor(3) == 2
    assert (addresses.name(4), addresses.name(9)) == ("south", "")
    assert (addresses.successor(4), addresses.successor(9)) == (4, 9)


def test_a_site_that_comes_anew_is_seen_where_nothing_else_has_changed() -> None:
    grid: Any = Grid()
    addresses = Addresses(grid)
    for came in ("09:00", "09:00", "09:01"):
        grid.nodes = [SimpleNamespace(node_id=3, name="north", registered_at="", last_activated_at=came)]
        assert addresses.online() == {3: "north"} and addresses.arrival(3) == came


def test_nodes_without_a_name_are_each_for_themselves() -> None:
    grid: Any = Grid()
    grid.nodes = [SimpleNamespace(node_id=2), SimpleNamespace(node_id=3)]
    addresses = Addresses(grid)
    assert addresses.online() == {2: "", 3: ""} and addresses.successor(2) == 2
