"""Messages that are not what they say, as Flower's own code puts them together from parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable import inflatable_utils
from flwr.superlink.grid import http_grid

from common import flower
from tests.fuzz_objects import SEEDS, named, objects, split

MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Array, "inflate", Array.__dict__["inflate"])
    for module in (inflatable_utils, http_grid):
        monkeypatch.setattr(module, "pull_objects", module.pull_objects)
    yield


def message(values: np.ndarray) -> Message:
    flower.set_identity(1, node_id=1)
    return Message(RecordDict({"arrays": ArrayRecord({"update": Array(values)})}), 7, "train")


def pulled(contents: dict[str, bytes], tree: Any) -> Message:
    found = flower.pull_and_inflate_object_from_tree(
        tree, contents.__getitem__, lambda name: None, return_type=Message
    )
    assert isinstance(found, Message)
    return found


def parts_of(sent: Message) -> tuple[dict[str, bytes], Any]:
    contents = {name: part.deflate() for name, part in flower.get_all_nested_objects(sent).items()}
    return contents, flower.get_object_tree(sent)


def test_a_message_within_the_bound_arrives_unchanged() -> None:
    values = np.arange(5000, dtype=np.float32)
    flower.bound_messages(MEGABYTE, max_seconds=1)
    found = pulled(*parts_of(message(values)))
    assert found.content.array_records["arrays"]["update"].numpy().tobytes() == values.tobytes()


def test_an_array_that_names_one_part_a_million_times_is_not_made() -> None:
    """A kilobyte of zeros a million times: a gigabyte in memory, and six megabytes on the wire."""
    many = b"[" + b"0, " * 999_999 + b"0]"
    contents, root = named([part.replace(b"[0]", many) for part in split(SEEDS[0])])
    flower.bound_messages(MEGABYTE, max_seconds=1)
    with pytest.raises(ValueError, match="an array of at most 1048576 bytes"):
        flower.inflate_object_from_contents(root, contents)


def test_a_message_of_more_bytes_than_the_bound_is_not_fetched_to_its_end() -> None:
    values = np.random.default_rng(0).random(8 * MEGABYTE).astype(np.float32)  # 32 MB in parts of some
    contents, tree = parts_of(message(values))
    fetched: list[int] = []

    def fetch(name: str) -> bytes:
        fetched.append(len(contents[name]))
        return contents[name]

    flower.bound_messages(MEGABYTE, max_seconds=1)
    with pytest.raises(flower.UNREADABLE):
        flower.pull_and_inflate_object_from_tree(tree, fetch, lambda name: None, return_type=Message)


def test_bounds_can_be_set_again() -> None:
    contents, tree = parts_of(message(np.zeros(1000, np.float32)))
    flower.bound_messages(10, max_seconds=1)
    with pytest.raises(flower.UNREADABLE):
        pulled(contents, tree)
    flower.bound_messages(MEGABYTE, max_seconds=1)
    assert pulled(contents, tree).content.array_records["arrays"]["update"].numpy().shape == (1000,)


@pytest.mark.parametrize(
    ("kind", "written"),
    [(b"RecordDict", b"{"), (b"RecordDict", b"[1]"), (b"Array ", b'{"dtype": 1}'), (b"Array ", b"\xff")],
)
def test_parts_that_are_not_what_they_say_raise_what_both_ends_expect(kind: bytes, written: bytes) -> None:
    contents, root = objects(SEEDS[0])
    broken = {
        name: content.partition(b"\0")[0] + b"\0" + written if content.startswith(kind) else content
        for name, content in contents.items()
    }
    assert broken != contents
    with pytest.raises(flower.UNREADABLE):
        flower.inflate_object_from_contents(root, broken)


def test_parts_that_never_come_are_not_waited_for_two_hours() -> None:
    """The grid of a ServerApp pulls with keywords, and makes an error message of this."""

    def never(name: str) -> bytes:
        raise inflatable_utils.ObjectUnavailableError(name)

    flower.bound_messages(MEGABYTE, max_seconds=0.2)
    begun = time.monotonic()
    with pytest.raises(flower.ObjectPullError):
        http_grid.pull_objects(object_ids=["a"], pull_object_fn=never, initial_backoff=0.01)
    assert time.monotonic() - begun < 5


def test_a_superlink_that_is_away_is_asked_again_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.supercore.retry import http_retry

    waits: list[float] = []
    monkeypatch.setattr(http_retry, "exponential", http_retry.exponential)
    flower.shorten_retries()
    repeated = flower.repeated_requests()
    again = http_retry.make_simple_http_retry_invoker()
    again.wait_function = waits.append

    def request() -> str:
        if len(waits) < 12:
            raise httpx.ConnectError("away")
        return "answer"

    assert again.invoke(request) == "answer"
    assert max(waits) <= flower.RETRY_SECONDS == 1
    assert flower.repeated_requests() == repeated + 1, "however often it was"
    assert again.invoke(request) == "answer" and flower.repeated_requests() == repeated + 1
