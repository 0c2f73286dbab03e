"""The process that carries the runs of a simulation: the coordinator's half, and the owner of the workers.

It and the workers are forked from one process that has imported what all of them need: it is imported once,
and is in memory once. What was typed is checked meanwhile, in a process that imports little.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver as server
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from client import crew
from client.process import forkserver
from common.command import INTERRUPTED, exit_code
from common.errors import RunError
from simulations import awaited

if TYPE_CHECKING:  # what takes long to import is imported in the process that all others are forked from
    from common.plan import Plan
    from simulations.settings import Settings
    from simulations.workers import Workers

_LEAVES_SECONDS: Final = 30.0
# pyarrow has a pool of threads, which it makes anew after a fork; no work has been given to it before.
_SHARED = ("simulations.simulation", "client.app", "pyarrow.parquet")


class Carrier:
    """One process for the runs of a command, started with the first; what it needs is imported from the
    beginning of the ``with`` block on.

    Args:
        command: named in messages.
    """

    def __init__(self, *, command: str) -> None:
        self._command = command
        self._process: Any = None
        self._connection: Connection | None = None
        self._place: Any = None

    def __enter__(self) -> Self:
        self._place = tempfile.TemporaryDirectory(prefix="feverfew-")
        awaited.announce(self._told)
        forkserver(preload=["client.preloading", *_SHARED, "simulations.awaited", "client.preloaded"])
        server.ensure_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is None:
            self.dismiss()
        else:
            self._connection.close()  # it reads the end, ends the workers and leaves
            self._process.join(_LEAVES_SECONDS)
            if self._process.is_alive():  # it was told to stop in a place where nothing is heard
                self._process.kill()
            _import_nothing_later()
        self._place.cleanup()

    def dismiss(self) -> None:
        """Ends what was begun: nobody needs what is being imported."""
        _end_the_fork_server()
        _import_nothing_later()

    def prepare(self, plan: Plan) -> None:
        """Lets what runs of such plans need besides be imported; of several plans, what the first needs."""
        if not self._told.exists():
            private = () if plan.privacy.mechanism == "none" else ("client.clipping",)
            awaited.tell(self._told, modules=private)

    @property
    def _told(self) -> Path:
        return Path(self._place.name) / "modules"

    def run(
        self, plan: Plan, sites: Sequence[Path], *, settings: Settings, directory: Path, log: Path
    ) -> int:
        """Runs a plan over site directories, see ``simulations.simulation.simulate``, and prints its end.

        Args:
            log: the log of the workers; runs with the same log share them.

        Returns:
            The exit code, after the message where something went wrong.

        Raises:
            RunError: the process was killed.
        """
        if self._connection is None:
            self._begin()
        assert self._connection is not None
        told = {
            "plan": plan.to_json(),
            "sites": [str(path) for path in sites],
            "settings": settings.model_dump(mode="json"),
            "directory": str(directory),
            "log": str(log),
        }
        try:
            self._connection.send_bytes(json.dumps(told).encode())
            return int(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RunError(
                f"Expected the run to end by itself, found its process killed; go on with resume=true "
                f"hydra.run.dir={directory}"
            ) from None

    def _begin(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("forkserver")
        process = context.Process(target=_serve, args=(theirs, self._command))
        process.start()  # waits until all is imported
        theirs.close()
        self._connection, self._process = ours, process


def _serve(connection: Connection, command: str) -> None:
    """Main function of the process."""
    threading.Thread(target=crew.die_with_parent, daemon=True).start()
    _share_the_fork_server()
    pools: dict[str, Workers] = {}
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            told = json.loads(connection.recv_bytes())
            try:
                code = exit_code(lambda told=told: _run(told, pools), command=command)  # type: ignore[misc]
            except Exception:  # a defect: the person sees where, and the command ends as after any error
                traceback.print_exc()
                code = 1
            connection.send_bytes(str(code).encode())
    for pool in pools.values():
        pool.close()


def _import_nothing_later() -> None:
    """Lets a fork server that is started later in this process import and await nothing of a run."""
    forkserver()


def _end_the_fork_server() -> None:
    ours: Any = server._forkserver
    if ours._forkserver_pid is not None:
        os.kill(ours._forkserver_pid, signal.SIGKILL)  # in the middle of what it imports
        ours._stop()


def _share_the_fork_server() -> None:
    """Lets the workers come from the process that this one comes from.

    The documentation of ``ensure_running`` promises it, but what Python does is to look for the server's
    process id, which a child does not know, and to start another that has imported nothing.
    """
    ours: Any = server._forkserver
    if ours._forkserver_address is not None:
        ours.ensure_running = lambda: None


def _run(told: dict[str, Any], pools: dict[str, Workers]) -> int:
    from common.plan import Plan
    from simulations.settings import Settings
    from simulations.simulation import show, simulate
    from simulations.workers import Workers

    pool = pools.setdefault(told["log"], Workers(log=Path(told["log"])))
    directory = Path(told["directory"])
    try:
        report = simulate(
            Plan.from_json(told["plan"]),
            [Path(path) for path in told["sites"]],
            settings=Settings.model_validate(told["settings"]),
            directory=directory,
            pool=pool,
        )
    except KeyboardInterrupt:
        return INTERRUPTED  # the command gets the signal too, and says so
    show(report, directory=directory)
    return 0
