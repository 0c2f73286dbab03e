"""Many sites, few of them asked in a round: the same bits for any number of workers, whatever dies, and work
and memory of those that are asked."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from client.opened import OpenCohorts
from client.site import open_site
from client.worker import WORKER_DIED
from common import durable, flower
from common.trail import read
from server.report import Report
from simulations import engine, runtime
from simulations.forgotten import forgotten, shrink
from simulations.settings import Engine, Experiment, Settings
from simulations.simulation import simulate
from simulations.workers import Workers
from tests.plans import TINY, plan
from tests.sites import write_site

NUM_SITES = 30
ASKED = plan(
    **{name: value for name, value in TINY.items() if not name.startswith("model")},
    model="linear",
    privacy="none",
    randomness="seeded",
    sites=NUM_SITES,
    sites_per_round=3,
    quorum=3,
    rounds=4,
    training__local_steps=1,
    evaluation__validation_every=0,
    evaluation__test_at_end=False,
)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("many") / "sites"
    names = [f"site-{number:02d}" for number in range(NUM_SITES)]
    for name in names:
        write_site(
            place / name,
            name=name,
            num_patients=3,
            cases_per_patient=1,
            size=8,
            unsafe_allow_seeded_noise=True,
            split={"train": 1.0, "validation": 0.0, "test": 0.0},
        )
    return [place / name for name in names]


def settings(sites: list[Path], *, workers: int) -> Settings:
    return Settings(
        engine=Engine(name="local", workers=workers),
        experiment=Experiment(name="many"),
        sites_directory=str(sites[0].parent),
        state="empty",
        resume=False,
        attack=None,
    )


def run(sites: list[Path], directory: Path, *, workers: int, pool: Workers | None = None) -> Report:
    return simulate(ASKED, sites, settings=settings(sites, workers=workers), directory=directory, pool=pool)


def model_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def asked(directory: Path) -> list[list[str]]:
    return [event["asked"] for event in read(directory / "events.jsonl") if event["event"] == "round_started"]


@pytest.fixture(scope="module")
def alone(sites: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one worker."""
    directory = tmp_path_factory.mktemp("alone")
    run(sites, directory, workers=1)
    return directory


def test_each_round_asks_its_share_and_nobody_twice_before_all_had_a_turn(alone: Path) -> None:
    rounds = asked(alone)
    assert [len(names) for names in rounds] == [3, 3, 3, 3]
    assert len({name for names in rounds for name in names}) == 12
    report = Report.read(alone)
    assert sorted(entry.rounds_valid for entry in report.participation.values()) == [0] * 18 + [1] * 12


def test_a_site_that_is_not_asked_uses_no_case_but_gets_the_model(alone: Path, sites: list[Path]) -> None:
    trained = {name for names in asked(alone) for name in names}
    used = {path.name for path in sites if any(open_site(path).runs.glob("*/used_cases.parquet"))}
    assert used == trained
    assert all(any(path.glob("state/models/*/model.safetensors")) for path in sites)


def test_two_workers_end_in_the_same_bits_and_stay_for_the_next_run(
    alone: Path, sites: list[Path], tmp_path: Path
) -> None:
    with Workers(log=None) as pool:
        run(sites, tmp_path / "first", workers=2, pool=pool)
        pids = [worker.pid for worker in pool.take(2)]
        run(sites, tmp_path / "second", workers=2, pool=pool)
        assert [worker.pid for worker in pool.take(2)] == pids
    assert asked(tmp_path / "first") == asked(tmp_path / "second") == asked(alone)
    assert model_of(tmp_path / "first") == model_of(tmp_path / "second") == model_of(alone)


class Noting(engine.LocalGrid):
    """Notes which workers the tasks of each round wait for."""

    homes: ClassVar[list[list[int]]]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        if listed[0].metadata.message_type == "train":
            self.homes.append([self._home(message.metadata.dst_node_id) for message in listed])
        return super().push_messages(listed)


def test_the_sites_of_a_round_were_prepared_by_different_workers(
    sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no worker has to open a cohort that the other has open."""
    monkeypatch.setattr(engine, "LocalGrid", Noting)
    monkeypatch.setattr(Noting, "homes", [], raising=False)
    run(sites, tmp_path, workers=3)
    assert [sorted(homes) for homes in Noting.homes] == [[0, 1, 2]] * 4


class Killing(engine.LocalGrid):
    """Kills the process that has a training task, so often, as soon as it has it."""

    deaths = 1

    def _start_idle(self) -> None:
        super()._start_idle()
        self.kill_one()

    def kill_one(self) -> None:
        for number in self._busy():
            message, pid = self._doing[number], self._workers[number].pid
            assert message is not None
            if message.metadata.message_type == "train" and self.deaths and pid is not None:
                type(self).deaths -= 1
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Killing]]:
    monkeypatch.setattr(engine, "LocalGrid", Killing)
    yield Killing


def test_a_worker_that_is_killed_is_replaced_and_the_round_ends_in_the_same_bits(
    killing: type[Killing], alone: Path, sites: list[Path], tmp_path: Path
) -> None:
    killing.deaths = 2
    report = run(sites, tmp_path, workers=1)
    assert killing.deaths == 0, "it was killed"
    assert [entry.sites_valid for entry in report.rounds] == [3] * 4
    assert asked(tmp_path) == asked(alone) and model_of(tmp_path) == model_of(alone)


def test_a_task_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    flower.set_identity(engine.RUN_ID, node_id=1)
    with Workers(log=tmp_path / "log") as pool:
        (worker,) = pool.take(1)
        grid = engine.LocalGrid([("a", tmp_path)], run_config={}, workers=[worker])
        ids = grid.push_messages([Message(RecordDict(), 2, "train", group_id="1", ttl=60)])
        killed: list[int] = []
        replies: list[Message] = []
        end = time.monotonic() + 60
        while not replies and time.monotonic() < end:
            pid = worker.pid
            if pid is not None and pid not in killed:
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)
            replies = list(grid.pull_messages(ids))
    assert replies[0].error.reason == WORKER_DIED and len(killed) == engine._MOST_DEATHS


def test_a_grid_waits_as_long_as_it_is_asked_and_no_longer_than_for_a_reply(tmp_path: Path) -> None:
    flower.set_identity(engine.RUN_ID, node_id=1)
    with Workers(log=tmp_path / "log") as pool:
        grid = engine.LocalGrid([("a", tmp_path)], run_config={}, workers=pool.take(1))
        begun = time.monotonic()
        assert grid.arrived(["of nobody"], seconds=0.2) == []
        assert time.monotonic() - begun >= 0.2, "it does not spin where nothing is to be done"
        ids = list(grid.push_messages([Message(RecordDict(), 2, "train", group_id="1", ttl=60)]))
        assert grid.arrived(ids, seconds=600) == ids == grid.arrived(ids, seconds=600)
        assert grid.arrived(["of nobody"], seconds=0) == []
        assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [2]
        assert grid.arrived(ids, seconds=0) == []


def cohort_of(num_cases: int) -> Any:
    class Cohort:
        offered = num_cases
        parts: ClassVar[dict[str, Any]] = {}

    return Cohort()


def test_open_cohorts_hold_so_many_cases_whatever_the_number_of_sites() -> None:
    few, many = OpenCohorts(most_cases=100), OpenCohorts(most_cases=100)
    for number in range(10):
        few.get(Path(f"{number}"), 1, lambda: cohort_of(10))
    for number in range(1000):
        many.get(Path(f"{number}"), 1, lambda: cohort_of(10))
    assert len(few) == len(many) == 10
    tiny = OpenCohorts(most_cases=10_000, most_cohorts=7)
    for number in range(1000):
        tiny.get(Path(f"{number}"), 1, lambda: cohort_of(1))
    assert len(tiny) == 7, "each has a file open"


def test_pixels_are_in_memory_of_the_cohort_that_was_asked_for_last(tmp_path: Path) -> None:
    """Also where more of them are open; they come back from their file when they are wanted again."""
    cohorts = OpenCohorts()
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((500, 1, 32, 32), ord(name), dtype=np.uint8))

    def asked(name: str) -> Any:
        images = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        parts = {"train": SimpleNamespace(images=images[:400]), "test": SimpleNamespace(images=images[400:])}
        made = SimpleNamespace(offered=500, parts=parts)
        return cohorts.get(Path(name), 1, lambda: made).cohort.parts["train"].images

    first = asked("a")
    for _ in range(2):
        assert (first == ord("a")).all() and in_memory(tmp_path / "a.npy") > 400_000
        asked("a")
        assert in_memory(tmp_path / "a.npy") > 400_000, "nothing else was wanted"
        asked("b")
        assert in_memory(tmp_path / "a.npy") == 0


def in_memory(file: Path) -> int:
    """Returns the bytes of a mapped file that this process holds."""
    found, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            is_of_file = line.endswith(str(file))
        elif is_of_file and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_an_open_cohort_is_used_again_until_another_is_wanted_and_the_longest_unused_goes() -> None:
    cohorts = OpenCohorts(most_cases=20)
    first = cohorts.get(Path("a"), "v1", lambda: cohort_of(10))
    assert cohorts.get(Path("a"), "v1", lambda: cohort_of(10)) is first
    second = cohorts.get(Path("a"), "v2", lambda: cohort_of(10))
    assert second is not first and len(cohorts) == 1
    cohorts.get(Path("b"), "v1", lambda: cohort_of(10))
    cohorts.get(Path("a"), "v2", lambda: cohort_of(10))
    cohorts.get(Path("c"), "v1", lambda: cohort_of(10))
    assert cohorts.get(Path("a"), "v2", lambda: cohort_of(10)) is second, "b was unused longer"
    large = cohorts.get(Path("d"), "v1", lambda: cohort_of(1000))
    assert cohorts.get(Path("d"), "v1", lambda: cohort_of(1000)) is large and len(cohorts) == 1


@pytest.mark.slow
def test_a_private_run_begins_anew_on_sites_that_had_one(tmp_path: Path) -> None:
    """Ledgers, plans and heads of before are gone together; what is left of one would stop its site."""
    places = [tmp_path / "sites" / name for name in ("a", "b")]
    for place in places:
        write_site(place, name=place.name, num_patients=30, size=8, unsafe_allow_seeded_noise=True)
    private = plan(**TINY, rounds=1, evaluation__validation_every=0, training__expected_batch=4)
    reports = [
        simulate(private, places, settings=settings(places, workers=1), directory=tmp_path / f"{number}")
        for number in range(2)
    ]
    spent = [report.privacy.per_site["a"].total_epsilon for report in reports]
    assert spent[0] and spent[0] == spent[1], "the second ledger does not go on from the first"


def test_what_earlier_runs_left_stays_while_it_takes_little_and_the_oldest_goes_first(
    tmp_path: Path,
) -> None:
    """A file deleted is a slow file made, on some disks; so not every run deletes."""
    site, heads = write_site(tmp_path / "a", num_patients=1, size=8), tmp_path / ".heads"

    def put_aside(content: bytes, *, most_bytes: int) -> list[bytes]:
        site.state.mkdir(exist_ok=True)
        (site.state / "events.jsonl").write_bytes(content)
        with forgotten([site], heads=heads, most_bytes=most_bytes):
            assert not any(site.state.iterdir())
        found = (tmp_path / ".forgotten").glob("*/*")
        return sorted(path.read_bytes() for path in found if path.name != "bytes")

    assert put_aside(b"1", most_bytes=10**6) == [b"1"]
    assert put_aside(b"2" * 500_000, most_bytes=10**6) == [b"1", b"2" * 500_000]
    assert put_aside(b"3" * 400_000, most_bytes=10**6)[-2:] == [b"2" * 500_000, b"3" * 400_000]
    assert put_aside(b"4" * 200_000, most_bytes=10**6) == [b"3" * 400_000, b"4" * 200_000]
    assert put_aside(b"5", most_bytes=0) == []


@pytest.mark.slow
def test_nothing_of_earlier_runs_stays_but_empty_folders_and_a_lock(tmp_path: Path) -> None:
    """And what outlives runs: images, keys, the frozen list, decoded cases, decisions."""
    place = tmp_path / "sites" / "a"
    write_site(place, name="a", num_patients=12, size=8, unsafe_allow_seeded_noise=True)
    private = plan(
        **TINY, rounds=1, sites=1, quorum=1, evaluation__validation_every=0, training__expected_batch=4
    )
    simulate(private, [place], settings=settings([place], workers=1), directory=tmp_path / "run")
    site = open_site(place)
    before = {path.relative_to(place) for path in place.rglob("*")}
    with forgotten([site], heads=tmp_path / "sites" / ".heads"):
        after = {path.relative_to(place) for path in place.rglob("*")}
    gone = {path.parts[:2] for path in before - after}
    assert gone >= {("state", "ledger.sqlite"), ("private", "runs"), ("ledger.head",), ("trail.head",)}
    assert {path.parts[0] for path in before - after} <= {
        "state",
        "plans",
        "private",
        "ledger.head",
        "trail.head",
    }
    for folder in ("state", "plans", "private/runs"):
        left = [path for path in (place / folder).rglob("*") if not path.is_dir()]
        assert [path.name for path in left] == ([".lock"] if folder == "private/runs" else [])
    assert {("private", "cohort.json"), ("private", "split.key")} <= {path.parts for path in after}
    assert [path.name for path in (place / "private" / "runs").iterdir()] == [".lock"]
    assert (place / "state" / "replies").is_dir() and (place / "plans").is_dir()


def test_what_cannot_be_deleted_of_earlier_runs_is_said_and_does_not_keep_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    delete = shutil.rmtree

    def deleted(path: Path) -> None:
        if path.name == "2":
            raise PermissionError(13, "Permission denied")
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", deleted)
    shrink(tmp_path, most_bytes=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert f"{tmp_path / '2'}, left by earlier runs, could not be deleted: Permission denied" in caplog.text


@pytest.mark.parametrize(("state", "is_durable"), [("empty", False), ("keep", True)])
def test_sites_and_coordinator_wait_for_the_disk_only_where_state_is_kept(
    state: str, is_durable: bool, sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What either engine tells the sites, and how the coordinator writes while it runs."""
    told: list[object] = []

    class Looked(Exception):
        pass

    def coordinator(grid: engine.LocalGrid, context: Context) -> None:
        told.extend({one.node_config["durable"] for one in grid._contexts.values()})
        told.append(durable.synchronous())
        raise Looked

    def on_ray(opened: object, *, is_durable: bool, **more: object) -> None:
        told.append(runtime._environment(tmp_path, [], is_durable=is_durable)["FEVERFEW_DURABLE"])
        raise Looked

    monkeypatch.setattr(engine, "server_app", coordinator)
    monkeypatch.setattr(runtime, "run_on_ray", on_ray)
    asked = settings(sites, workers=1).model_copy(update={"state": state})
    for name in ("local", "flower"):
        chosen = asked.model_copy(update={"engine": asked.engine.model_copy(update={"name": name})})
        with pytest.raises(Looked):
            simulate(ASKED, sites, settings=chosen, directory=tmp_path / name)
    assert told == [is_durable, "FULL" if is_durable else "OFF", "yes" if is_durable else "no"]
    assert durable.synchronous() == "FULL"
