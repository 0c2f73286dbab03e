"""Logistic regression as a job of NVIDIA FLARE's simulator; run by ``benchmarks/flare.py`` in an environment
of its own, which has no Feverfew.

A client is an ``Executor`` in numpy: the data of all clients are one memory-mapped file, of which it takes
its rows; 6 steps of softmax regression, each patient drawn with probability 10 / 60. The controller is
FLARE's FedAvg with ``num_clients=10``, which draws ten clients a round; nothing is persisted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob

STEPS, EXPECTED_BATCH, LEARNING_RATE, NUM_CLASSES, NUM_INPUTS = 6, 10, 0.05, 10, 784
ASKED = 10
AGGREGATED = f"Aggregated {ASKED}/{ASKED} results"


class LogisticRegression(Executor):
    """Trains on the rows of one client."""

    def __init__(self, place: str, cases: int) -> None:
        super().__init__()
        self._place = place
        self._cases = cases

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        weights = from_shareable(shareable).data
        number = int(fl_ctx.get_identity_name().rpartition("-")[2]) - 1
        rows = slice(number * self._cases, (number + 1) * self._cases)
        images = np.load(f"{self._place}/images.npy", mmap_mode="r")[rows].astype(np.float32) / 255
        labels = np.load(f"{self._place}/labels.npy", mmap_mode="r")[rows]
        w, b = (np.array(weights[name], dtype=np.float32) for name in ("w", "b"))
        rng = np.random.default_rng()
        for _ in range(STEPS):
            chosen = rng.random(self._cases) < EXPECTED_BATCH / self._cases
            x, y = images[chosen], labels[chosen]
            scores = x @ w + b
            probs = np.exp(scores - scores.max(axis=1, keepdims=True))
            probs /= probs.sum(axis=1, keepdims=True)
            probs[np.arange(len(y)), y] -= 1
            w -= LEARNING_RATE * (x.T @ probs) / EXPECTED_BATCH
            b -= LEARNING_RATE * probs.sum(axis=0) / EXPECTED_BATCH
        sent = DXO(DataKind.WEIGHTS, data={"w": w, "b": b}, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: STEPS})
        return sent.to_shareable()


def main(place: str, clients: str, cases: str, rounds: str, threads: str, workspace: str) -> None:
    """Runs the job in the simulator."""
    model: dict[str, Any] = {
        "w": np.zeros((NUM_INPUTS, NUM_CLASSES)).tolist(),
        "b": np.zeros(NUM_CLASSES).tolist(),
    }
    job = FedJob(name="logistic", min_clients=int(clients))
    job.to_server(
        FedAvg(num_clients=ASKED, num_rounds=int(rounds), model=model, persistor_id="", save_filename="")
    )
    job.to_clients(LogisticRegression(place, int(cases)))
    with tempfile.TemporaryDirectory() as jobs:
        job.export_job(jobs)
        command = [str(Path(sys.executable).with_name("nvflare")), "simulator", f"{jobs}/logistic"]
        # by its command, since FedJob.simulator_run knows no way past the 100 clients that it has by default
        command += ["-w", workspace, "-n", clients, "-m", clients, "-t", threads, "-l", "concise"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    if told.count(AGGREGATED) != int(rounds) or "Finished FedAvg." not in told:  # it ends with 0 all the same
        raise SystemExit(f"FLARE did not do {rounds} rounds:\n{told[-4000:]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
