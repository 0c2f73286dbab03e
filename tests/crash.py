"""A site in a process of its own, killed with SIGKILL at a chosen step; ``make kill``.

A step is the beginning or the end of a call of anything that charges, trains, writes or sends: ``STEPS``.
The process counts them and kills itself at one. What it sent is in files, so that it outlives the process.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from client import release
from client.site import Site
from common import exchange, flower, model
from common.exchange import Task
from common.plan import Plan
from common.privacy import Spend, epsilon, merged
from tests.plans import TINY, plan
from tests.sites import write_site

STEPS = (
    "client.journal:Journal.append",
    "client.journal:Journal._remember",
    "client.ledger:Ledger.charge",
    "client.ledger:Ledger.finish",
    "client.training:train_by_plan",
    "client.evaluation:noised",
    "client.replies:store",
    "os:replace",
    "os:fsync",
    "tests.crash:send",
)
RUN = "run-1"
ROOT = Path(__file__).resolve().parents[1]
_TRAINING: dict[str, Any] = {
    **TINY,
    "rounds": 3,
    "training__local_steps": 2,
    "training__expected_batch": 1000,  # every patient in every step, so that accounting is quick
}
SECURE = plan(**_TRAINING)
SEEDED = plan(**_TRAINING, randomness="seeded")


def send(directory: Path, *, task: str, reply: bytes) -> None:
    """What the coordinator gets; every call is a release."""
    number = len(list(directory.glob(f"{task}.*")))
    (directory / f"{task}.{number}").write_bytes(reply)


def serve(site: str, plan_json: str, task: Task, sent: str, kill_at: int | None, counted: str) -> None:
    """Main function of the process: one task, answered by the real ClientApp."""
    from client.app import app

    seen = _count_steps(kill_at)
    flower.set_identity(1, node_id=1)
    kind = exchange.TRAIN if task.purpose == "train" else exchange.EVALUATE
    message = Message(exchange.task_record(task), 7, kind)
    flower.assign_id(message)
    context = Context(
        run_id=1,
        node_id=7,
        node_config={"site": site},
        state=RecordDict(),
        run_config={"plan": plan_json, "run": RUN},
    )
    content = app(message, context).content
    exchange.require_accepted(content)
    exchange.detach_head(content)
    (array,) = content.array_records["arrays"].values()
    sys.modules["tests.crash"].send(Path(sent), task=task.identity, reply=array.data)
    Path(counted).write_text(str(len(seen)))


def _count_steps(kill_at: int | None) -> list[str]:
    """Wraps everything in ``STEPS``; returns the list that grows with every step."""
    seen: list[str] = []

    def step(name: str) -> None:
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(name)

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            step(f"{name} begins")
            result = function(*arguments, **named)
            step(f"{name} ends")
            return result

        return call

    for name in STEPS:
        module, _, path = name.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, counted(getattr(owner, last), name))
    return seen


@dataclass
class Hospital:
    """A site, its processes and all that it ever sent."""

    site: Site
    asked: Plan
    sent: Path

    @classmethod
    def make(cls, directory: Path, asked: Plan) -> Hospital:
        site = write_site(
            directory / "north", size=8, num_patients=12, max_epsilon=100.0, unsafe_allow_seeded_noise=True
        )
        (directory / "sent").mkdir()
        return cls(site=site, asked=asked, sent=directory / "sent")

    def forget(self) -> None:
        """Begins anew, but for the cache of decoded images, which takes a second to make."""
        shutil.rmtree(self.site.state, ignore_errors=True)
        shutil.rmtree(self.site.directory / "plans", ignore_errors=True)
        release.head_path(self.site).unlink(missing_ok=True)
        shutil.rmtree(self.sent)
        self.sent.mkdir()

    def ask(self, task: Task, *, kill_at: int | None = None) -> int | None:
        """Starts a process with a task; returns the number of steps it took, or None if it was killed."""
        counted = self.sent.parent / "counted"
        counted.unlink(missing_ok=True)
        arguments = (
            str(self.site.directory),
            self.asked.to_json(),
            task,
            str(self.sent),
            kill_at,
            str(counted),
        )
        code = nursery().run(arguments)
        if code == -signal.SIGKILL:
            return None
        assert code == 0, code
        return int(counted.read_text())

    def task(self, server_round: int, parameters: NDArray[np.float32], *, purpose: Any = "train") -> Task:
        return Task(
            run=RUN,
            plan_hash=self.asked.hash,
            server_round=server_round,
            purpose=purpose,
            part="test" if purpose == "evaluate" else "",
            parameters=parameters,
        )

    def outputs(self, task: Task) -> list[bytes]:
        """Everything that was ever sent for a task, also by processes that were killed after."""
        return [path.read_bytes() for path in sorted(self.sent.glob(f"{task.identity}.*"))]

    def check(self, tasks: list[Task]) -> None:
        """One distinct output and one charge a task; the ledger covers all that was sent."""
        with release.open_ledger(self.site) as ledger:
            ledger.verify_signatures()
            history = ledger.histories().get("train", ())
        charged = Counter(self._charged())
        sent = {task.identity for task in tasks if self.outputs(task)}
        assert sent <= set(charged), "sent without a charge"
        assert set(charged.values()) <= {1}, "charged twice"
        for task in tasks:
            assert len(set(self.outputs(task))) <= 1, "two outputs of one task"
        training = [task for task in tasks if task.purpose == "train" and task.identity in sent]
        released = [merged(history)[0]] * len(training) if history else []
        steps = self.asked.training.local_steps
        delta = self.site.settings.delta
        cost = [
            Spend(noise_multiplier=one.noise_multiplier, sample_rate=one.sample_rate, steps=steps)
            for one in released
        ]
        assert epsilon(history, delta=delta).value >= epsilon(cost, delta=delta).value - 1e-12

    def _charged(self) -> list[str]:
        import sqlite3

        with closing(sqlite3.connect(release.ledger_path(self.site))) as database:
            query = "SELECT task FROM entries WHERE kind = 'charge'"
            return [task for (task,) in database.execute(query)]


class Nursery:
    """A process that has imported everything, and forks another for each task; imports take seconds."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.crash import nurse; nurse()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        atexit.register(self.close)

    def run(self, arguments: tuple[Any, ...]) -> int:
        """Runs ``serve`` in a new process; returns its exit code, negative for a signal."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(arguments, self._process.stdin)
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@cache
def nursery() -> Nursery:
    return Nursery()


def nurse() -> None:
    """Main function of the nursery; ends at the end of its input."""
    importlib.import_module("client.app")
    importlib.import_module("client.clipping")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a child prints is no answer
    while True:
        try:
            arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            code = 1
            try:
                serve(*arguments)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(hospital: Hospital, rng: random.Random | None) -> str:
    """Trains all rounds and evaluates, killed at random steps; returns the hash of the final parameters."""
    parameters = model.flatten(model.build(hospital.asked))
    tasks: list[Task] = []
    for server_round in range(1, hospital.asked.rounds + 1):
        tasks.append(hospital.task(server_round, parameters))
        _until_answered(hospital, tasks, rng)
        parameters = parameters + np.frombuffer(hospital.outputs(tasks[-1])[0], np.float32)
    tasks.append(hospital.task(hospital.asked.rounds, parameters, purpose="evaluate"))
    _until_answered(hospital, tasks, rng)
    return hashlib.sha256(parameters.tobytes()).hexdigest()


def _until_answered(hospital: Hospital, tasks: list[Task], rng: random.Random | None) -> None:
    """Sends the newest task until it is answered; also, at times, an older one again, as networks do."""
    if rng is not None:
        while rng.random() < 0.7 and hospital.ask(tasks[-1], kill_at=rng.randrange(70)) is None:
            hospital.check(tasks)
        if rng.random() < 0.3:
            hospital.ask(rng.choice(tasks), kill_at=rng.choice([None, rng.randrange(30)]))
    if not hospital.outputs(tasks[-1]):
        assert hospital.ask(tasks[-1]) is not None
    hospital.check(tasks)


def repeat(times: int, *, seed: int = 0) -> int:
    """Returns the number of runs, of so many, that went wrong; prints each."""
    misses = 0
    with tempfile.TemporaryDirectory() as place:
        hospital = Hospital.make(Path(place), SEEDED)
        undisturbed = run(hospital, None)
        for number in range(times):
            rng = random.Random(seed * 1_000_003 + number)
            hospital.forget()
            hospital.asked = (SEEDED, SECURE)[number % 2]
            try:
                ended = run(hospital, rng)
                is_same = hospital.asked is SECURE or ended == undisturbed
                assert is_same, "other parameters than without a crash"
            except AssertionError as error:
                misses += 1
                print(f"run {number}: {error}")
    return misses
