from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from client import room
from client.check import check
from client.cohort import open_cohort
from client.site import Site
from common.errors import Refusal
from tests.plans import asked
from tests.sites import RULES, write_site


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
    with FileLock(room.lock(busy)):
        room.make(tmp_path, wanted=wanted, needed_bytes=100, most_gigabytes=gigabytes(100))
    assert wanted.exists() and busy.exists()
    room.make(tmp_path, wanted=wanted, needed_bytes=100, most_gigabytes=gigabytes(100))
    assert wanted.exists() and not busy.exists()


def answers_by_size(site: Site, sizes: range) -> dict[int, str]:
    """Returns what a site says to plans of growing size, without any charge."""
    said = {}
    for size in sizes:
        try:
            open_cohort(site, asked=asked(size=(size, size)))
        except Refusal as refusal:
            said[size] = refusal.code
        else:
            said[size] = "taken"
    return said


def test_whether_a_plan_is_declined_for_want_of_room_tells_nothing_of_the_true_number_of_cases(
    tmp_path: Path,
) -> None:
    few, many = (
        write_site(tmp_path / str(num), num_patients=num, nominal_patients=12, max_cache_gigabytes=4.1e-6)
        for num in (10, 30)
    )
    expected = {size: "taken" if size <= 10 else "cache_too_small" for size in range(8, 13)}
    assert answers_by_size(few, range(8, 13)) == answers_by_size(many, range(8, 13)) == expected


def test_store_over_the_limit_is_made_and_the_log_and_check_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = write_site(tmp_path / "north", num_patients=30, nominal_patients=12, max_cache_gigabytes=4.1e-6)
    assert open_cohort(site, asked=asked(size=(10, 10))).used == 60
    assert "max_cache_gigabytes" in caplog.text
    found = check(site, asked=asked(size=(10, 10)))
    assert [line.level for line in found.lines if line.name == "cache"] == ["error"]
    assert not [line for line in check(site, asked=asked(size=(8, 8))).lines if line.name == "cache"]


def test_old_form_of_the_wanted_store_is_counted_and_goes_where_both_do_not_fit(tmp_path: Path) -> None:
    changes = {"nominal_patients": 12, "rules": RULES | {"max_quarantined_fraction": 1}}
    for fits in (True, False):
        site = write_site(
            tmp_path / str(fits), max_cache_gigabytes=1e-5 if fits else 3e-6, num_patients=20, **changes
        )
        open_cohort(site, asked=asked(size=(8, 8)))
        (site.directory / "images/3.png").unlink()
        told: list[tuple[int, int]] = []
        cohort = open_cohort(site, asked=asked(size=(8, 8)), on_progress=partial(note, told))
        assert cohort.used == 39
        assert len(told) == (0 if fits else 39)


def note(told: list[tuple[int, int]], done: int, total: int) -> None:
    told.append((done, total))


def test_whoever_waits_for_the_lock_of_a_removed_store_makes_it_alone(tmp_path: Path) -> None:
    store = write_store(tmp_path, "store", num_bytes=100, used_at=1)
    held = FileLock(room.lock(store), timeout=0)
    with held:
        room.make(tmp_path, wanted=tmp_path / "wanted", needed_bytes=100, most_gigabytes=gigabytes(100))
        assert store.exists()
    room.make(tmp_path, wanted=tmp_path / "wanted", needed_bytes=100, most_gigabytes=gigabytes(100))
    assert not store.exists() and room.lock(store).exists()


def test_arrays_of_a_removed_store_stay_readable_for_whoever_has_them(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=10, nominal_patients=6, max_cache_gigabytes=3e-6)
    first = open_cohort(site, asked=asked(size=(8, 8)))
    before = {name: part.images.copy() for name, part in first.parts.items()}
    other = open_cohort(site, asked=asked(size=(10, 10)))
    stores = [path for path in site.cache.iterdir() if path.is_dir()]
    assert len(stores) == 1 and other.used == first.used == 20
    for name, part in first.parts.items():
        np.testing.assert_array_equal(part.images, before[name])
    assert open_cohort(site, asked=asked(size=(8, 8))).used == 20
