from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from client import room
from client.cohort import open_cohort
from common.errors import Refusal
from tests.plans import asked
from tests.sites import write_site


def write_store(cache: Path, name: str, *, num_bytes: int, used_at: int) -> Path:
    store = cache / name
    store.mkdir(parents=True)
    (store / "records-1.npy").write_bytes(bytes(num_bytes))
    (store / "index.json").write_text("")
    os.utime(store / "index.json", (used_at, used_at))
    return store


def gigabytes(num_bytes: int) -> float:
    return num_bytes / room.GIGABYTE


def test_stores_longest_unused_make_way_and_no_more_than_need_be(tmp_path: Path) -> None:
    old, middle, new = (
        write_store(tmp_path, name, num_bytes=100, used_at=at) for name, at in (("c", 1), ("a", 2), ("b", 3))
    )
    room.make(tmp_path, wanted=tmp_path / "wanted", needed_bytes=100, most_gigabytes=gigabytes(400))
    assert old.exists()
    room.make(tmp_path, wanted=tmp_path / "wanted", needed_bytes=150, most_gigabytes=gigabytes(400))
    assert not old.exists() and middle.exists() and new.exists()
    room.note_use(middle)
    room.make(tmp_path, wanted=tmp_path / "wanted", needed_bytes=300, most_gigabytes=gigabytes(400))
    assert middle.exists() and not new.exists()


def test_wanted_store_and_a_store_in_use_stay(tmp_path: Path) -> None:
    wanted = write_store(tmp_path, "wanted", num_bytes=100, used_at=1)
    busy = write_store(tmp_path, "busy", num_bytes=100, used_at=1)
    with FileLock(busy / "lock"):
        room.make(tmp_path, wanted=wanted, needed_bytes=100, most_gigabytes=gigabytes(100))
    assert wanted.exists() and busy.exists()
    room.make(tmp_path, wanted=wanted, needed_bytes=100, most_gigabytes=gigabytes(100))
    assert wanted.exists() and not busy.exists()


def test_plan_that_needs_more_room_than_there_may_be_is_declined(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=10, max_cache_gigabytes=1e-6)
    with pytest.raises(Refusal) as caught:
        open_cohort(site, asked=asked(size=(28, 28)))
    assert caught.value.code == "cache_too_small" and "max_cache_gigabytes" in str(caught.value)


def test_arrays_of_a_removed_store_stay_readable_for_whoever_has_them(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=10, max_cache_gigabytes=3e-6)
    first = open_cohort(site, asked=asked(size=(8, 8)))
    before = {name: part.images.copy() for name, part in first.parts.items()}
    other = open_cohort(site, asked=asked(size=(10, 10)))
    stores = [path for path in site.cache.iterdir() if path.is_dir()]
    assert len(stores) == 1 and other.used == first.used == 20
    for name, part in first.parts.items():
        np.testing.assert_array_equal(part.images, before[name])
    assert open_cohort(site, asked=asked(size=(8, 8))).used == 20
