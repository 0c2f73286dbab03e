"""The least that a run with many sites takes: that of ``benchmarks/many_sites.py``, all left out that can be.

Run with ``python -m benchmarks.least_run``. Sites are directories as real ones are, and apps are Flower's, as
in a deployment. So each site is asked three times (prepare, train, keep the model) by a message of Flower's
and answers with one; settings are read, images looked at, cases mapped, six steps of logistic regression
done, a table made in SQLite, eight small files written, and three signatures made, as for a trail. The
coordinator sums and writes a model for each round. Nothing is checked or counted, no file waits for the disk,
there is no plan, no report and no command line. What both need is imported once; two workers are forked from
that, and each has its next message before it has answered the last. A simulation of such sites can hardly be
faster, whatever its own code costs.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.figure import tell

WORKERS = 2
ASKED = 10
STEPS, BATCH = 6, 10
MODEL_BYTES = 4 * (784 * 10 + 10)
AHEAD = 2
"""Messages that a worker has at once."""
FILES = {
    "prepare": {"rule": 600, "cohort": 300},
    "train": {"reply": MODEL_BYTES, "used": 2000},
    "keep": {"model": MODEL_BYTES, "plan": 3000, "head": 250},
}
"""By what is asked, names and bytes of what a site writes beside its trail."""
IMPORTS = (
    "cryptography.hazmat.primitives.asymmetric.ec",
    "flwr.clientapp",
    "flwr.serverapp",
    "torch",
    "yaml",
)
EVENTS = {"prepare": 3, "train": 4, "keep": 3}


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


class SiteWork:
    """What the sites of one worker do."""

    def __init__(self, sites: Sequence[Path], *, run: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._sites = sites
        self._run = run
        self._network = torch.nn.Linear(784, 10)
        self._keys: dict[int, Any] = {}
        self.laps = Laps()

    def answer(self, content: bytes) -> bytes:
        """Returns the bytes of the reply to a message in bytes."""
        from flwr.app import ConfigRecord, Message, RecordDict

        from common import flower

        with self.laps.of("messages"):
            message = flower.unpack_message(content)
            told = message.content["told"]
            task, number = str(told["task"]), int(told["site"])
        site = self._sites[number]
        if task == "prepare":
            self._prepare(site, number)
        if task == "train":
            self._train(site)
        with self.laps.of("signatures"):
            signature = self._signed(number, content)
        with self.laps.of("files"):
            self._write(site, task)
        with self.laps.of("messages"):
            update = bytes(MODEL_BYTES) if task == "train" else b""
            told = ConfigRecord({"update": update, "signature": signature, "site": number})
            return flower.pack_message(Message(RecordDict({"told": told}), reply_to=message))

    def _prepare(self, site: Path, number: int) -> None:
        import yaml
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        with self.laps.of("settings"):
            yaml.load((site / "site.yaml").read_bytes(), Loader=yaml.CSafeLoader)
        with self.laps.of("looks at images"):
            json.loads((site / "private" / "cohort.json").read_bytes())
            for image in os.scandir(site / "images"):
                image.stat()
        with self.laps.of("signatures"):
            self._keys[number] = load_pem_private_key((site / "private" / "site.key").read_bytes(), None)

    def _train(self, site: Path) -> None:
        import numpy as np
        import torch
        from torch.nn import functional

        with self.laps.of("cases mapped"):
            records = np.load(next(site.glob("cache/*/records-*.npy")), mmap_mode="r")
        with self.laps.of("steps"):
            images = torch.from_numpy(records["image"].astype(np.float32)).flatten(1)
            targets = torch.arange(len(images)) % 10
            parameters = tuple(self._network.parameters())
            for _ in range(STEPS):
                batch = torch.randint(len(images), (BATCH,))
                loss = functional.cross_entropy(self._network(images[batch]), targets[batch])
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=0.05)

    def _signed(self, number: int, content: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        signed = self._keys[number].sign(hashlib.sha256(content).digest(), ec.ECDSA(hashes.SHA256()))
        return bytes(signed)

    def _write(self, site: Path, task: str) -> None:
        place = f"{site}/state/{self._run}-"  # a folder that is there: to make one takes longer than a file
        if task == "train":
            database = sqlite3.connect(f"{place}course.sqlite", isolation_level=None)
            database.execute("PRAGMA synchronous=OFF")
            database.execute("PRAGMA journal_mode=MEMORY")
            database.execute("CREATE TABLE asked (run TEXT, task TEXT)")
            database.execute("INSERT INTO asked VALUES ('r', 't')")
            database.close()
        for name, size in FILES[task].items():
            _replace(f"{place}{name}", bytes(size))
        with open(f"{place}events.jsonl", "ab", buffering=0) as trail:
            for _ in range(EVENTS[task]):
                trail.write(json.dumps({"event": "asked", "run": "r", "previous": "0" * 64}).encode())


def _replace(path: str, content: bytes) -> None:
    temporary = f"{path}.new"
    with open(temporary, "wb", buffering=0) as file:
        file.write(content)
    os.replace(temporary, path)


def _serve(connection: Connection, sites: Sequence[Path], run: str) -> None:
    work = SiteWork(sites, run=run)
    while content := connection.recv_bytes():
        connection.send_bytes(work.answer(content))
    connection.send_bytes(json.dumps(work.laps.seconds).encode())


class Coordination:
    """What the coordinator does: it asks, in turn, each worker about the sites that are its own."""

    def __init__(self, workers: Sequence[Connection], directory: Path) -> None:
        self._workers = workers
        self._directory = directory
        self.laps = Laps()

    def ask(self, task: str, sites: Sequence[int]) -> None:
        """Asks so many sites and waits for all of them."""
        for first in range(0, len(sites), ASKED) if task == "train" else (0,):
            total = self._round(task, sites[first : first + ASKED] if task == "train" else sites)
            with self.laps.of("the coordinator's files"):
                _replace(f"{self._directory}/{task}-{first}", total)

    def _round(self, task: str, sites: Sequence[int]) -> bytes:
        import numpy as np

        from common import flower

        total = np.zeros(MODEL_BYTES // 4, np.int64)
        waiting = [deque(sites[number :: len(self._workers)]) for number in range(len(self._workers))]
        missing = len(sites)
        for _ in range(AHEAD):
            for number, worker in enumerate(self._workers):
                self._send(worker, task, waiting[number])
        while missing:
            for worker in wait(list(self._workers)):
                assert isinstance(worker, Connection)
                content = worker.recv_bytes()
                missing -= 1
                self._send(worker, task, waiting[self._workers.index(worker)])
                with self.laps.of("messages"):
                    told = flower.unpack_message(content).content["told"]
                    if told["update"]:
                        total += np.frombuffer(told["update"], np.int32)
        return total.astype(np.float32).tobytes()

    def _send(self, worker: Connection, task: str, waiting: deque[int]) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict

        from common import flower

        if waiting:
            with self.laps.of("messages"):
                model = b"" if task == "prepare" else bytes(MODEL_BYTES)
                told = ConfigRecord({"task": task, "site": waiting.popleft(), "model": model})
                message = Message(RecordDict({"told": told}), dst_node_id=1, message_type="query")
                worker.send_bytes(flower.pack_message(message))


def run(sites: Sequence[Path], directory: Path) -> Counter[str]:
    """Does a whole run and returns what it spent by kind; the coordinator's files go to ``directory``."""
    laps = Laps()
    with laps.of("imports"):
        for name in IMPORTS:
            importlib.import_module(name)
        from common import flower
    directory.mkdir()
    flower.set_identity(1, node_id=1)
    fork = multiprocessing.get_context("fork")
    workers, processes = [], []
    for _ in range(WORKERS):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_serve, args=(theirs, sites, directory.name), daemon=True)
        process.start()
        workers.append(ours)
        processes.append(process)
    coordination = Coordination(workers, directory)
    for task in ("prepare", "train", "keep"):
        coordination.ask(task, range(len(sites)))
    spent = laps.seconds + coordination.laps.seconds
    for worker, process in zip(workers, processes, strict=True):
        worker.send_bytes(b"")
        spent.update(json.loads(worker.recv_bytes()))
        process.join()
    return spent


def timed(folder: Path, directory: Path) -> tuple[float, Counter[str]]:
    """Returns the seconds of a whole run in a process of its own, and what it spent by kind.

    Args:
        folder: of the sites.
        directory: of this run, new; its name is that of the files at the sites.
    """
    begun = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.least_run", "--folder", str(folder)]
    done = subprocess.run([*command, "--directory", str(directory)], stdout=subprocess.PIPE, check=True)
    return time.monotonic() - begun, Counter(json.loads(done.stdout))


def main() -> None:
    """Prints what the run takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--directory", type=Path)
    asked = parser.parse_args()
    if asked.directory is not None:
        sites = sorted(path.parent for path in asked.folder.glob("*/site.yaml"))
        print(json.dumps(run(sites, asked.directory)))
        gc.freeze()  # the interpreter would collect a million objects of torch's one by one
        return
    from benchmarks.many_sites import Federation

    with tempfile.TemporaryDirectory() as place:
        folder = Federation(Path(place), num_sites=asked.sites, rounds=1).sites
        # nothing is deleted in between: some file systems make files slowly for minutes after
        runs = [timed(folder, Path(place, f"least-{number}")) for number in range(asked.runs)]
    _, spent = min(runs, key=lambda run: run[0])
    for name, seconds in spent.most_common():
        print(f"{seconds:.2f} s of a processor: {name}")
    print(f"{spent.total():.2f} s in all")
    tell(f"{asked.sites} sites, the least that a run takes", [seconds for seconds, _ in runs], unit="s")


if __name__ == "__main__":
    main()
