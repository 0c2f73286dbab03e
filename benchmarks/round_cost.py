"""The fixed cost of a simulation: a tiny model, no training, 10 sites, 20 rounds; beside Flower's engine.

Run with ``python -m benchmarks.round_cost``. Whole processes are timed, imports included. Sites are written
and their images decoded before, by a run that is not timed, since both engines would pay for it alike.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figure import tell

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
PLAN = [
    "data.num_sites=10",
    "data.patients_per_site=4",
    "data.image_size=64",
    "plan.rounds=20",
    "plan.quorum=10",
    "plan.evaluation.validation_every=0",
    "plan.evaluation.test_at_end=false",
    "training.local_steps=0",
    "privacy=none",
    "model.channels=[16]",
    "model.pool_sizes=[4]",
    "model.head_size=7",  # 977 parameters
]


def seconds(place: Path, *overrides: str) -> float:
    """Runs one simulation and returns its wall time."""
    start = time.monotonic()
    done = subprocess.run(
        [COMMAND, *PLAN, *overrides], cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - start


def main() -> None:
    """Prints median, least and greatest wall time of each engine and the ratio of paired runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as place:
        cold = seconds(Path(place))
        local, flower = [], []
        for _ in range(runs):
            local.append(seconds(Path(place)))
            flower.append(seconds(Path(place), "engine=flower"))
    print(f"first run, which writes sites and decodes images: {cold:.2f} s")
    for name, times in (("local", local), ("flower", flower)):
        print(f"{name:>6}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    ratios = [theirs / ours for ours, theirs in zip(local, flower, strict=True)]
    tell("10 sites, 20 rounds without training", local, unit="s", at_most=5.0)
    tell("the same, Flower's engine over ours", ratios)


if __name__ == "__main__":
    main()
