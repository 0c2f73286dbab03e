"""ServerApp: plan -> state -> rounds -> report."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import save

from common import durable, logline, model
from common.errors import FeverfewError, QuorumNotReached
from common.flower import bound_messages, shorten_backoff, shorten_retries
from common.plan import Plan
from common.trail import Trail
from server import checkpoint
from server.aggregation import strategy_of
from server.checkpoint import RunState
from server.heads import Heads
from server.landmarks import OVERRIDE_NAME, Found, LandmarkRound
from server.revoked import revoked_sites
from server.rounds import Released, Rounds
from server.run_record import EVENTS, PLAN, End, RunRecord
from server.story import Status, report_of
from server.trail import signed

MIN_REPLY_BYTES = 2**28
"""What a reply may have in memory, at least: exact scores of ten million cases."""
UPLOAD_SECONDS = 5.0
"""How long the rest of a reply is waited for that a site has begun to send, before others get a look. A site
that died in between never sends it; what has come by then need not be sent again."""
app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Runs the plan of the run config; a run that was interrupted goes on from its last checkpoint."""
    shorten_backoff()
    shorten_retries()
    if os.environ.get(logline.VARIABLE) == "json":
        logline.start_ours("serverapp", output=sys.stdout)
    run = str(context.run_config["run"])
    record = RunRecord(directory=run_directory(run))
    if record.is_stopped:
        return
    record.directory.mkdir(parents=True, exist_ok=True)
    record.begin_life(context.run_id)
    heads, key = Path(os.environ["FEVERFEW_HEADS_DIRECTORY"]), Path(os.environ["FEVERFEW_TRAIL_KEY"])
    with (
        logline.about(run=run),
        noted_end(record),
        signed(record.directory / EVENTS, run=run, key=key, heads=heads),
    ):
        plan = Plan.from_json(str(context.run_config["plan"]))  # of another schema, after an update
        largest = max(MIN_REPLY_BYTES, 12 * model.num_parameters(model.build(plan)))
        bound_messages(largest, max_seconds=UPLOAD_SECONDS)
        gc.freeze()  # the imports are no garbage, for which Flower's Bulyan looks at every update
        coordinate(
            grid,
            plan,
            run=run,
            directory=record.directory,
            heads=Heads(heads),
            engine=engine(),
            revoked=revoked,
        )


def revoked() -> frozenset[str]:
    """Returns the sites that were revoked; where nobody enrols sites, as in a simulation, none is."""
    place = os.environ.get("FEVERFEW_CERTIFICATES_DIRECTORY")
    return frozenset() if place is None else revoked_sites(Path(place))


@contextmanager
def noted_end(record: RunRecord) -> Iterator[None]:
    """Notes how a run ended, where it did.

    What Feverfew raises on purpose is an end. Anything else may pass (a full disk, a SuperLink that is
    away) and leaves the run open: it is started again, for a number of times.
    """
    try:
        yield
    except QuorumNotReached as error:
        record.finish(End(status="quorum_not_reached", message=str(error)))
        raise
    except FeverfewError as error:
        record.finish(End(status="failed", message=str(error)))
        raise
    record.finish(End(status="completed", message=""))


def run_directory(run: str) -> Path:
    """Returns where a run's files go: ``FEVERFEW_RUN_DIRECTORY``, in which ``{run}`` stands for the run."""
    return Path(os.environ["FEVERFEW_RUN_DIRECTORY"].replace("{run}", run))


def engine() -> str:
    """Returns what carries the messages, for the report."""
    return os.environ.get("FEVERFEW_ENGINE", "deployment")


def coordinate(
    grid: Grid,
    plan: Plan,
    *,
    run: str,
    directory: Path,
    heads: Heads,
    engine: str,
    revoked: Callable[[], frozenset[str]] = frozenset,
) -> None:
    """Runs a plan over a grid and writes its run directory.

    Args:
        heads: what is remembered of the sites' ledgers from run to run.
        revoked: returns the names of the sites that are let in no more.

    Raises:
        QuorumNotReached: the run stopped early; its report and the last good model are written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    durable.write(directory / PLAN, plan.to_json().encode())
    trail = Trail(directory / EVENTS)
    checkpoints = directory / "checkpoints"
    state = checkpoint.latest(checkpoints, run=run, plan_hash=plan.hash) or _first(plan, run=run)
    trail.record("run_started", run=run, plan_hash=plan.hash, rounds=plan.rounds, round=state.server_round)
    kind = Rounds if plan.landmarks is None else LandmarkRound
    rounds = kind(
        grid,
        plan=plan,
        state=state,
        strategy=lambda nodes: strategy_of(plan, nodes=nodes),
        trail=trail,
        heads=heads,
        revoked=revoked,
        save=lambda state: checkpoint.save_state(checkpoints, state),
    )
    status: Status = "failed"
    released = Released(statistics={}, noise_std={})
    landmarks: Found | None = None
    try:
        if isinstance(rounds, LandmarkRound):
            landmarks = rounds.find()
            durable.write(directory / OVERRIDE_NAME, f"{landmarks.override}\n".encode())
        else:
            released = rounds.run()
        status = "completed"
    except QuorumNotReached as error:
        status = "quorum_not_reached"
        trail.record("quorum_not_reached", message=str(error))
        raise
    finally:
        if plan.landmarks is None:
            named = model.named_arrays(model.build(plan), rounds.state.parameters)
            durable.write(directory / "model.safetensors", save(named))
        report = report_of(
            rounds.state,
            plan=plan,
            released=released,
            landmarks=landmarks,
            status=status,
            engine=engine,
            restarts=Counter(event["process"] for event in trail.events() if event["event"] == "restarted"),
        )
        report.write(directory)
        trail.record("run_finished" if status == "completed" else "run_failed", status=status)


_NOTHING = np.zeros(0, dtype=np.float32)
"""The parameters of a run that has no model."""


def _first(plan: Plan, *, run: str) -> RunState:
    return RunState(
        run=run,
        plan_hash=plan.hash,
        server_round=0,
        parameters=_NOTHING if plan.landmarks else model.flatten(model.build(plan)),
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
