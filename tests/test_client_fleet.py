from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from client.fleet import Fleet, Task
from common import flower, keys

ARRAYS = 8


class CutCoordinator:
    """Answers for the SuperLink; the connection is cut after so many objects."""

    def __init__(self, contents: dict[str, bytes], *, cut_after: int) -> None:
        self.contents, self.cut_after = contents, cut_after
        self.delivered: list[str] = []
        self.confirmed = 0

    def PullObject(self, request: Any) -> Any:
        if len(self.delivered) == self.cut_after:
            raise httpx.ReadError("cut")
        self.delivered.append(request.object_id)
        content = self.contents[request.object_id]
        return SimpleNamespace(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed += 1


def task(*, number: int = 0) -> tuple[Task, dict[str, bytes]]:
    flower.set_identity(1, node_id=1)
    rng = np.random.default_rng(number)
    arrays = {str(n): Array(rng.random(10).astype(np.float32)) for n in range(ARRAYS)}
    message = Message(RecordDict({"arrays": ArrayRecord(arrays)}), 7, "train")
    flower.assign_id(message)
    with flower.no_object_id_recompute():
        objects, tree = flower.get_all_nested_objects(message), flower.get_object_tree(message)
        contents = {name: part.deflate() for name, part in objects.items()}
    return Task(head=message, tree=tree), contents


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(flower, "fleet_client", lambda *args, **more: None)
    return Fleet(SimpleNamespace(address="127.0.0.1:1"), key=keys.generate())  # type: ignore[arg-type]


def test_after_a_cut_only_what_had_not_come_is_fetched(fleet: Fleet) -> None:
    asked, contents = task()
    coordinator = CutCoordinator(contents, cut_after=len(contents) - 4)
    fleet._client = coordinator
    with pytest.raises(httpx.ReadError):
        fleet.pull(asked)
    before = set(coordinator.delivered)
    assert len(before) == len(contents) - 4 and not coordinator.confirmed
    coordinator.cut_after = -1
    message = fleet.pull(asked)
    assert set(message.content["arrays"]) == {str(n) for n in range(ARRAYS)}
    assert sorted(coordinator.delivered) == sorted(contents), "each object came once"
    assert coordinator.confirmed == 1


def test_another_task_begins_anew_and_nothing_is_kept_of_one_that_came(fleet: Fleet) -> None:
    (first, contents), (second, others) = task(), task(number=1)
    coordinator = CutCoordinator(contents | others, cut_after=3)
    fleet._client = coordinator
    with pytest.raises(httpx.ReadError):
        fleet.pull(first)
    coordinator.cut_after = -1
    for asked, expected in ((second, others), (first, contents), (first, contents)):
        coordinator.delivered.clear()
        fleet.pull(asked)
        assert set(coordinator.delivered) == set(expected)
