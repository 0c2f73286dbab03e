"""What a simulated round costs beside its training: the default experiment, over the bare training loop.

Run with ``python -m benchmarks.round_overhead``. With one worker both train one site after the other, in one
process with one thread. With two, the default here, the bare loop has what a plain program has to use two
processors with: two threads. The bare loop takes the same steps on the same data (plan,
parts, noise, patients drawn) and nothing else: no ledger, trail, reply on disk, message, sum or checkpoint.
A pair is a simulation and, right after it, the loop; each gives its median round, the first left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.figure import tell
from benchmarks.many_sites import shown
from client.process import set_environment

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
PLAN = ["plan.randomness=seeded", "plan.evaluation.validation_every=0"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def simulated(place: Path, run: str, *, rounds: int, workers: int) -> float:
    """Returns the median seconds from the beginning of a round to that of the next."""
    command = [COMMAND, *PLAN, f"engine.workers={workers}", f"plan.rounds={rounds}", f"hydra.run.dir={run}"]
    done = subprocess.run(
        command, cwd=place, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    events = [json.loads(line) for line in (place / run / "events.jsonl").read_text().splitlines()]
    mine = [event["time"] for event in events if event["event"] == "round_started"][-rounds:]
    return _median_step(mine)


def _median_step(times: list[str]) -> float:
    stamps = np.array([np.datetime64(text[:-6]) for text in times])
    return float(np.median(np.diff(stamps)[1:]) / np.timedelta64(1, "s"))


def bare(place: Path, run: str, *, rounds: int, threads: int) -> float:
    """Returns the median seconds of training every site once by the plan of a run."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.round_overhead", "--bare", str(place / run)]
    done = subprocess.run(
        [*command, "--rounds", str(rounds), "--threads", str(threads)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def loop(run: Path, *, rounds: int, threads: int) -> float:
    """The bare loop itself, in this process."""
    import torch

    from client.cohort import open_cohort
    from client.noise import seeded_key
    from client.site import open_site
    from client.training import train_by_plan
    from common import model
    from common.calibration import mechanism
    from common.plan import Plan

    torch.set_num_threads(threads)
    plan = Plan.from_json((run / "plan.json").read_text(encoding="utf-8"))
    sites = [open_site(path.parent) for path in sorted(run.parent.glob("sites/default/*/site.yaml"))]
    parts = [open_cohort(site, asked=plan.asked).parts["train"] for site in sites]
    chosen = [mechanism(plan, nominal_patients=site.settings.nominal_patients) for site in sites]
    network = model.build(plan)
    parameters = model.flatten(network)
    times = []
    for server_round in range(1, rounds + 1):
        begun = time.monotonic()
        for site, part, one in zip(sites, parts, chosen, strict=True):
            model.load(network, parameters)
            key = seeded_key(seed=plan.seed, plan_hash=plan.hash, server_round=server_round, site=site.name)
            train_by_plan(network, part, plan=plan, mechanism=one, key=key, on_step=lambda step, of: None)
        times.append(time.monotonic() - begun)
    return statistics.median(times[1:])


def main() -> None:
    """Prints the comparison with one thread and with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.bare is not None:
        print(loop(asked.bare, rounds=asked.rounds, threads=asked.threads[0]))
        return
    set_environment()  # as the processes that train at a site: without it the bare loop is slower
    with tempfile.TemporaryDirectory() as folder:
        simulated(Path(folder), "first", rounds=3, workers=1)  # writes the sites and decodes the images
        for threads in asked.threads:
            compare(Path(folder), threads=threads, runs=asked.runs, rounds=asked.rounds)


def compare(place: Path, *, threads: int, runs: int, rounds: int) -> None:
    """Prints both times of a round and the ratio of pairs, with so many workers and threads."""
    ours, least = [], []
    for number in range(runs):
        run = f"run-{threads}-{number}"
        ours.append(simulated(place, run, rounds=rounds, workers=threads))
        least.append(bare(place, run, rounds=rounds, threads=threads))
    print(f"a simulated round, workers: {threads}: {shown([1e3 * one for one in ours])} ms")
    print(f"  its bare loop, threads: {threads}: {shown([1e3 * one for one in least])} ms")
    ratios = [one / other for one, other in zip(ours, least, strict=True)]
    tell(f"a simulated round over its bare training, threads: {threads}", ratios, at_most=1.05)


if __name__ == "__main__":
    main()
