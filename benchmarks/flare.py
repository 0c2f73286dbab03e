"""Logistic regression over 1,000 sites beside NVIDIA FLARE's simulator, 10 rounds of 10 sites.

Run with ``python -m benchmarks.flare``: an environment with ``nvflare`` and numpy from PyPI is made once, in
``.venv-flare`` or where ``--environment`` says. Whole processes are timed, in turn; memory is the peak of all
of them, as PSS. FLARE is ended after thirty times what ours took: then the ratio is a lower bound.

How both are set up. The same 784 inputs and 10 classes, 60 patients a site, 6 local steps with 10 patients
expected in each, learning rate 0.05, 10 sites drawn a round, plain averaging, nothing evaluated, the worker
processes (``threads`` of the simulator) as many as processor cores. In FLARE's favour: its client is numpy
without torch, reads one memory-mapped file that is prepared before, and keeps no trail, no charge, no reply
on disk and no model. Ours prepares and delivers to all sites,
as FLARE's simulator registers and starts all of them. See ``benchmarks/flare_job.py`` for the job.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.figure import tell
from benchmarks.many_sites import CASES_PER_SITE, Federation, shown
from benchmarks.tree import Cost, measured

PATIENCE = 30.0
JOB = Path(__file__).with_name("flare_job.py")


def environment(folder: Path) -> Path:
    """Returns the interpreter of an environment with FLARE, which is made where it is not there yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "nvflare", "numpy"], check=True)
    return python


def write_arrays(place: Path, *, num_sites: int) -> None:
    """Writes the training part of our file as two arrays that can be mapped."""
    with np.load(place / f"{num_sites}.npz") as parts:
        for name, kind in (("images", np.uint8), ("labels", np.int64)):
            both = np.concatenate([parts[f"train_{name}"], parts[f"val_{name}"]])
            np.save(place / f"{name}.npy", both.reshape(len(both), -1).astype(kind).squeeze())


def theirs(
    python: Path, place: Path, *, num_sites: int, rounds: int, run: int, at_most_seconds: float
) -> Cost:
    """Returns the cost of a run of FLARE's simulator, in a workspace of its own."""
    threads = len(os.sched_getaffinity(0))
    arguments = [place, num_sites, CASES_PER_SITE, rounds, threads, place / f"flare-{run}"]
    command = [str(python), str(JOB), *map(str, arguments)]
    return measured(command, cwd=place, at_most_seconds=at_most_seconds)


def main() -> None:
    """Prints the cost of both and the ratio of paired runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path(".venv-flare"))
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=1)
    asked = parser.parse_args()
    python = environment(asked.environment.absolute())
    ours, flare = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        federation = Federation(place, num_sites=asked.sites, rounds=asked.rounds)
        write_arrays(place, num_sites=asked.sites)
        for run in range(asked.runs):
            ours.append(federation.run())
            most = PATIENCE * ours[-1].seconds
            size = {"num_sites": asked.sites, "rounds": asked.rounds}
            flare.append(theirs(python, place, **size, run=run, at_most_seconds=most))
    for name, costs in (("feverfew", ours), ("flare", flare)):
        print(
            f"{name:>8}, {asked.sites} sites, {asked.rounds} rounds: "
            f"{shown([one.seconds for one in costs])} s, {shown([one.megabytes for one in costs])} MB"
        )
    ratios = [other.seconds / one.seconds for one, other in zip(ours, flare, strict=True)]
    is_bound = not all(one.is_whole for one in flare)
    print("FLARE had not ended by then: the ratio is a lower bound" if is_bound else "both came to their end")
    what = "NVIDIA FLARE over ours" + (", at least" if is_bound else "")
    tell(f"{asked.sites} sites, {asked.rounds} rounds, {what}", ratios, at_least=20.0)


if __name__ == "__main__":
    main()
