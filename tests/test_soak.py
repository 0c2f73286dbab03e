"""Two hundred rounds while processes are killed at random: ``make soak``, about twenty minutes.

The run ends in the bits of an undisturbed one, and no process grows: a leak would show in memory or in open
files long before a study of weeks is over.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from server.process import Identity
from server.run_record import RunRecord
from server.services import pid_file
from tests import fault_points
from tests.proxy import Proxy
from tests.stage import SITES, Stage, rounds_done, staged

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

ROUNDS = 200
MEAN_SECONDS = 20.0
"""Between two losses, exponentially distributed."""
CUT_SECONDS = 3.0
LOOK_SECONDS = 2.0
SETTLED_SECONDS = 40.0
"""A process that was started is still loading before."""
SERVICES = ("superlink", "superexec", "gateway", "supervisor")


@dataclass(frozen=True)
class Sample:
    """What a process held at a time: resident memory in MB, open files."""

    seconds: float
    megabytes: float
    files: int


@dataclass
class Watch:
    """Samples of every life of every process, for as long as there are rounds."""

    stage: Stage
    record: RunRecord
    samples: dict[tuple[str, Identity], list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def run(self, over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS) and rounds_done(self.record) < ROUNDS:  # reports need more
            for name, identity in self._alive():
                sample = _sample(identity)
                if sample is not None:
                    self.samples[name, identity].append(sample)

    def _alive(self) -> Iterator[tuple[str, Identity]]:
        federation = self.stage.federation
        for name in SERVICES:
            identity = Identity.read(pid_file(federation.home, name))
            if identity is not None:
                yield name, identity
        life = self.record.life
        if life is not None and not life.is_over:
            yield "serverapp", life.identity
        for site in SITES:
            agent = Identity.of(federation.processes[site].pid)
            if agent is not None:
                yield f"agent of {site}", agent
                yield from ((f"worker of {site}", one) for one in _descendants(agent.pid))

    def growth(self) -> list[tuple[str, float, float, int]]:
        """Returns for each settled life its name, its seconds, and its growth in MB and in open files."""
        found = []
        for (name, _), samples in self.samples.items():
            settled = [one for one in samples if one.seconds >= samples[0].seconds + SETTLED_SECONDS]
            third = len(settled) // 3
            if third < 3:
                continue
            first, last = settled[:third], settled[-third:]
            seconds = last[-1].seconds - first[0].seconds
            megabytes = max(one.megabytes for one in last) - max(one.megabytes for one in first)
            files = max(one.files for one in last) - max(one.files for one in first)
            found.append((name, seconds, megabytes, files))
        return found


def _sample(identity: Identity) -> Sample | None:
    try:
        pages = int(Path(f"/proc/{identity.pid}/statm").read_text().split()[1])
        files = len(os.listdir(f"/proc/{identity.pid}/fd"))
    except (OSError, IndexError):
        return None  # it has just ended
    return Sample(time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files)


def _descendants(pid: int) -> Iterator[Identity]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        identity = Identity.of(child)
        if identity is not None:
            yield identity
            yield from _descendants(child)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("soak"), rounds=ROUNDS, training__local_steps=1) as stage:
        yield stage


def _kill(identity: Identity | None) -> None:
    """Kills a process, unless it is being started again."""
    if identity is not None:
        os.kill(identity.pid, signal.SIGKILL)


def _cut(proxy: Proxy) -> None:
    """Cuts the connection of a site for a while."""
    proxy.cut()
    threading.Timer(CUT_SECONDS, proxy.heal).start()


def _losses(stage: Stage, record: RunRecord) -> dict[str, Callable[[], object]]:
    """What may be lost, by its name."""
    federation, life = stage.federation, record.life
    found: dict[str, Callable[[], object]] = {"connection": partial(_cut, stage.proxy)}
    found["serverapp"] = partial(_kill, None if life is None or life.is_over else life.identity)
    for name in SERVICES:
        found[name] = partial(_kill, Identity.read(pid_file(federation.home, name)))
    for site in SITES:
        found[f"agent of {site}"] = federation.processes[site].kill
        arm = partial(fault_points.arm, federation.points, site, "step_done", action="kill")
        found[f"worker of {site}"] = arm
    return found


def test_two_hundred_rounds_with_random_losses_end_in_the_same_bits_and_nothing_grows(stage: Stage) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed of the losses: {seed}")
    chance, lost = random.Random(seed), Counter[str]()
    watch = Watch(stage, stage.record("soak"))

    def trouble(record: RunRecord) -> None:
        over = threading.Event()
        watching = threading.Thread(target=watch.run, args=(over,), daemon=True)
        watching.start()
        while record.end is None:
            time.sleep(min(chance.expovariate(1 / MEAN_SECONDS), 4 * MEAN_SECONDS))
            if record.end is None and rounds_done(record) < ROUNDS:
                name, lose = chance.choice(list(_losses(stage, record).items()))
                lost[name] += 1
                print(f"after round {rounds_done(record)}: {name}")
                lose()
        over.set()
        watching.join()

    begun = time.monotonic()
    record = stage.run_beside("soak", trouble, patience_seconds=5 * MEAN_SECONDS)
    print(f"{ROUNDS} rounds in {time.monotonic() - begun:.0f} s, {sum(lost.values())} losses: {dict(lost)}")
    growth = watch.growth()
    for name, seconds, megabytes, files in growth:
        print(f"  {name:<16} {seconds:5.0f} s {megabytes:+6.1f} MB {files:+d} files")
    assert (record.directory / "model.safetensors").read_bytes() == stage.model
    assert sum(lost.values()) >= 10 and len(growth) >= 10
    assert [one for one in growth if one[2] > 20.0 or one[3] > 10] == []
