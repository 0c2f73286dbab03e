from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import cache, images, making
from client.cohort import freeze
from client.site import Site, open_site
from tests.cohorts import decoded, make_site, opened, records, rows_of, same, write_table
from tests.plans import asked

PAIR = np.dtype([("image", np.uint8, (2,))])
SLOW = """
import sys, time
from pathlib import Path
from client import content, decoding, making
from client.site import open_site
from client.cohort import open_cohort
from tests.cohorts import ASKED

making.CHECKPOINT_SECONDS, decoding.FEW, decoding.CHUNK = 0.0, 0, 2
load = content.load


def slow(*arguments, **named):
    time.sleep(0.03)
    return load(*arguments, **named)


if __name__ == "__main__":
    content.load = slow
    open_cohort(open_site(Path(sys.argv[1])), asked=ASKED)
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "north", rows_of(30))


def test_a_case_is_decoded_once(site: Site, tmp_path: Path) -> None:
    write_table(site.directory, rows_of(30)[:50])
    assert decoded(site) == 50
    assert decoded(site) == 0
    write_table(site.directory, rows_of(30)[4:])
    assert decoded(site) == 10
    shutil.copytree(site.directory, tmp_path / "copy")  # as from a backup: other times, same content
    assert decoded(open_site(tmp_path / "copy")) == 0
    fresh = make_site(tmp_path / "fresh", rows_of(30))
    write_table(fresh.directory, rows_of(30)[4:])
    assert same(opened(fresh), opened(site))


def test_refused_content_is_not_decoded_again(site: Site) -> None:
    (site.directory / rows_of(30)[0][0]).write_bytes(b"not an image")
    assert decoded(site) == 60
    assert decoded(site) == 0
    assert opened(site).reasons == {"unknown_format": 1}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "header"])
def test_damaged_cache_is_made_anew(site: Site, damage: str) -> None:
    before = opened(site)
    before_bytes = {name: part.images.tobytes() for name, part in before.parts.items()}
    (images_path,) = site.cache.glob("*/records-*.npy")
    (index_path,) = site.cache.glob("*/index.json")
    content = bytearray(images_path.read_bytes())
    content[-1 if damage == "flip" else 0] ^= 1
    if damage in ("flip", "header"):
        images_path.write_bytes(content)
    elif damage == "cut":
        images_path.write_bytes(content[:-1])
    elif damage == "gone":
        images_path.unlink()
    else:
        index_path.write_text("{")
    after = opened(site)
    assert {name: part.images.tobytes() for name, part in after.parts.items()} == before_bytes


def test_another_preprocessing_has_a_cache_of_its_own(site: Site) -> None:
    small = opened(site)
    large = opened(site, asked=asked(size=(16, 8), channels=3))
    assert large.parts["train"].images.shape[1:] == (3, 16, 8)
    assert same(opened(site), small)
    assert large.version == small.version


def test_error_while_decoding_leaves_the_cache_usable(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = images.decode
    calls: list[int] = []

    def failing(content: bytes) -> images.Image:
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError
        return decode(content)

    monkeypatch.setattr(images, "decode", failing)
    with pytest.raises(MemoryError):
        opened(site)
    assert opened(site).used == 60
    assert len(list(site.cache.glob("*/records-*.npy"))) == 1


def pair(number: int) -> np.ndarray:
    return np.array(([number, number],), PAIR)


def open_pairs(directory: Path, decode: Callable[[int], np.ndarray | str]) -> cache.Store:
    return cache.open_store(
        directory,
        lock=directory.with_name("lock"),
        keys=["a", "b", "c"],
        dtype=PAIR,
        decode=lambda positions: map(decode, positions),
        fits=lambda _: True,
    )


def test_transient_refusal_is_not_kept(tmp_path: Path) -> None:
    store = open_pairs(tmp_path / "s", lambda n: "too_slow" if n == 1 else pair(n))
    assert dict(store.refused) == {"b": "too_slow"} and store.records["image"][:, 0].tolist() == [0, 2]
    store = open_pairs(tmp_path / "s", lambda n: pair(9))
    assert not store.refused and store.records["image"][:, 0].tolist() == [0, 9, 2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.slow
def test_killed_decoding_goes_on_where_it_was_and_leaves_no_process(tmp_path: Path, threads: int) -> None:
    site = make_site(tmp_path / "north", rows_of(200), threads=threads)
    (site.directory / rows_of(200)[7][0]).write_bytes(b"not an image")
    freeze(site)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(site.directory)], start_new_session=True)
    part = next(until(lambda: [one for one in site.cache.glob("*/part.json") if begun(one) >= 20]))
    process.kill()
    process.wait()
    done = begun(part)
    next(until(lambda: group_is_empty(process.pid)))
    assert 20 <= done < 400
    assert decoded(site) == 400 - done
    assert not part.exists()
    other = make_site(tmp_path / "fresh", rows_of(200))
    (other.directory / rows_of(200)[7][0]).write_bytes(b"not an image")
    assert same(opened(other), opened(site)) and opened(site).reasons == {"unknown_format": 1}


def until(look: Callable[[], Any]) -> Iterator[Any]:
    for _ in range(6000):
        if found := look():
            yield found[0] if isinstance(found, list) else found
        time.sleep(0.01)
    raise AssertionError("it never came")


def begun(part: Path) -> int:
    return len(json.loads(part.read_text())["outcomes"])


def group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def two_pairs() -> Iterator[np.ndarray]:
    yield from map(pair, range(2))
    raise MemoryError


@pytest.mark.parametrize("damage", ["records", "part", "other cases"])
def test_what_is_damaged_or_of_other_cases_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    made = making.Making(records="records-0.npy")
    monkeypatch.setattr(making, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(MemoryError):
        making.write(tmp_path, two_pairs(), making=made, keys=["a", "b", "c"], dtype=PAIR)
    resumed = making.resumed(tmp_path, keys=["a", "b", "c"], dtype=PAIR)
    assert resumed == made and resumed.num_rows == 2
    keys = ["a", "b", "c"]
    if damage == "records":
        path = tmp_path / "records-0.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif damage == "part":
        (tmp_path / "part.json").write_text("{")
    else:
        keys = ["b", "a", "c"]
    assert making.resumed(tmp_path, keys=keys, dtype=PAIR).outcomes == []


def test_several_processes_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (make_site(tmp_path / str(n), rows_of(140), threads=n) for n in (1, 2))
    for site in (one, two):
        (site.directory / rows_of(140)[7][0]).write_bytes(b"not an image")
    assert same(opened(one), opened(two))
    assert opened(one).reasons == opened(two).reasons == {"unknown_format": 1}
    assert records(one) == records(two)


def test_records_of_half_precision_are_kept_and_read_back(tmp_path: Path) -> None:
    site = make_site(tmp_path / "north", rows_of(10))
    wanted = asked(precision="float16")
    fresh = opened(site, asked=wanted)
    kept = records(site)
    told: list[tuple[int, int]] = []
    warm = opened(site, asked=wanted, on_progress=lambda *counts: told.append(counts))
    assert same(fresh, warm) and not told and records(site) == kept
    every = np.concatenate([part.images for part in warm.parts.values()])
    assert every.dtype == np.float16 and every.min() >= 0 and every.max() <= 1
    whole = np.concatenate([part.images for part in opened(site).parts.values()]).astype(np.float32)
    np.testing.assert_allclose(every.astype(np.float32), whole / 255, atol=0.5 / 255 + 1e-3)
    assert not np.array_equal(np.rint(every.astype(np.float32) * 255) / 255, every), "more than a byte holds"
