"""The least that many sites take: the work of a run of ``benchmarks/many_sites.py`` and nothing around it.

Run with ``python -m benchmarks.least_site``. For each site what no simulation can leave out whose sites are
directories as real ones are: settings read, images looked at, cases mapped, the site's key read, three
signatures, six steps of logistic regression, a table in SQLite, eight small files. No plan, no message,
no coordinator, no report; no file waits for the disk, and none is checked. Two processes share the sites and
are timed whole, with what they import. So it says how fast a simulation of such sites can become at most.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figure import tell

PROCESSES = 2
STEPS, BATCH = 6, 10
FILES = {
    "reply": 31_400,
    "model": 31_400,
    "plan": 3000,
    "used": 2000,
    "rule": 600,
    "cohort": 300,
    "head": 250,
}
"""By name, the bytes of what a site writes beside its trail."""
EVENTS = 10


class Laps:
    """Processor time by what it was spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of the block."""
        begun = time.process_time()
        yield
        self.seconds[name] += time.process_time() - begun


def work(sites: list[Path], target: Path) -> Laps:
    """Does the work of these sites; what they write goes to folders of their names in ``target``."""
    import numpy as np
    import torch
    import yaml
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from torch.nn import functional

    torch.set_num_threads(1)
    network = torch.nn.Linear(784, 10)
    descent = torch.optim.SGD(network.parameters(), lr=0.05)
    laps = Laps()
    for site in sites:
        own = target / site.name
        with laps.of("settings"):
            yaml.load((site / "site.yaml").read_bytes(), Loader=yaml.CSafeLoader)
        with laps.of("looks at images"):
            json.loads((site / "private" / "cohort.json").read_bytes())
            for image in os.scandir(site / "images"):
                image.stat()
        with laps.of("cases mapped"):
            records = np.load(next(site.glob("cache/*/records-*.npy")), mmap_mode="r")
        with laps.of("signatures"):
            key = load_pem_private_key((site / "private" / "site.key").read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            for _ in range(3):
                key.sign(bytes(200), ec.ECDSA(hashes.SHA256()))
        with laps.of("steps"):
            images = torch.from_numpy(records["image"].astype(np.float32)).flatten(1)
            targets = torch.arange(len(images)) % 10
            for _ in range(STEPS):
                batch = torch.randint(len(images), (BATCH,))
                descent.zero_grad()
                functional.cross_entropy(network(images[batch]), targets[batch]).backward()
                descent.step()
        with laps.of("files"):
            _write(own)
    return laps


def _write(own: Path) -> None:
    own.mkdir()
    database = sqlite3.connect(own / "course.sqlite", isolation_level=None)
    database.execute("PRAGMA synchronous=OFF")
    database.execute("PRAGMA journal_mode=MEMORY")
    database.execute("CREATE TABLE asked (run TEXT, task TEXT)")
    database.execute("INSERT INTO asked VALUES ('r', 't')")
    database.close()
    for name, size in FILES.items():
        temporary = own / f".{name}"
        temporary.write_bytes(bytes(size))
        os.replace(temporary, own / name)
    with (own / "events.jsonl").open("ab", buffering=0) as trail:
        for _ in range(EVENTS):
            trail.write(json.dumps({"event": "asked", "run": "r", "previous": "0" * 64}).encode())


def both(sites: list[Path], target: Path) -> tuple[float, Counter[str]]:
    """Returns the seconds of two processes that share the sites, and what these spent by kind."""
    target.mkdir()
    begun = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.least_site", "--target", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for number, process in enumerate(running):
        assert process.stdin is not None
        process.stdin.write("\n".join(map(str, sites[number::PROCESSES])))
        process.stdin.close()
    found: Counter[str] = Counter()
    for process in running:
        assert process.stdout is not None
        found.update(json.loads(process.stdout.read()))
        if process.wait():
            raise SystemExit("a process failed")
    return time.monotonic() - begun, found


def main() -> None:
    """Prints what the sites take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--target", type=Path)
    asked = parser.parse_args()
    if asked.target is not None:
        print(json.dumps(work([Path(line) for line in sys.stdin.read().split("\n")], asked.target).seconds))
        return
    from benchmarks.many_sites import Federation

    with tempfile.TemporaryDirectory() as place:
        Federation(Path(place), num_sites=asked.sites, rounds=1)
        sites = sorted(path.parent for path in Path(place).glob("sites/*/*/site.yaml"))
        # nothing is deleted in between: some file systems make files slowly for minutes after
        runs = [both(sites, Path(place, f"run-{number}")) for number in range(asked.runs)]
    _, spent = min(runs, key=lambda run: run[0])
    for name, seconds in spent.most_common():
        print(f"{1e3 * seconds / asked.sites:.2f} ms of a processor for each site: {name}")
    print(f"{1e3 * spent.total() / asked.sites:.2f} ms in all")
    tell(f"{asked.sites} sites, the least that they take", [seconds for seconds, _ in runs], unit="s")


if __name__ == "__main__":
    main()
